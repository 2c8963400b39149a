"""The prior over the number of objects, as probabilities of going on for one more step."""

import math
import operator
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.distributions.utils import clamp_probs

Annealing = Literal["none", "lin", "exp"]
PresencePrior = Callable[[int], float | Tensor]  # step t -> p(z_pres_t = 1 | z_pres_{t-1} = 1)

# Each further object is 10,000 times less likely a priori, 9.2 nats, which is little beside the
# some 200 that a digit explains. At 0.01, the ratio of Pyro's tutorial, one of six seeds learnt
# to begin with a blank object; 0.5 for each step, Pyro's default, ends with every step used.
DEFAULT_COUNT_RATIO = 1e-4
RAREST = 1e-30  # that a count can be: never impossible


def geometric_count_prior(ratio: float, num_steps: int) -> list[float]:
    """Per-step probabilities of the truncated geometric p(n) ∝ ratio^n, n = 0..num_steps.

    With tail sums S_t = sum of ratio^j over j = t..num_steps these are S_{t+1} / S_t. A ratio of
    one gives the uniform distribution.

    Raises:
        ValueError: If the ratio is not in (0, 1].
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"the ratio of the count prior must be in (0, 1], got {ratio}")
    # From the last step backwards, S_t divided by ratio^t, so that nothing underflows.
    tails = [1.0]
    for _ in range(num_steps):
        tails.append(1.0 + ratio * tails[-1])
    tails.reverse()
    return [ratio * after / here for here, after in pairwise(tails)]


def continue_probs_from_counts(count_probs: Sequence[float]) -> list[float]:
    """Per-step probabilities of any p(n), n = 0..T, up to a factor: S_{t+1} / S_t, T of them.

    Raises:
        ValueError: If one is not above zero, or there is none but p(0).
    """
    if len(count_probs) < 2 or not all(0 < p < math.inf for p in count_probs):
        raise ValueError(
            f"the probabilities of the counts must be above zero, of 0 and more objects, "
            f"got {list(count_probs)}"
        )
    tails = [*accumulate(reversed(count_probs))][::-1]
    return [after / here for here, after in pairwise(tails)]


def count_probs(presence: Sequence[float]) -> list[float]:
    """p(n), n = 0..T, from per-step probabilities; the inverse of `continue_probs_from_counts`."""
    reached = accumulate(presence, operator.mul, initial=1.0)
    stops = [1 - p for p in presence] + [1.0]
    return [max(r * s, RAREST) for r, s in zip(reached, stops, strict=True)]


def count_log_probs(continue_probs: Tensor) -> Tensor:
    """The distribution over counts that follows from per-step probabilities.

    Args:
        continue_probs: q_t, the probability of a t-th object given t - 1 of them, [..., T].

    Returns:
        log q(n) = log(1 - q_{n+1}) + log q_1 + ... + log q_n for n = 0..T, [..., T + 1]. The q_t
        are kept off zero and one by their type's rounding, as ``Bernoulli`` does, so that no
        logarithm is infinite.
    """
    on = clamp_probs(continue_probs)
    reached = torch.log(on).cumsum(-1)  # log q(n >= t)
    zero = torch.zeros_like(on[..., :1])
    return torch.cat((zero, reached), -1) + torch.cat((torch.log1p(-on), zero), -1)


def at_least_probs(count_probs: Tensor) -> Tensor:
    """The probability that each object is there, q(n >= t) for t = 1..T, of q(n), [..., T + 1]."""
    return count_probs.flip(-1).cumsum(-1).flip(-1)[..., 1:]


def anneal(
    initial: float, final: float, begin: int, duration: int, kind: Annealing, step: int
) -> float:
    """The annealed value at an optimisation step.

    `initial` up to step `begin`, then linearly ("lin") or at a constant rate ("exp") to `final`,
    reached `duration` steps later and kept.
    """
    if kind == "none":
        return initial
    fraction = min(max((step - begin) / duration, 0.0), 1.0)
    if kind == "lin":
        return initial + fraction * (final - initial)
    return initial * (final / initial) ** fraction


class AnnealedPresencePrior:
    """The presence prior during training: a callable from step t to a probability.

    Its probabilities are one tensor which `set_step` overwrites in place. So the model is handed
    the same object at every optimisation step, and a traced model (``--jit``) sees new values
    without being traced again.
    """

    def __init__(
        self,
        probs: Sequence[float],
        kind: Annealing = "none",
        final: float = 1e-7,
        begin: int = 0,
        duration: int = 100_000,
        device: torch.device | str = "cpu",
    ) -> None:
        self.kind: Annealing = kind
        self.initial = tuple(probs)
        self.final, self.begin, self.duration = final, begin, duration
        self.probs = torch.tensor(self.initial, device=device)
        self.now = list(self.initial)

    def set_step(self, step: int) -> None:
        """Moves on to the given optimisation step, counted from one."""
        if self.kind == "none":
            return
        args = self.final, self.begin, self.duration, self.kind, step
        self._set([anneal(p, *args) for p in self.initial])

    def set_probs(self, probs: Sequence[float]) -> None:
        """Makes these the probabilities from now on: annealing, if any, is over."""
        self.kind = "none"
        self._set(probs)

    def _set(self, now: Sequence[float]) -> None:
        if now != self.now:  # writing to the device has its price
            for prob, value in zip(self.probs, now, strict=True):
                prob.fill_(value)
        self.now = list(now)

    def __call__(self, t: int) -> Tensor:
        return self.probs[t]
