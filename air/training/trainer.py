"""The training loop: steps, evaluations, and the state that a checkpoint keeps. Prints nothing."""

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from pyro.infer import JitTraceGraph_ELBO, TraceGraph_ELBO
from torch import Tensor

from air.air import AIR
from air.evaluation.collapse import (
    collapse_alarm,
    empty_canvas_elbo,
    first_not_finite,
)
from air.evaluation.metrics import HeldOut, check_scenes, evaluate
from air.inference import mean_count_probs
from air.marginal import MarginalAIR
from air.priors import (
    AnnealedPresencePrior,
    continue_probs_from_counts,
    geometric_count_prior,
)
from air.settings import SettingError
from air.training.added_scenes import AddedScenes
from air.training.background_first import background_svi
from air.training.compiled_svi import CompiledSVI, Compiler, inductor
from air.training.events import CheckpointDue, Evaluated, Event, Progress, SnapshotDue
from air.training.parallel import SINGLE_PROCESS, ProcessGroup
from air.training.schedules import is_due, is_early, learning_rate_factor
from air.training.settings import (
    LEARN_PRIOR_EVERY,
    LEARN_PRIOR_SCENES,
    TrainingSettings,
    local_batch_size,
)
from air.training.svi import SVI, make_optimizer

MAX_SKIPPED = 20  # skipped steps in a row that end training
# Steps, at most, between looks at the device and at the other ranks. Under NCCL only such a look
# finds out that a rank has ended, and until then steps are queued for the device.
SYNC_EVERY = 25


