"""The training loop: steps, evaluations, and the state from which both go on. Prints nothing."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import torch
from pyro.infer import JitTraceGraph_ELBO, TraceGraph_ELBO
from torch import Tensor

from air.air import AIR
from air.alarms import collapse_alarm, empty_canvas_elbo
from air.evaluation import Evaluation, HeldOut, evaluate
from air.marginal import MarginalAIR
from air.priors import (
    DEFAULT_COUNT_RATIO,
    AnnealedPresencePrior,
    Annealing,
    geometric_count_prior,
)
from air.svi import SVI, CompiledSVI, make_optimizer

Estimator = Literal["score", "marginal"]
Schedule = Literal["constant", "cosine"]


@dataclass(frozen=True)
class TrainingSettings:
    """How to train; the defaults are the best recipe known."""

    num_steps: int = 10_000
    batch_size: int = 64
    learning_rate: float = 1e-3
    baseline_learning_rate: float = 1e-2
    lr_schedule: Schedule = "constant"
    clip_grad_norm: float | None = None
    estimator: Estimator = "marginal"
    z_pres_prior: float = DEFAULT_COUNT_RATIO
    z_pres_prior_raw: bool = False
    anneal_prior: Annealing = "none"
    anneal_prior_to: float = 1e-7
    anneal_prior_begin: int = 0
    anneal_prior_duration: int = 100_000
    compile: bool | None = None  # None, here: do not; the program decides by the run's length
    jit: bool = False
    seed: int = 0
    progress_every: int = 10
    eval_every: int = 500
    eval_scenes: int = 2000
    save_every: int = 1000
    alarm_after: int = 1000


@dataclass(frozen=True)
class Progress:
    """The mean over the optimisation steps since the last one."""

    step: int
    elbo: float  # of the training batches, nats per image
    images_per_second: float
    seconds: float  # of training, evaluations left out

    def record(self) -> dict[str, Any]:
        """The line for metrics.jsonl."""
        return vars(self)

    def __str__(self) -> str:
        """The figures beside a progress bar."""
        return f"ELBO {self.elbo:.1f} nats, {self.images_per_second:.0f} images/s"


@dataclass(frozen=True)
class Evaluated:
    """An evaluation on held-out scenes."""

    step: int
    scenes: int
    result: Evaluation
    empty_elbo: float  # that of leaving every canvas empty
    alarm: str | None  # a sign of collapse, from step `alarm_after` on

    def record(self) -> dict[str, Any]:
        """The line for metrics.jsonl."""
        measures = self.result._asdict()
        elbo, elbo_se = measures.pop("elbo"), measures.pop("elbo_se")
        return {
            "step": self.step,
            "eval_elbo": elbo,
            "eval_elbo_se": elbo_se,
            "eval_scenes": self.scenes,
            "empty_elbo": self.empty_elbo,
            **measures,
            "alarm": self.alarm,
        }

    def __str__(self) -> str:
        """The evaluation for reading, with its confusion matrix."""
        result = self.result
        text = (
            f"step {self.step:,}, {self.scenes:,} held-out scenes: "
            f"ELBO {result.elbo:.1f} ± {result.elbo_se:.1f} nats"
        )
        if result.confusion is None:
            return f"{text}, scenes by inferred count {result.count_histogram}"
        lines = [
            f"{text}, count accuracy {result.accuracy_mode:.1%} by mode, "
            f"{result.accuracy_sample:.1%} by sample",
            "  true \\ inferred" + "".join(f"{n:7}" for n in range(len(result.confusion[0]))),
        ]
        for true, row in enumerate(result.confusion):
            lines.append(f"{true:17}" + "".join(f"{n:7}" for n in row))
        return "\n".join(lines)


@dataclass(frozen=True)
class CheckpointDue:
    """The moment to save `Trainer.state_dict`."""

    step: int


Event = Progress | Evaluated | CheckpointDue


class Trainer:
    """Trains an AIR by SVI.

    Args:
        air: The model, on the device to train on.
        images: Training scenes, [N, H, H], on the same device.
        held_out: Scenes to evaluate on.
        settings: How to train.
    """

    def __init__(
        self,
        air: AIR,
        images: Tensor,
        held_out: HeldOut,
        settings: TrainingSettings,
    ) -> None:
        self.air, self.images, self.settings = air, images, settings
        self.held_out = held_out
        self.optimizer = make_optimizer(
            air, settings.learning_rate, settings.baseline_learning_rate, settings.clip_grad_norm
        )
        elbo = JitTraceGraph_ELBO(ignore_jit_warnings=True) if settings.jit else TraceGraph_ELBO()
        program = MarginalAIR(air) if settings.estimator == "marginal" else air
        kind = CompiledSVI if settings.compile else SVI
        self.svi = kind(program.model, program.guide, self.optimizer, loss=elbo)
        self.prior = _presence_prior(settings, air)
        self.step = 0
        self.seconds = 0.0
        self.stop_requested = False
        self._elbos: list[float] = []  # since the last progress event

    def train(self) -> Iterator[Event]:
        """Takes the steps that are left, or those until `stop_requested`, and yields events.

        The state is whole at every event, so that it can be saved there.
        """
        settings = self.settings
        since, since_step = self.seconds, self.step
        while self.step < settings.num_steps and not self.stop_requested:
            self._take_step()
            last = self.step == settings.num_steps
            if last or _due(self.step, settings.progress_every):
                images = (self.step - since_step) * min(settings.batch_size, len(self.images))
                rate = images / max(self.seconds - since, 1e-9)
                elbo = sum(self._elbos) / len(self._elbos)
                self._elbos.clear()
                since, since_step = self.seconds, self.step
                yield Progress(self.step, elbo, rate, self.seconds)
            if not last and _due(self.step, settings.eval_every):
                yield self.evaluate(settings.eval_scenes)
            if not last and _due(self.step, settings.save_every):
                yield CheckpointDue(self.step)
        if self.step == settings.num_steps:
            yield self.evaluate(len(self.held_out.images))
            yield CheckpointDue(self.step)

    @contextmanager
    def stop_on_signals(self) -> Iterator[list[int]]:
        """Lets Ctrl-C and SIGTERM end `train` after the step at hand; a second one ends at once.

        Gives the list of signals received.
        """
        received: list[int] = []

        def stop(number: int, frame: FrameType | None) -> None:
            received.append(number)
            self.stop_requested = True
            signal.signal(number, previous[signal.Signals(number)])

        signals = signal.SIGINT, signal.SIGTERM
        previous = {number: signal.signal(number, stop) for number in signals}
        try:
            yield received
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _take_step(self) -> None:
        start = time.perf_counter()
        self.prior.set_step(self.step + 1)
        factor = learning_rate_factor(self.settings.lr_schedule, self.step, self.settings.num_steps)
        rates = self.settings.learning_rate, self.settings.baseline_learning_rate
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        loss = self.svi.step(
            self.images, batch_size=self.settings.batch_size, z_pres_prior_p=self.prior
        )
        self._elbos.append(-loss / len(self.images))
        self.step += 1
        self.seconds += time.perf_counter() - start

    def evaluate(self, num_scenes: int, **iwae: int) -> Evaluated:
        """Evaluates on the first held-out scenes, under the prior of the present step.

        Args:
            num_scenes: How many of them.
            iwae: ``iwae_samples`` and ``iwae_scenes`` of `evaluate`, for a bound of log p(x).
        """
        scenes, seed = self.held_out.first(num_scenes), self.settings.seed
        result = evaluate(self.air, scenes, self.prior, seed=seed, **iwae)
        empty = empty_canvas_elbo(scenes.images, self.air.likelihood_sd)
        late = self.step >= self.settings.alarm_after
        alarm = collapse_alarm(result, empty) if late else None
        return Evaluated(self.step, len(scenes.images), result, empty, alarm)

    def state_dict(self) -> dict[str, Any]:
        """All that it takes to go on exactly from here: tensors and plain values."""
        cuda = self.images.device.type == "cuda"
        return {
            "step": self.step,
            "seconds": self.seconds,
            "elbos": list(self._elbos),
            "model": self.air.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.images.device) if cuda else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to where `state_dict` was taken."""
        self.step, self.seconds = state["step"], state["seconds"]
        self._elbos = list(state["elbos"])
        self.air.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.prior.set_step(self.step)
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.images.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.images.device)


def learning_rate_factor(schedule: Schedule, step: int, num_steps: int) -> float:
    """What the learning rates are multiplied by at a step: "cosine" falls from 1 to 0.01."""
    if schedule == "constant":
        return 1.0
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _presence_prior(settings: TrainingSettings, air: AIR) -> AnnealedPresencePrior:
    if settings.z_pres_prior_raw:
        probs = [settings.z_pres_prior] * air.num_steps
    else:
        probs = geometric_count_prior(settings.z_pres_prior, air.num_steps)
    return AnnealedPresencePrior(
        probs,
        settings.anneal_prior,
        settings.anneal_prior_to,
        settings.anneal_prior_begin,
        settings.anneal_prior_duration,
        air.h_init.device,
    )
