"""The settings of training."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from air.priors import DEFAULT_COUNT_RATIO, Annealing
from air.support.fields import SettingError, check_settings, setting
from air.training.objectives import OBJECTIVES
from air.training.schedules import Schedule

Objective = Literal["elbo", "iwae", "rws"]
Estimator = Literal["score", "marginal", "rloo", "mvd", "vimco"]

LEARN_PRIOR_EVERY = 100  # steps
LEARN_PRIOR_SCENES = 1000


_free = partial(setting, low=0, on_resume="free")


@dataclass(frozen=True)
class TrainingSettings:
    """How to train; the defaults are the best recipe known."""

    num_steps: int = _free(10_000, "training steps", short="-n", common=True)
    batch_size: int = setting(
        64, "images per step, over all processes", low=1, short="-b", common=True
    )
    learning_rate: float = setting(
        1e-3, "learning rate of model and guide", above=0, short="-lr", common=True
    )
    baseline_learning_rate: float = setting(
        1e-2, "learning rate of the baseline's nets (score estimator only)", above=0, short="-blr"
    )
    lr_schedule: Schedule = setting(
        "constant",
        "schedule of both learning rates: constant, or cosine decay to 1 % of the initial rate",
    )
    clip_grad_norm: float | None = setting(
        None,
        "maximum norm of the gradient of model and guide, for a loss in nats per image (default: "
        "no clipping)",
        above=0,
    )
    estimator: Estimator = setting(
        "marginal",
        "estimator of the gradient through z_pres: the exact expectation over the count, the score "
        "function with baselines, as in the paper, or one of those in air/training/objectives.py",
    )
    objective: Objective = setting(
        "elbo",
        "what to maximise: the ELBO, the importance-weighted bound, or that of reweighted "
        "wake-sleep; see --particles",
    )
    particles: int = setting(
        1, "samples of z for each image and step (not with --estimator score)", low=1
    )
    z_pres_prior: float = setting(
        DEFAULT_COUNT_RATIO,
        "ratio k of the count prior p(n) ∝ k^n",
        above=0,
        high=1,
        with_model=True,
        overrides=["count_prior", "z_pres_prior_raw"],
    )
    z_pres_prior_raw: bool = setting(
        False,
        "use --z-pres-prior as the probability of a further object at each step",
        group="compatibility with Pyro's example",
        with_model=True,
    )
    count_prior: Sequence[float] | None = setting(
        None,
        "count prior p(0) p(1) ... p(T), T as in --model-steps, which need not sum to 1; replaces "
        "--z-pres-prior",
        above=0,
        length=(1, None),
        metavar="P",
        with_model=True,
        overrides=["anneal_prior"],
    )
    learn_count_prior_from: int | None = setting(
        None,
        f"step from which p(n) is set to the mean of q(n) over up to {LEARN_PRIOR_SCENES:,} "
        f"training scenes, every {LEARN_PRIOR_EVERY} steps; AIR should count well by then "
        "(default: never)",
        low=0,
        metavar="STEP",
    )
    anneal_prior: Annealing = setting(
        "none", "change the prior of z_pres during training, linearly or exponentially"
    )
    anneal_prior_to: float = setting(
        1e-7, "probability of a further object at the end of --anneal-prior", above=0, high=1
    )
    anneal_prior_begin: int = setting(0, "step at which --anneal-prior begins", low=0)
    anneal_prior_duration: int = setting(100_000, "number of steps of --anneal-prior", low=1)
    added_scenes: float = setting(
        0.0,
        "weight of the counting loss on sums of two training scenes (not with --estimator "
        "score; 0 disables it)",
        low=0,
    )
    added_scenes_from: int = setting(
        2000, "first step with added scenes; AIR should count well by then", low=0, flag=""
    )
    spot_steps: int = setting(
        0, "steps for which the objects are those that a threshold sees", low=0, flag=""
    )
    compile: bool | None = setting(
        None,
        "compile the training step, which takes one to two minutes (default: if --num-steps is "
        "5000 or more)",
    )
    seed: int = setting(
        0, "seed of the weights, the batches and the samples", low=0, high=2**32 - 1, common=True
    )
    progress_every: int = _free(
        10, "steps between progress records; 0 for the last step only", group="output"
    )
    eval_every: int = _free(
        500,
        "steps between evaluations on held-out scenes; 0 for the last step only",
        group="evaluation",
    )
    eval_scenes: int = _free(
        2000, "held-out scenes in an evaluation; the last evaluation uses all", low=1, flag=""
    )
    save_every: int = _free(
        1000, "steps between checkpoints; 0 for the last step only", group="output"
    )
    alarm_after: int = _free(1000, "steps before the collapse check is active", flag="")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.added_scenes > 0 and self.estimator == "score":
            raise SettingError(
                "added_scenes", f"expected 0 with --estimator score, got {self.added_scenes}"
            )
        possible = [e for o, e in [*OBJECTIVES, ("elbo", "score")] if o == self.objective]
        if self.estimator not in possible:
            raise SettingError(
                "estimator",
                f"expected {' or '.join(possible)} with --objective {self.objective}, got "
                f"{self.estimator}",
            )
        if self.particles < 2 and self.estimator == "vimco":
            raise SettingError("particles", f"expected 2 or more with vimco, got {self.particles}")
        if self.particles > 1 and self.estimator == "score":
            raise SettingError("particles", f"expected 1 with score, got {self.particles}")
        annealed_at = self.anneal_prior_begin + self.anneal_prior_duration
        begin = self.learn_count_prior_from
        if begin is not None and self.anneal_prior != "none" and begin < annealed_at:
            raise SettingError(
                "learn_count_prior_from",
                f"expected at least {annealed_at}, where --anneal-prior ends, got {begin}",
            )