class Trainer:
    """Trains an AIR by SVI.

    Args:
        air: The model, on the device to train on.
        images: Training scenes, [N, (C,) H, H], on the same device; with several processes, the
            shard of this process.
        held_out: Scenes to evaluate on.
        settings: How to train; the batch size is that of all processes together.
        group: The processes that train together.
        compiler: For a compiled step; see `CompiledSVI`.

    Raises:
        ValueError: If the settings do not fit each other, the model or the processes, if there are
            images that `AIR.to_images` cannot take, or if every parameter is frozen.
    """

    def __init__(
        self,
        air: AIR,
        images: Tensor,
        held_out: HeldOut,
        settings: TrainingSettings,
        group: ProcessGroup = SINGLE_PROCESS,
        compiler: Compiler = inductor,
    ) -> None:
        if settings.num_steps > 0 and not len(images):
            raise ValueError(f"there are fewer scenes than processes, {group.world_size}")
        # Here and not at each step, because to read the values waits for the device.
        air.check_images(images)
        held_out = check_scenes(air, held_out)
        if settings.num_steps > 0:
            check_trainable(air, settings)
        self.air = air
        self.images = images
        self.held_out = held_out
        self.settings = settings
        self.group = group
        self.batch_size = local_batch_size(settings.batch_size, group.world_size)
        self.optimizer = make_optimizer(
            air, settings.learning_rate, settings.baseline_learning_rate, settings.clip_grad_norm
        )
        elbo = JitTraceGraph_ELBO(ignore_jit_warnings=True) if settings.jit else TraceGraph_ELBO()
        self.added_scenes = AddedScenes(air) if settings.added_scenes > 0 else None
        program = MarginalAIR(air, self.added_scenes) if settings.estimator == "marginal" else air
        arguments = program.model, program.guide, self.optimizer, elbo
        self.svi = (
            CompiledSVI(*arguments, compiler=compiler, all_reduce=group.all_reduce)
            if settings.compile
            else SVI(*arguments, all_reduce=group.all_reduce)
        )
        self.first_svi = background_svi(air, self.svi, settings)
        self.prior = make_count_prior(settings, air)
        self.learnt_prior: list[float] | None = None  # p(n)
        self.step = 0
        self.seconds = 0.0  # of training, without evaluations and pictures
        self.stop_requested = False  # in this process
        self.stopped = False  # in all processes, by request
        self.miscounted: list[int] = []  # some scenes of the last evaluation
        self.stats = self.svi.stats
        self._rate_factor = 1.0  # of the learning rates that the optimiser has now
        self._random_states: list[dict[str, Any]] = []  # of the other ranks
        self._has_random_state = group.world_size == 1  # whether this rank's own is restored

    def train(self) -> Iterator[Event]:
        """Takes the remaining steps, or those until `stop_requested`, and yields events.

        At every event, and after an error, the state is whole and can be saved. Only rank 0
        evaluates; the other ranks wait for it.

        Raises:
            FloatingPointError: If too many steps in a row had to be skipped.
        """
        settings, is_main = self.settings, self.group.is_main
        if self.step == 0 < settings.num_steps:
            yield SnapshotDue(0)
        if not self._has_random_state:
            torch.manual_seed(self.group.seed(settings.seed, self.step))
        start, since, since_step = time.perf_counter(), self.seconds, self.step
        self.stopped = self.group.any(self.stop_requested)
        while not (self.finished or self.stopped):
            self._take_step()
            last = self.finished
            progress = last or is_due(self.step, settings.progress_every)
            evaluation = not last and is_due(self.step, settings.eval_every)
            checkpoint = not last and is_due(self.step, settings.save_every)
            snapshot = evaluation or checkpoint or (not last and is_early(self.step))
            sync = progress or snapshot or is_due(self.step, SYNC_EVERY)
            if sync or self.group.world_size == 1:  # all ranks stop at the same step
                self.stopped = self.group.any(self.stop_requested)
            if not (sync or self.stopped):
                continue
            stuck = self.stats.skipped_in_a_row >= MAX_SKIPPED  # waits for the device
            self.seconds += time.perf_counter() - start
            if snapshot or last or stuck or self.stopped:  # the state may be saved
                self._random_states = self.group.all_gather(self._random_state())[1:]
            if progress or stuck:
                yield self._progress(self.step - since_step, self.seconds - since)
                since, since_step = self.seconds, self.step
            if stuck:
                raise self._not_finite_error()
            if evaluation and is_main:
                yield self.evaluate(settings.eval_scenes)
            if snapshot:
                yield SnapshotDue(self.step)
            if checkpoint:
                yield CheckpointDue(self.step)
            self.stopped = self.stopped or self.group.any(self.stop_requested)
            start = time.perf_counter()
        if self.finished:
            yield CheckpointDue(self.step)  # before an evaluation that may take minutes
            if is_main:
                yield self.evaluate(len(self.held_out.images))
            yield SnapshotDue(self.step)

    def request_stop(self) -> None:
        """Ends training after the present step, or with several ranks after some more."""
        self.stop_requested = True

    @property
    def finished(self) -> bool:
        """Whether the last step was taken."""
        return self.step >= self.settings.num_steps

    def _take_step(self) -> None:
        self.prior.set_step(self.step + 1)
        self._set_learning_rates()
        if self.added_scenes:
            self.added_scenes.before_step(self.step, self.settings)
        svi = self.first_svi if self.step < self.settings.background_steps else self.svi
        svi.step_async(self.images, batch_size=self.batch_size, z_pres_prior_p=self.prior)
        if self.added_scenes:
            self.added_scenes.update_teacher()
        self.step += 1
        begin = self.settings.learn_count_prior_from
        if begin is not None and self.step >= begin and is_due(self.step, LEARN_PRIOR_EVERY):
            self._learn_count_prior()

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
        num_scenes = LEARN_PRIOR_SCENES // self.group.world_size
        scenes = self.images[:: -(-len(self.images) // num_scenes)]
        of_ranks = self.group.all_gather(mean_count_probs(self.air, scenes))
        self.learnt_prior = [sum(probs) / len(probs) for probs in zip(*of_ranks, strict=True)]
        self.prior.set_probs(continue_probs_from_counts(self.learnt_prior))

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
            images_per_second=rate * min(self.batch_size, len(self.images)) * self.group.world_size,
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
        self.miscounted = result.miscounted or []
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
            "learnt_prior": self.learnt_prior,
            "tally": self.stats.state_dict(),
            "frozen": frozen_names(self.air),
            "optimized": self._optimized_names(),
            "model": self.air.state_dict(),
            "teacher": self.added_scenes and self.added_scenes.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **self._random_state(),
            "streams": self._random_states,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state that `state_dict` returned.

        Raises:
            ValueError: If it is the state of another model, or other parameters were frozen.
        """
        frozen = state.get("frozen", [])  # an earlier program wrote no such entry
        if frozen != (now := frozen_names(self.air)):
            raise ValueError(
                "the same parameters must be frozen (requires_grad) as when the state was saved: "
                f"expected {_first(frozen)}, got {_first(now)}"
            )
        if not all(index < len(self.held_out.images) for index in state["miscounted"]):
            raise ValueError("miscounted scenes are not among the held-out scenes")
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.miscounted = list(state["miscounted"])
        self.stats.load_state_dict(state["tally"])
        self.air.load_state_dict(state["model"])
        if self.added_scenes:
            if not isinstance(state.get("teacher"), dict):
                raise ValueError("the state holds no teacher, which added_scenes needs")
            self.added_scenes.teacher.load_state_dict(state["teacher"])
        # A parameter that was frozen on the way keeps its moments.
        held = {*state.get("optimized", ())}
        held_ids = {id(p) for name, p in self.air.named_parameters() if name in held}
        self.optimizer.add(lambda parameter: id(parameter) in held_ids)
        # The parameter groups follow from the settings and the device.
        groups, names = self.optimizer.state_dict()["param_groups"], self._optimized_names()
        saved, saved_names = state["optimizer"]["state"], state.get("optimized", names)
        if len(saved_names) != sum(len(g["params"]) for g in state["optimizer"]["param_groups"]):
            raise ValueError("the optimiser's state is of another number of parameters")
        moments_of = {name: saved[i] for i, name in enumerate(saved_names) if i in saved}
        kept = {i: moments_of[name] for i, name in enumerate(names) if name in moments_of}
        self.optimizer.load_state_dict({"state": kept, "param_groups": groups})
        for parameter, moments in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):  # a fused Adam reads memory without a check
                if moments[name].shape != parameter.shape or not moments[name].is_contiguous():
                    raise ValueError(f"the optimiser's {name} is not of the shape of its weight")
        self._rate_factor = math.nan
        self.prior.set_step(self.step)
        if (learnt_prior := state.get("learnt_prior")) is not None:
            self.learnt_prior = list(learnt_prior)
            self.prior.set_probs(continue_probs_from_counts(self.learnt_prior))
        self._restore_random_state(state)

    def _optimized_names(self) -> list[str]:
        """The names of the optimiser's parameters, in its order."""
        names = {id(parameter): name for name, parameter in self.air.named_parameters()}
        return [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]

    def _random_state(self) -> dict[str, Any]:
        """The state of this rank's random number generators."""
        device = self.images.device
        state: dict[str, Any] = {"rng": torch.get_rng_state(), "cuda_rng": None}
        if device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(device)
        elif device.type == "mps":
            state["mps_rng"] = torch.mps.get_rng_state()
        return state

    def _restore_random_state(self, state: dict[str, Any]) -> None:
        """Restores this rank's random state, if as many ranks saved theirs on such a device.

        Otherwise a single process continues with the state of rank 0, and several with new seeds.
        """
        states = [state, *state.get("streams", [])]
        device = self.images.device
        name = {"cuda": "cuda_rng", "mps": "mps_rng"}.get(device.type)
        is_whole = name is None or all(each.get(name) is not None for each in states)
        world_size = self.group.world_size
        self._has_random_state = len(states) == world_size and (is_whole or world_size == 1)
        self._random_states = states[1:] if self._has_random_state else []
        own = states[self.group.rank] if self._has_random_state else state
        torch.set_rng_state(own["rng"])
        if name == "cuda_rng" and own["cuda_rng"] is not None:
            torch.cuda.set_rng_state(own["cuda_rng"], device)
        elif name == "mps_rng" and own.get("mps_rng") is not None:
            torch.mps.set_rng_state(own["mps_rng"])


def frozen_names(air: AIR) -> list[str]:
    """The names of the parameters that are frozen."""
    return [name for name, parameter in air.named_parameters() if not parameter.requires_grad]


def check_trainable(air: AIR, settings: TrainingSettings) -> None:
    """Checks that there is a parameter to train.

    Raises:
        ValueError: If all that the estimator trains are frozen.
    """
    exact = settings.estimator == "marginal"  # it never uses the baseline
    unused = {id(parameter) for parameter in air.baseline_parameters()} if exact else set()
    if not any(p.requires_grad and id(p) not in unused for p in air.parameters()):
        raise ValueError(
            f"there is nothing to train: every parameter that --estimator {settings.estimator} "
            "trains is frozen; unfreeze some by requires_grad_(True)"
        )


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}" if names else "none"


def make_count_prior(settings: TrainingSettings, air: AIR) -> AnnealedPresencePrior:
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
        probs = continue_probs_from_counts(settings.count_prior)
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
