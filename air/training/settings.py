"""The settings of training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from air.priors import DEFAULT_COUNT_RATIO, Annealing
from air.settings import SettingError, check_settings, setting
from air.training.schedules import Schedule

Estimator = Literal["score", "marginal"]
MatmulPrecision = Literal["highest", "high", "medium"]  # of torch.set_float32_matmul_precision

LEARN_PRIOR_EVERY = 100  # steps
LEARN_PRIOR_SCENES = 1000


@dataclass(frozen=True)
class TrainingSettings:
    """How to train; the defaults are the best recipe known."""

    num_steps: int = setting(10_000, "optimisation steps", low=0, short="-n")
    batch_size: int = setting(64, "images in a step, of all processes together", low=1, short="-b")
    learning_rate: float = setting(1e-3, "learning rate of model and guide", above=0, short="-lr")
    baseline_learning_rate: float = setting(
        1e-2, "learning rate of the baseline's nets (score)", above=0, short="-blr"
    )
    lr_schedule: Schedule = setting(
        "constant", "both learning rates: constant, or falling to a hundredth at the last step"
    )
    clip_grad_norm: float | None = setting(
        None,
        "bound on the gradient of model and guide, for a cost in nats per image (default: none)",
        above=0,
    )
    estimator: Estimator = setting(
        "marginal",
        "estimator of the gradient through z_pres: score function with baselines, as in the "
        "paper, or the exact expectation over the count",
    )
    z_pres_prior: float = setting(
        DEFAULT_COUNT_RATIO, "ratio k of the count prior p(n) ∝ k^n", above=0, high=1
    )
    z_pres_prior_raw: bool = setting(
        False, "use --z-pres-prior as the probability of a further object at each step"
    )
    count_prior: Sequence[float] | None = setting(
        None,
        "p(0) p(1) ... p(--model-steps) up to a factor, in place of --z-pres-prior",
        above=0,
        length=(1, None),
        metavar="P",
    )
    learn_count_prior_from: int | None = setting(
        None,
        f"from this step on, every {LEARN_PRIOR_EVERY} steps, set p(n) to the mean of q(n) over up "
        f"to {LEARN_PRIOR_SCENES:,} training scenes (default: never; for when AIR counts well)",
        low=0,
        metavar="STEP",
    )
    anneal_prior: Annealing = setting(
        "none",
        "move the prior probabilities of z_pres during training, linearly or exponentially",
    )
    anneal_prior_to: float = setting(
        1e-7, "final prior probability (at least 1.2e-7, the rounding of float32)", above=0, high=1
    )
    anneal_prior_begin: int = setting(0, "step at which annealing begins", low=0)
    anneal_prior_duration: int = setting(100_000, "steps that annealing takes", low=1)
    added_scenes: float = setting(
        0.0,
        "weight of learning to count in sums of two scenes (marginal; 0: off)",
        low=0,
    )
    added_scenes_from: int = setting(
        2000, "first step that uses added scenes; AIR should count well by then", low=0
    )
    background_steps: int = setting(
        100,
        "first steps, in which a model of the background learns alone, without objects (none after "
        "--load)",
        low=0,
    )
    compile: bool | None = setting(
        None, "compile the step, a minute or two (default: if --num-steps is 5000 or more)"
    )
    matmul_precision: MatmulPrecision = setting(
        "highest",
        "of float32 matrix products, as in torch.set_float32_matmul_precision; medium is faster on "
        "CPUs with bfloat16",
    )
    jit: bool = setting(False, "trace the step once by torch.jit")
    seed: int = setting(
        0, "seed of the weights, the batches and the samples", low=0, high=2**32 - 1
    )
    progress_every: int = setting(10, "steps between progress records; 0: only the last", low=0)
    eval_every: int = setting(500, "steps between evaluations; 0: only at the end", low=0)
    eval_scenes: int = setting(
        2000, "held-out scenes in an evaluation; the last evaluation uses all", low=1
    )
    save_every: int = setting(1000, "steps between checkpoints; 0: only at the end", low=0)
    alarm_after: int = setting(1000, "steps before a sign of collapse is an alarm", low=0)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.added_scenes > 0 and (self.estimator != "marginal" or self.jit):
            # torch.jit would write their weight and the earlier guide into its trace.
            other = "jit" if self.jit else f"estimator {self.estimator}"
            raise SettingError("added_scenes", f"expected 0 with {other}, got {self.added_scenes}")
        annealed_at = self.anneal_prior_begin + self.anneal_prior_duration
        begin = self.learn_count_prior_from
        if begin is not None and self.anneal_prior != "none" and begin < annealed_at:
            raise SettingError(
                "learn_count_prior_from",
                f"expected at least {annealed_at}, where --anneal-prior ends, got {begin}",
            )
