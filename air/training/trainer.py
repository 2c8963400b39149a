"""The training loop: steps, evaluations, and the state from which both go on. Prints nothing."""

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from pyro.infer import JitTraceGraph_ELBO, TraceGraph_ELBO
from torch import Tensor

from air.air import AIR
from air.evaluation.collapse import (
    MAX_CHECKED_IMAGES,
    collapse_alarm,
    empty_canvas_elbo,
    first_not_finite,
)
from air.evaluation.metrics import HeldOut, evaluate
from air.inference import mean_count_probs
from air.marginal import MarginalAIR
from air.priors import continue_probs_from_counts
from air.subsampling import StreamedImages
from air.training.compiled_svi import CompiledSVI
from air.training.events import CheckpointDue, Evaluated, Event, Progress, SnapshotDue
from air.training.ranks import Ranks
from air.training.schedules import due, is_early, learning_rate_factor
from air.training.settings import TrainingSettings, make_presence_prior, share_of
from air.training.step_stats import StepStats
from air.training.svi import SVI, make_optimizer

MAX_SKIPPED = 20  # steps in a row whose loss or gradients are not finite end training
SYNC_EVERY = 100  # steps, at the least, whether there are so many
LEARN_PRIOR_EVERY = 100  # steps
LEARN_PRIOR_FROM = 1000  # training scenes
ALONE = Ranks()


