"""The training loop: steps, evaluations, and the state that a checkpoint keeps. Prints nothing."""

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from pyro.infer import TraceGraph_ELBO
from torch import Tensor

from air.air import AIR
from air.data.scenes import Array
from air.evaluation.alarms import (
    collapse_alarm,
    empty_canvas_elbo,
    first_not_finite,
)
from air.evaluation.metrics import HeldOut, check_scenes, evaluate
from air.inference import mean_count_probs
from air.priors import CountPrior, geometric_presence, presence_from_counts
from air.support.fields import SettingError
from air.training.compiled_svi import CompiledSVI, Compiler, inductor
from air.training.events import CheckpointDue, Evaluated, Event, Progress, SnapshotDue
from air.training.phases import Phase, make_phases
from air.training.ranks import any_rank, seed_of_step, shard, sum_over_ranks, world_size
from air.training.schedules import is_due, is_early, learning_rate_factor
from air.training.step_stats import StepStats
from air.training.svi import SVI, make_optimizer
from air.training.teacher import Teacher
from air.training.training_settings import LEARN_PRIOR_EVERY, LEARN_PRIOR_SCENES, TrainingSettings

MAX_SKIPPED = 20  # skipped steps in a row that end training
# Steps, at most, between two checks whether steps were skipped and whether a rank is to stop. Each
# check waits for the device.
SYNC_EVERY = 25


