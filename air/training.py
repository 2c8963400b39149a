"""The training loop: steps, evaluations, and the state from which both go on. Prints nothing."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pyro.infer import JitTraceGraph_ELBO, TraceGraph_ELBO
from torch import Tensor

from air.air import AIR
from air.alarms import collapse_alarm, empty_canvas_elbo, first_not_finite
from air.evaluation import HeldOut, evaluate
from air.events import CheckpointDue, Evaluated, Event, Progress, SnapshotDue
from air.inference import mean_count_probs
from air.marginal import MarginalAIR
from air.priors import (
    DEFAULT_COUNT_RATIO,
    AnnealedPresencePrior,
    Annealing,
    geometric_count_prior,
    presence_probs,
)
from air.svi import SVI, CompiledSVI, make_optimizer
from air.tally import Tally

Estimator = Literal["score", "marginal"]
Schedule = Literal["constant", "cosine"]

MOST_SKIPPED = 20  # steps in a row whose loss or gradients are not finite end training
LOOK_EVERY = 100  # steps, at the least, whether there are so many
LEARN_PRIOR_EVERY = 100  # steps
LEARN_PRIOR_FROM = 1000  # training scenes


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
    count_prior: Sequence[float] | None = None  # p(n), n = 0..T, in place of z_pres_prior
    learn_count_prior_from: int | None = None  # step
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


class Trainer:
    """Trains an AIR by SVI.

    Args:
        air: The model, on the device to train on.
        images: Training scenes, [N, (C,) H, H], on the same device.
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
        self.learnt_prior: list[float] | None = None  # p(n)
        self.step = 0
        self.seconds = 0.0  # of training, evaluations and pictures left out
        self._factor = 1.0  # of the learning rates, as they stand in the optimiser
        self.stop_requested = False
        self.miscounted: list[int] = []  # some scenes of the last evaluation
        self.tally = Tally(images.device)

    def train(self) -> Iterator[Event]:
        """Takes the steps that are left, or those until `stop_requested`, and yields events.

        The state is whole at every event, so that it can be saved there, and after an error too.

        Raises:
            FloatingPointError: If training does not move any more.
        """
        settings = self.settings
        if self.step == 0 < settings.num_steps:
            yield SnapshotDue(0)
        start, since, since_step = time.perf_counter(), self.seconds, self.step
        while self.step < settings.num_steps and not self.stop_requested:
            self._take_step()
            last = self.step == settings.num_steps
            progress = last or _due(self.step, settings.progress_every)
            evaluation = not last and _due(self.step, settings.eval_every)
            checkpoint = not last and _due(self.step, settings.save_every)
            snapshot = evaluation or checkpoint or (not last and _is_early(self.step))
            look = progress or snapshot or _due(self.step, LOOK_EVERY)
            if not (look or self.stop_requested):
                continue
            stuck = bool(self.tally.in_a_row >= MOST_SKIPPED)  # waits for the device
            self.seconds += time.perf_counter() - start
            if progress or stuck:
                yield self._progress(self.step - since_step, self.seconds - since)
                since, since_step = self.seconds, self.step
            if stuck:
                what = first_not_finite(self.air, self.images, self.prior)
                raise FloatingPointError(
                    f"{what} and with it the loss or its gradients were not finite for "
                    f"{int(self.tally.in_a_row)} steps in a row"
                )
            if evaluation:
                yield self.evaluate(settings.eval_scenes)
            if snapshot:
                yield SnapshotDue(self.step)
            if checkpoint:
                yield CheckpointDue(self.step)
            start = time.perf_counter()
        if self.step == settings.num_steps:
            yield CheckpointDue(self.step)  # before what may take minutes
            yield self.evaluate(len(self.held_out.images))
            yield SnapshotDue(self.step)

    def _take_step(self) -> None:
        self.prior.set_step(self.step + 1)
        self._set_rates()
        loss = self.svi.advance(
            self.images, batch_size=self.settings.batch_size, z_pres_prior_p=self.prior
        )
        self.tally.add(-loss / len(self.images), self.svi.grad_norm, self.svi.skipped)
        self.step += 1
        begin = self.settings.learn_count_prior_from
        if begin is not None and self.step >= begin and _due(self.step, LEARN_PRIOR_EVERY):
            self._learn_count_prior()

    def _learn_count_prior(self) -> None:
        """Sets p(n) to the mean of q(n), which is where the ELBO is highest for the guide as it is.

        The scenes are spread evenly over the data, which may be sorted.
        """
        scenes = self.images[:: -(-len(self.images) // LEARN_PRIOR_FROM)]
        self.learnt_prior = mean_count_probs(self.air, scenes)
        self.prior.keep(presence_probs(self.learnt_prior))

    def _progress(self, steps: int, seconds: float) -> Progress:
        elbo, grad_norm, skipped = self.tally.read()
        rate = steps / max(seconds, 1e-9)
        return Progress(
            step=self.step,
            elbo=elbo,
            skipped=skipped,
            grad_norm=grad_norm,
            learning_rate=self.settings.learning_rate * self._factor,
            z_pres_prior_p=list(self.prior.now),
            images_per_second=rate * min(self.settings.batch_size, len(self.images)),
            steps_per_second=rate,
            seconds=self.seconds,
        )

    def _set_rates(self) -> None:
        factor = learning_rate_factor(self.settings.lr_schedule, self.step, self.settings.num_steps)
        if factor == self._factor:  # writing to the device has its price
            return
        self._factor = factor
        rates = self.settings.learning_rate, self.settings.baseline_learning_rate
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"].fill_(rate * factor)

    def evaluate(self, num_scenes: int, **iwae: int) -> Evaluated:
        """Evaluates on the first held-out scenes, under the prior of the present step.

        Args:
            num_scenes: How many of them.
            iwae: ``iwae_samples`` and ``iwae_scenes`` of `evaluate`, for a bound of log p(x).
        """
        scenes, seed = self.held_out.first(num_scenes), self.settings.seed
        result = evaluate(self.air, scenes, self.prior, seed=seed, **iwae)
        empty = empty_canvas_elbo(self.air, scenes.images)
        self.miscounted = result.miscounted or []
        late = self.step >= self.settings.alarm_after
        alarm = collapse_alarm(result, empty) if late else None
        return Evaluated(self.step, len(scenes.images), result, empty, alarm)

    def state_dict(self) -> dict[str, Any]:
        """All that it takes to go on exactly from here: tensors and plain values."""
        cuda = self.images.device.type == "cuda"
        return {
            "step": self.step,
            "seconds": self.seconds,
            "miscounted": self.miscounted,
            "presence": list(self.prior.now),
            "learnt_prior": self.learnt_prior,
            "tally": {"steps": self.tally.steps, "sums": self.tally.sums},
            "model": self.air.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.images.device) if cuda else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to where `state_dict` was taken.

        Raises:
            ValueError: If it is the state of another model, or none.
        """
        counted, wrong = len(self.held_out.images), list(state["miscounted"])
        for steps in (state["step"], state["tally"]["steps"]):
            if type(steps) is not int or steps < 0:
                raise ValueError(f"step is {steps!r}")
        if not isinstance(state["seconds"], float) or not math.isfinite(state["seconds"]):
            raise ValueError(f"seconds are {state['seconds']!r}")
        if not all(type(index) is int and 0 <= index < counted for index in wrong):
            raise ValueError("miscounted scenes are not among those held out")
        self.step, self.seconds = state["step"], state["seconds"]
        self.miscounted = wrong
        self.tally.steps = state["tally"]["steps"]
        self.tally.sums.copy_(state["tally"]["sums"])
        self.air.load_state_dict(state["model"])
        # What follows from the settings and the device stays as it is here.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        for parameter, moments in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):  # a fused Adam goes by memory, and never asks
                if moments[name].shape != parameter.shape or not moments[name].is_contiguous():
                    raise ValueError(f"the optimiser's {name} is not of the shape of its weight")
        self._factor = math.nan
        self.prior.set_step(self.step)
        if (learnt_prior := state.get("learnt_prior")) is not None:
            self.learnt_prior = list(learnt_prior)
            self.prior.keep(presence_probs(self.learnt_prior))
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


def _is_early(step: int) -> bool:
    """Whether a snapshot is due at 10, 20, 50, 100, ... steps: most is learnt at the beginning."""
    return step >= 10 and str(step).rstrip("0") in ("1", "2", "5")


def _presence_prior(settings: TrainingSettings, air: AIR) -> AnnealedPresencePrior:
    annealed_at = settings.anneal_prior_begin + settings.anneal_prior_duration
    begin = settings.learn_count_prior_from
    if begin is not None and settings.anneal_prior != "none" and begin < annealed_at:
        raise ValueError(
            f"--learn-count-prior-from must be at least {annealed_at}, where --anneal-prior ends, "
            f"got {begin}"
        )
    if settings.count_prior is not None:
        if (given := len(settings.count_prior)) != (wanted := air.num_steps + 1):
            raise ValueError(
                f"--count-prior: expected {wanted} numbers, of 0 objects and more, got {given}"
            )
        probs = presence_probs(settings.count_prior)
    elif settings.z_pres_prior_raw:
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