class Trainer:
    """Trains an AIR by SVI.

    Args:
        air: The model, on the device to train on.
        images: Training scenes, [N, (C,) H, H], on the same device, or files of them; where several
            processes train, the part of this one.
        held_out: Scenes to evaluate on.
        settings: How to train; the batch is that of all processes together.
        ranks: The processes that train.

    Raises:
        ValueError: If the settings do not fit each other, or the processes.
    """

    def __init__(
        self,
        air: AIR,
        images: Tensor | StreamedImages,
        held_out: HeldOut,
        settings: TrainingSettings,
        ranks: Ranks = ALONE,
    ) -> None:
        self.air, self.images, self.settings = air, images, settings
        self.held_out, self.ranks = held_out, ranks
        self.batch_size = share_of(settings, len(images), ranks)
        self.optimizer = make_optimizer(
            air, settings.learning_rate, settings.baseline_learning_rate, settings.clip_grad_norm
        )
        elbo = JitTraceGraph_ELBO(ignore_jit_warnings=True) if settings.jit else TraceGraph_ELBO()
        program = MarginalAIR(air) if settings.estimator == "marginal" else air
        kind = CompiledSVI if settings.compile else SVI
        self.svi = kind(
            program.model, program.guide, self.optimizer, elbo, all_reduce=ranks.all_reduce
        )
        self.prior = make_presence_prior(settings, air)
        self.learnt_prior: list[float] | None = None  # p(n)
        self.step = 0
        self.seconds = 0.0  # of training, evaluations and pictures left out
        self._factor = 1.0  # of the learning rates, as they stand in the optimiser
        self.stop_requested = False  # of this process
        self.stopped = False  # all of them, by request
        self._streams: list[dict[str, Any]] = []  # the other processes' random states
        self._in_stream = ranks.size == 1  # whether this process draws its own random numbers
        self.miscounted: list[int] = []  # some scenes of the last evaluation
        self.tally = StepStats(images.device)

    def train(self) -> Iterator[Event]:
        """Takes the steps that are left, or those until `stop_requested`, and yields events.

        The state is whole at every event, so that it can be saved there, and after an error too.

        Raises:
            FloatingPointError: If training does not move any more.
        """
        settings = self.settings
        if self.step == 0 < settings.num_steps:
            yield SnapshotDue(0)
        if not self._in_stream:
            torch.manual_seed(self.ranks.seed(settings.seed, self.step))
        start, since, since_step = time.perf_counter(), self.seconds, self.step
        self.stopped = self.ranks.any(self.stop_requested)
        while not (self.finished or self.stopped):
            self._take_step()
            last = self.finished
            progress = last or due(self.step, settings.progress_every)
            evaluation = not last and due(self.step, settings.eval_every)
            checkpoint = not last and due(self.step, settings.save_every)
            snapshot = evaluation or checkpoint or (not last and is_early(self.step))
            look = progress or snapshot or due(self.step, SYNC_EVERY)
            if look or self.ranks.size == 1:  # several must stop at the same step
                self.stopped = self.ranks.any(self.stop_requested)
            if not (look or self.stopped):
                continue
            stuck = bool(self.tally.in_a_row >= MAX_SKIPPED)  # waits for the device
            self.seconds += time.perf_counter() - start
            if snapshot or last or stuck or self.stopped:  # the state may be asked for
                self._streams = self.ranks.gather(self._stream())[1:]
            if progress or stuck:
                yield self._progress(self.step - since_step, self.seconds - since)
                since, since_step = self.seconds, self.step
            if stuck:
                raise self._what_is_stuck()
            if evaluation:
                yield self.evaluate(settings.eval_scenes)
            if snapshot:
                yield SnapshotDue(self.step)
            if checkpoint:
                yield CheckpointDue(self.step)
            self.stopped = self.stopped or self.ranks.any(self.stop_requested)
            start = time.perf_counter()
        if self.finished:
            yield CheckpointDue(self.step)  # before what may take minutes
            yield self.evaluate(len(self.held_out.images))
            yield SnapshotDue(self.step)

    @property
    def finished(self) -> bool:
        """Whether the last step was taken."""
        return self.step >= self.settings.num_steps

    def _take_step(self) -> None:
        self.prior.set_step(self.step + 1)
        self._set_rates()
        if isinstance(self.images, StreamedImages):
            data, number = self.images.draw(self.batch_size), {"num_images": len(self.images)}
        else:
            data, number = self.images, {"batch_size": self.batch_size}
        loss = self.svi.step_async(data, **number, z_pres_prior_p=self.prior)
        self.tally.add(-loss / self.svi.number, self.svi.grad_norm, self.svi.skipped)
        self.step += 1
        begin = self.settings.learn_count_prior_from
        if begin is not None and self.step >= begin and due(self.step, LEARN_PRIOR_EVERY):
            self._learn_count_prior()

    def _what_is_stuck(self) -> FloatingPointError:
        images = (
            self.images if isinstance(self.images, Tensor) else self.images[:MAX_CHECKED_IMAGES]
        )
        what = first_not_finite(self.air, images, self.prior)
        return FloatingPointError(
            f"{what} and with it the loss or its gradients were not finite for "
            f"{int(self.tally.in_a_row)} steps in a row"
        )

    def _learn_count_prior(self) -> None:
        """Sets p(n) to the mean of q(n), which is where the ELBO is highest for the guide as it is.

        The scenes are spread evenly over the data, which may be sorted.
        """
        number = LEARN_PRIOR_FROM // self.ranks.size
        scenes = self.images[:: -(-len(self.images) // number)]
        of_ranks = self.ranks.gather(mean_count_probs(self.air, scenes))
        self.learnt_prior = [sum(probs) / len(probs) for probs in zip(*of_ranks, strict=True)]
        self.prior.set_probs(continue_probs_from_counts(self.learnt_prior))

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
            images_per_second=rate * min(self.batch_size, len(self.images)) * self.ranks.size,
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
        return {
            "step": self.step,
            "seconds": self.seconds,
            "miscounted": self.miscounted,
            "presence": list(self.prior.now),
            "learnt_prior": self.learnt_prior,
            "tally": {"steps": self.tally.steps, "sums": self.tally.sums},
            "model": self.air.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **self._stream(),
            "streams": self._streams,
        }

    def _stream(self) -> dict[str, Any]:
        """The random state of this process."""
        device = self.images.device
        cuda_rng = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return {"rng": torch.get_rng_state(), "cuda_rng": cuda_rng}

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
            self.prior.set_probs(continue_probs_from_counts(self.learnt_prior))
        streams = [state, *state.get("streams", [])]
        cuda = self.images.device.type == "cuda"
        whole = not cuda or all(stream["cuda_rng"] is not None for stream in streams)
        self._in_stream = len(streams) == self.ranks.size and (whole or self.ranks.size == 1)
        self._streams = streams[1:] if self._in_stream else []
        stream = streams[self.ranks.rank] if self._in_stream else state
        torch.set_rng_state(stream["rng"])
        if stream["cuda_rng"] is not None and self.images.device.type == "cuda":
            torch.cuda.set_rng_state(stream["cuda_rng"], self.images.device)