class Trainer:
    """Trains an AIR by SVI.

    Args:
        air: The model, on the device to train on. Parameters that are frozen now stay frozen.
        images: Training scenes, [N, (C,) H, H], on any device. They move to the model's device if
            they take less than half of its free memory, and otherwise batch by batch. With several
            processes, each one trains on its shard of them.
        held_out: Scenes to evaluate on.
        settings: How to train; the batch size is that of all processes together.
        compiler: For a compiled step; see `CompiledSVI`.
        spot_images: Training scenes in which spots are looked for, which may be larger, and their
            indices; see `Scenes.spot_images`. None for those that it trains on.

    Raises:
        ValueError: If the settings do not fit each other, the model or the processes, or if there
            are images that `AIR.to_images` cannot take.
    """

    def __init__(
        self,
        air: AIR,
        images: Tensor,
        held_out: HeldOut,
        settings: TrainingSettings,
        compiler: Compiler = inductor,
        spot_images: tuple[Array, Array] | None = None,
    ) -> None:
        if settings.batch_size % world_size():
            raise SettingError(
                "batch_size",
                f"expected a multiple of the number of processes, {world_size()}, got "
                f"{settings.batch_size}",
            )
        if len(images) < world_size() and settings.num_steps > 0:
            raise ValueError(
                f"expected at least {world_size()} training scenes, one per process, got "
                f"{len(images)}"
            )
        # Here and not at each step, because to read the values waits for the device.
        air.check_images(images)
        held_out = check_scenes(air, held_out)
        self.air = air
        self.images = to_device(shard(images), air.h_init.device)
        self.held_out = held_out
        self.settings = settings
        self.batch_size = settings.batch_size // world_size()  # of this process
        self.optimizer = make_optimizer(
            air, settings.learning_rate, settings.baseline_learning_rate, settings.clip_grad_norm
        )
        self.stats = StepStats(air.h_init.device)

        def make_svi(model: Any, guide: Any, compile: bool | None = settings.compile) -> SVI:  # noqa: ANN401
            arguments = model, guide, self.optimizer, TraceGraph_ELBO()
            svi = CompiledSVI(*arguments, compiler, air) if compile else SVI(*arguments)
            svi.stats = self.stats
            return svi

        self.phases = make_phases(air, settings, images, make_svi, spot_images)
        self.prior = make_count_prior(settings, air)
        self.step = 0
        self.seconds = 0.0  # of training, without evaluations and pictures
        self.stop_requested = False  # in this process
        self.stopped = False  # by a request, in all processes at the same step
        self.miscounted: list[int] = []  # some scenes of the last evaluation
        self._rate_factor = 1.0  # of the learning rates that the optimiser has now

    def train(self) -> Iterator[Event]:
        """Takes the remaining steps, or those until `request_stop`, and yields events.

        At every event, and after an error, the state is complete and can be saved. All ranks yield
        the same events.

        Raises:
            FloatingPointError: If too many steps in a row had to be skipped.
        """
        settings = self.settings
        if self.step == 0 < settings.num_steps:
            yield SnapshotDue(0)
        start, since, since_step = time.perf_counter(), self.seconds, self.step
        self.stopped = any_rank(self.stop_requested)
        while not (self.finished or self.stopped):
            self._take_step()
            last = self.finished
            progress = last or is_due(self.step, settings.progress_every)
            evaluation = not last and is_due(self.step, settings.eval_every)
            checkpoint = not last and is_due(self.step, settings.save_every)
            snapshot = evaluation or checkpoint or (not last and is_early(self.step))
            sync = progress or snapshot or is_due(self.step, SYNC_EVERY)
            if sync or world_size() == 1:
                self.stopped = any_rank(self.stop_requested)
            if not (sync or self.stopped):
                continue
            stuck = self.stats.skipped_in_a_row >= MAX_SKIPPED  # waits for the device
            self.seconds += time.perf_counter() - start
            if progress or stuck:
                yield self._progress(self.step - since_step, self.seconds - since)
                since, since_step = self.seconds, self.step
            if stuck:
                raise self._not_finite_error()
            if evaluation:
                yield self.evaluate(settings.eval_scenes)
            if snapshot:
                yield SnapshotDue(self.step)
            if checkpoint:
                yield CheckpointDue(self.step)
            self.stopped = self.stopped or any_rank(self.stop_requested)
            start = time.perf_counter()
        if self.finished:
            yield CheckpointDue(self.step)  # before an evaluation that may take minutes
            yield self.evaluate(len(self.held_out.images))
            yield SnapshotDue(self.step)

    def request_stop(self) -> None:
        """Ends training after the present step; with several ranks, at most `SYNC_EVERY` later."""
        self.stop_requested = True

    @property
    def finished(self) -> bool:
        """Whether the last step was taken."""
        return self.step >= self.settings.num_steps

    def _take_step(self) -> None:
        if world_size() > 1:  # so that a resumed run is exact without the state of every rank
            torch.manual_seed(seed_of_step(self.settings.seed, self.step))
        self.prior.set_step(self.step + 1)
        self._set_learning_rates()
        size = {"batch_size": self.batch_size}
        self.phase.take_step(self.step, self.images, **size, z_pres_prior_p=self.prior)
        self.step += 1
        begin = self.settings.learn_count_prior_from
        if begin is not None and self.step >= begin and is_due(self.step, LEARN_PRIOR_EVERY):
            self._learn_count_prior()

    @property
    def phase(self) -> Phase:
        """The phase of the next step."""
        return [phase for phase in self.phases if phase.begin <= self.step][-1]

    def _not_finite_error(self) -> FloatingPointError:
        name = first_not_finite(self.air, self.images, self.prior)
        return FloatingPointError(
            f"{name} and with it the loss or its gradients were not finite for "
            f"{self.stats.skipped_in_a_row} steps in a row"
        )

    def _learn_count_prior(self) -> None:
        """Sets p(n) to the mean of q(n), which maximises the ELBO for the present guide.

        The mean is over scenes spread evenly over the data, which may be sorted.
        """
        num_scenes = LEARN_PRIOR_SCENES // world_size()
        scenes = self.images[:: -(-len(self.images) // num_scenes)]
        probs = torch.tensor(mean_count_probs(self.air, scenes), dtype=torch.float64)
        sum_over_ranks(probs)
        self.prior.learn((probs / world_size()).tolist())

    def _progress(self, steps: int, seconds: float) -> Progress:
        elbo, grad_norm, skipped = self.stats.read()
        rate = steps / max(seconds, 1e-9)
        return Progress(
            step=self.step,
            elbo=elbo,
            skipped=skipped,
            grad_norm=grad_norm,
            learning_rate=self.settings.learning_rate * self._rate_factor,
            z_pres_prior_p=list(self.prior.now),
            images_per_second=rate * min(self.batch_size, len(self.images)) * world_size(),
            steps_per_second=rate,
            seconds=self.seconds,
        )

    def _set_learning_rates(self) -> None:
        factor = learning_rate_factor(self.settings.lr_schedule, self.step, self.settings.num_steps)
        if factor == self._rate_factor:  # writing to the device takes time
            return
        self._rate_factor = factor
        rates = self.settings.learning_rate, self.settings.baseline_learning_rate
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"].fill_(rate * factor)

    def evaluate(self, num_scenes: int, **options: Any) -> Evaluated:  # noqa: ANN401
        """Evaluates on the first held-out scenes, under the prior at the present step.

        Args:
            num_scenes: The number of scenes.
            options: ``iwae_samples``, ``iwae_scenes`` and ``refine`` of `evaluate`.
        """
        scenes, seed = self.held_out.first(num_scenes), self.settings.seed
        result = evaluate(self.air, scenes, self.prior, seed=seed, **options)
        empty = empty_canvas_elbo(self.air, scenes.images)
        self.miscounted = result.counts.miscounted if result.counts else []
        late = self.step >= self.settings.alarm_after
        alarm = collapse_alarm(result, empty) if late else None
        return Evaluated(self.step, len(scenes.images), result, empty, alarm)

    def state_dict(self) -> dict[str, Any]:
        """All that an exact continuation needs: tensors and plain values."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "miscounted": self.miscounted,
            "presence": list(self.prior.now),
            "learnt_prior": self.prior.learnt,
            "tally": self.stats.state_dict(),
            "frozen": self._frozen_names(),
            "model": self.air.state_dict(),
            "teacher": self._teacher and self._teacher.air.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **self._random_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state that `state_dict` returned.

        Raises:
            ValueError: If it is the state of another model, or other parameters were frozen.
        """
        if (expected := state["frozen"]) != (given := self._frozen_names()):
            raise ValueError(
                "expected the same frozen parameters (requires_grad=False) as in the saved run, "
                f"{', '.join(expected) or 'none'}, got {', '.join(given) or 'none'}"
            )
        if not all(index < len(self.held_out.images) for index in state["miscounted"]):
            raise ValueError("miscounted scenes are not among the held-out scenes")
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.miscounted = list(state["miscounted"])
        self.stats.load_state_dict(state["tally"])
        self.air.load_state_dict(state["model"])
        if self._teacher:
            self._teacher.air.load_state_dict(state["teacher"])
        # The parameter groups follow from the settings and the device.
        groups = self.optimizer.state_dict()["param_groups"]
        moments = state["optimizer"]["state"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        for parameter, its_moments in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):  # a fused Adam reads memory without a check
                moment = its_moments[name]
                if moment.shape != parameter.shape or not moment.is_contiguous():
                    raise ValueError(f"the optimiser's {name} is not of the shape of its weight")
        self._rate_factor = math.nan
        self.prior.set_step(self.step)
        if (learnt_prior := state.get("learnt_prior")) is not None:
            self.prior.learn(learnt_prior)
        self._restore_random_state(state)

    @property
    def _teacher(self) -> Teacher | None:
        return self.phases[-1].teacher

    def _frozen_names(self) -> list[str]:
        """The names of the parameters that the optimiser does not hold."""
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return [name for name, p in self.air.named_parameters() if id(p) not in held]

    def _random_state(self) -> dict[str, Any]:
        """The state of the random number generators of the CPU and of the model's device."""
        device = self.air.h_init.device
        state: dict[str, Any] = {"rng": torch.get_rng_state(), "cuda_rng": None}
        if device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(device)
        elif device.type == "mps":
            state["mps_rng"] = torch.mps.get_rng_state()
        return state

    def _restore_random_state(self, state: dict[str, Any]) -> None:
        """Restores the generator of the CPU, and that of the device if it was saved."""
        torch.set_rng_state(state["rng"])
        device = self.air.h_init.device
        if device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], device)
        elif device.type == "mps" and state.get("mps_rng") is not None:
            torch.mps.set_rng_state(state["mps_rng"])


def make_count_prior(settings: TrainingSettings, air: AIR) -> CountPrior:
    """The prior over the count with which training begins.

    Raises:
        SettingError: If the settings do not fit the model.
    """
    if settings.count_prior is not None:
        if (given := len(settings.count_prior)) != (expected := air.num_steps + 1):
            raise SettingError(
                "count_prior",
                f"expected {expected} numbers, p(0) to p({air.num_steps}), got {given}",
            )
        probs = presence_from_counts(settings.count_prior)
    elif settings.z_pres_prior_raw:
        probs = [settings.z_pres_prior] * air.num_steps
    else:
        probs = geometric_presence(settings.z_pres_prior, air.num_steps)
    return CountPrior(
        probs,
        settings.anneal_prior,
        settings.anneal_prior_to,
        settings.anneal_prior_begin,
        settings.anneal_prior_duration,
        air.h_init.device,
    )


def to_device(images: Tensor, device: torch.device) -> Tensor:
    """Moves images to a device, unless they would take more than half of a GPU's free memory."""
    if device.type == "cuda" and images.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return images
    return images.to(device)
