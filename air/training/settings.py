"""How to train, and what follows from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from air.air import AIR
from air.priors import (
    DEFAULT_COUNT_RATIO,
    AnnealedPresencePrior,
    Annealing,
    continue_probs_from_counts,
    geometric_count_prior,
)
from air.training.ranks import Ranks
from air.training.schedules import Schedule

Estimator = Literal["score", "marginal"]


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


def make_presence_prior(settings: TrainingSettings, air: AIR) -> AnnealedPresencePrior:
    """The presence prior that training begins with.

    Raises:
        ValueError: If the settings of the prior do not fit each other, or the model.
    """
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


def share_of(settings: TrainingSettings, scenes: int, ranks: Ranks) -> int:
    """How many of the batch are this process's, which has so many scenes.

    Raises:
        ValueError: If the batch or the scenes cannot be shared.
    """
    batch_size = settings.batch_size
    if settings.num_steps > 0 and not scenes:
        raise ValueError(f"there are fewer scenes to train on than processes, {ranks.size}")
    if batch_size % ranks.size:
        raise ValueError(
            f"--batch-size is that of all processes together: expected a multiple of their number, "
            f"{ranks.size}, got {batch_size}"
        )
    return batch_size // ranks.size
