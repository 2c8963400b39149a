"""Schedules: learning rates, and the steps at which something is due."""

import math
from typing import Literal

Schedule = Literal["constant", "cosine"]


def learning_rate_factor(schedule: Schedule, step: int, num_steps: int) -> float:
    """The factor of the learning rates at a step; "cosine" falls from 1 to 0.01."""
    if schedule == "constant":
        return 1.0
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def is_due(step: int, every: int) -> bool:
    """Whether an action that runs every so many steps runs at this one; never for 0."""
    return every > 0 and step % every == 0


def is_early(step: int) -> bool:
    """Whether the step is 10, 20, 50, 100, ...: most is learnt at the beginning."""
    return step >= 10 and str(step).rstrip("0") in ("1", "2", "5")
