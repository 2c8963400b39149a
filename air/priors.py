"""The prior over the number of objects n, and its form as one probability per step.

A distribution over n = 0..T, and the T *presence probabilities* p(z_pres_t = 1 | z_pres_{t-1} = 1)
of one more object, contain the same information. The functions below convert one into the other,
and raise a ValueError for numbers that are no probabilities.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from numbers import Real
from typing import Literal

import torch
from torch import Tensor
from torch.distributions.utils import clamp_probs

Annealing = Literal["none", "lin", "exp"]
PresencePrior = Callable[[int], float | Tensor]  # step t -> p(z_pres_t = 1 | z_pres_{t-1} = 1)

# Each further object is 10,000 times less likely a priori. This costs 9.2 nats, far fewer than the
# 200 nats or so that a digit explains. With 0.01, the ratio of Pyro's tutorial, one of six seeds
# learnt to begin every scene with a blank object. With a probability of 0.5 per step, Pyro's
# default, the model ends up using every step.
DEFAULT_COUNT_RATIO = 1e-4
MIN_COUNT_PROB = 1e-30  # no count is impossible


def check_presence_prior(z_pres_prior_p: object) -> None:
    """Checks that a prior is a function."""
    if z_pres_prior_p is None or callable(z_pres_prior_p):
        return
    of_list = "; for a list, give its __getitem__" if isinstance(z_pres_prior_p, Sequence) else ""
    raise ValueError(
        "z_pres_prior_p: expected a function from a step to the probability of a further object, "
        f"got {z_pres_prior_p!r}{of_list}"
    )


def presence_probs(prior: PresencePrior, num_steps: int) -> list[float | Tensor]:
    """The presence probability of each step."""
    check_presence_prior(prior)
    probs: list[float | Tensor] = []
    for step in range(num_steps):
        try:
            prob = prior(step)
        except LookupError as error:
            raise ValueError(
                f"z_pres_prior_p: expected a probability for each of {num_steps} steps, got none "
                f"for step {step}"
            ) from error
        # A tensor is not checked, because that would wait for the device.
        if not isinstance(prob, Tensor) and not (isinstance(prob, Real) and 0 <= prob <= 1):
            raise ValueError(
                f"z_pres_prior_p: expected a probability for step {step}, got {prob!r}"
            )
        probs.append(prob)
    return probs


def geometric_presence(ratio: float, num_steps: int) -> list[float]:
    """Presence probabilities of the truncated geometric p(n) ∝ ratio^n, n = 0..num_steps.

    They are S_{t+1} / S_t, where S_t is the sum of ratio^j over j = t..num_steps. The ratio is in
    (0, 1]; a ratio of one gives the uniform distribution.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"the ratio of the count prior must be in (0, 1], got {ratio}")
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    # S_t / ratio^t, computed from the last step backwards, does not underflow.
    tails = [1.0]
    for _ in range(num_steps):
        tails.append(1.0 + ratio * tails[-1])
    tails.reverse()
    return [ratio * after / here for here, after in pairwise(tails)]


def presence_from_counts(count_probs: Sequence[float]) -> list[float]:
    """Presence probabilities of a given p(n) > 0, n = 0..T, which need not be normalised.

    They are S_{t+1} / S_t, where S_t is the sum of p(n) over n = t..T.
    """
    if len(count_probs) < 2 or not all(0 < p < math.inf for p in count_probs):
        raise ValueError(
            f"the probabilities of the counts must be above zero, and two or more of them, "
            f"got {list(count_probs)}"
        )
    tails = [*accumulate(reversed(count_probs))][::-1]
    return [after / here for here, after in pairwise(tails)]


def counts_from_presence(presence: Sequence[float]) -> list[float]:
    """p(n), n = 0..T, each at least `MIN_COUNT_PROB`; the inverse of `presence_from_counts`."""
    reached = [1.0, *accumulate(map(float, presence), lambda a, b: a * b)]  # p(n >= t)
    stops = [*(1 - float(p) for p in presence), 1.0]
    return [max(r * s, MIN_COUNT_PROB) for r, s in zip(reached, stops, strict=True)]


def count_log_probs(presence: Tensor) -> Tensor:
    """The logarithm of the distribution over counts that presence probabilities define.

    The probabilities are clamped away from zero and one, as ``Bernoulli`` does, so that every
    logarithm is finite.

    Args:
        presence: q_t, the probability of a t-th object given t - 1 objects, [..., T].

    Returns:
        log q(n), where q(n) = (1 - q_{n+1}) q_1 ... q_n, for n = 0..T, [..., T + 1].
    """
    clamped = clamp_probs(presence)
    at_least = torch.log(clamped).cumsum(-1)  # log q(n >= t)
    zero = torch.zeros_like(clamped[..., :1])
    return torch.cat((zero, at_least), -1) + torch.cat((torch.log1p(-clamped), zero), -1)


def at_least_probs(count_probs: Tensor) -> Tensor:
    """q(n >= t), the probability of a t-th object, t = 1..T, [..., T], from q(n), [..., T + 1]."""
    return count_probs.flip(-1).cumsum(-1).flip(-1)[..., 1:]


@dataclass(eq=False)  # it is a key of compiled steps
class CountPrior:
    """The prior p(n) of training, which can move; a callable, step t -> presence probability.

    Each presence probability has its initial value up to optimisation step `begin`, then moves
    linearly ("lin") or exponentially ("exp") to `end` within `duration` steps, and stays there. A
    prior that is learnt, by `learn`, no longer moves by itself.

    The model gets the same object at every optimisation step, and a change overwrites the tensor of
    probabilities in place, so that a captured step sees the new values.
    """

    start: Sequence[float]  # of each step; see `geometric_presence` and `presence_from_counts`
    kind: Annealing = "none"  # how to move; "none" for a prior that stays
    end: float = 1e-7  # the presence probability of every step after the move
    begin: int = 0  # optimisation step at which the move begins
    duration: int = 100_000  # optimisation steps that the move takes
    device: torch.device | str = "cpu"  # the model's

    def __post_init__(self) -> None:
        self.now = list(self.start)  # the presence probability of each step at present
        self.learnt: list[float] | None = None  # the p(n), n = 0..T, given to `learn`
        self._probs = torch.tensor(self.start, device=self.device)

    def set_step(self, step: int) -> None:
        """Moves the prior to an optimisation step, counted from one."""
        if self.kind == "none" or self.learnt is not None:
            return
        fraction = min(max((step - self.begin) / self.duration, 0.0), 1.0)
        if self.kind == "lin":
            self._set([p + fraction * (self.end - p) for p in self.start])
        else:
            self._set([p * (self.end / p) ** fraction for p in self.start])

    def learn(self, count_probs: Sequence[float]) -> None:
        """Sets p(n), n = 0..T, for the rest of training."""
        self._set(presence_from_counts(count_probs))
        self.learnt = list(count_probs)

    def _set(self, now: Sequence[float]) -> None:
        if now != self.now:  # a write to the device takes time
            for prob, value in zip(self._probs, now, strict=True):
                prob.fill_(value)
        self.now = list(now)

    def __call__(self, t: int) -> Tensor:
        return self._probs[t]
