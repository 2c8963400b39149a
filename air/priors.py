"""The prior over the number of objects n, and its form as one probability per step.

A distribution over n = 0..T and the T probabilities of one more object, p(n > t | n >= t), contain
the same information. The functions below convert one into the other.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from numbers import Real
from typing import Literal, get_args

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
    """Checks that a prior is a function.

    Raises:
        ValueError: If it is not.
    """
    if z_pres_prior_p is None or callable(z_pres_prior_p):
        return
    of_list = "; for a list, give its __getitem__" if isinstance(z_pres_prior_p, Sequence) else ""
    raise ValueError(
        "z_pres_prior_p: expected a function from a step to the probability of a further object, "
        f"got {z_pres_prior_p!r}{of_list}"
    )


def probs_of_steps(prior: PresencePrior, num_steps: int) -> list[float | Tensor]:
    """The probability of a further object at each step.

    Raises:
        ValueError: If the prior is no function, has no probability for a step, or one that is not
            in [0, 1].
    """
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
        # A tensor is not checked, for that would wait for the device.
        if not isinstance(prob, Tensor) and not (isinstance(prob, Real) and 0 <= prob <= 1):
            raise ValueError(
                f"z_pres_prior_p: expected a probability for step {step}, got {prob!r}"
            )
        probs.append(prob)
    return probs


def geometric_count_prior(ratio: float, num_steps: int) -> list[float]:
    """Per-step probabilities of the truncated geometric p(n) ∝ ratio^n, n = 0..num_steps.

    They are S_{t+1} / S_t, where S_t is the sum of ratio^j over j = t..num_steps. A ratio of one
    gives the uniform distribution.

    Raises:
        ValueError: If the ratio is not in (0, 1], or there is no step.
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


def continue_probs_from_counts(count_probs: Sequence[float]) -> list[float]:
    """Per-step probabilities of a given p(n), n = 0..T, which need not be normalised.

    They are S_{t+1} / S_t, where S_t is the sum of p(n) over n = t..T.

    Raises:
        ValueError: If a probability is not above zero and finite, or there are fewer than two.
    """
    if len(count_probs) < 2 or not all(0 < p < math.inf for p in count_probs):
        raise ValueError(
            f"the probabilities of the counts must be above zero, and two or more of them, "
            f"got {list(count_probs)}"
        )
    tails = [*accumulate(reversed(count_probs))][::-1]
    return [after / here for here, after in pairwise(tails)]


def count_probs(presence: Sequence[float]) -> list[float]:
    """p(n), n = 0..T, from per-step probabilities; the inverse of `continue_probs_from_counts`."""
    continue_probs = torch.tensor([float(p) for p in presence], dtype=torch.float64)
    return [max(float(p), MIN_COUNT_PROB) for p in count_probs_from_continue(continue_probs)]


def count_probs_from_continue(continue_probs: Tensor) -> Tensor:
    """The distribution over counts that follows from per-step probabilities.

    Args:
        continue_probs: q_t, the probability of a t-th object given t - 1 objects, [..., T].

    Returns:
        q(n) = (1 - q_{n+1}) q_1 ... q_n for n = 0..T, [..., T + 1].
    """
    one = continue_probs.new_ones(*continue_probs.shape[:-1], 1)
    at_least = torch.cat((one, continue_probs.cumprod(-1)), -1)  # q(n >= t)
    return at_least * torch.cat((1 - continue_probs, one), -1)


def count_log_probs(continue_probs: Tensor) -> Tensor:
    """The logarithm of `count_probs_from_continue`, for the ELBO.

    The q_t are clamped away from zero and one, as ``Bernoulli`` does, so that every logarithm is
    finite.
    """
    clamped = clamp_probs(continue_probs)
    at_least = torch.log(clamped).cumsum(-1)  # log q(n >= t)
    zero = torch.zeros_like(clamped[..., :1])
    return torch.cat((zero, at_least), -1) + torch.cat((torch.log1p(-clamped), zero), -1)


def at_least_probs(count_probs: Tensor) -> Tensor:
    """q(n >= t), the probability of a t-th object, t = 1..T, [..., T], from q(n), [..., T + 1]."""
    return count_probs.flip(-1).cumsum(-1).flip(-1)[..., 1:]


def anneal(
    initial: float, final: float, begin: int, duration: int, kind: Annealing, step: int
) -> float:
    """The annealed value at an optimisation step.

    It is `initial` up to step `begin`, then moves linearly ("lin") or exponentially ("exp") to
    `final` within `duration` steps, and stays there.
    """
    if kind == "none":
        return initial
    fraction = min(max((step - begin) / duration, 0.0), 1.0)
    if kind == "lin":
        return initial + fraction * (final - initial)
    return initial * (final / initial) ** fraction


class AnnealedPresencePrior:
    """The presence prior during training: a callable from step t to a probability.

    `set_step` overwrites the tensor of probabilities in place. The model therefore gets the same
    object at every optimisation step, and a traced model (``--jit``) sees the new values without
    being traced again.
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
        if kind not in get_args(Annealing):
            raise ValueError(f"kind must be one of {get_args(Annealing)}, got {kind!r}")
        if not all(0 <= p <= 1 for p in (*probs, final)) or duration < 1:
            raise ValueError(
                "expected probabilities in [0, 1] and a duration of one step or more, "
                f"got {list(probs)}, final {final} and duration {duration}"
            )
        self.kind: Annealing = kind
        self.initial = tuple(probs)
        self.final, self.begin, self.duration = final, begin, duration
        self.probs = torch.tensor(self.initial, device=device)
        self.now = list(self.initial)

    def set_step(self, step: int) -> None:
        """Sets the probabilities of an optimisation step, counted from one."""
        if self.kind == "none":
            return
        args = self.final, self.begin, self.duration, self.kind, step
        self._set([anneal(p, *args) for p in self.initial])

    def set_probs(self, probs: Sequence[float]) -> None:
        """Sets the probabilities for the rest of training, and ends annealing."""
        self.kind = "none"
        self._set(probs)

    def _set(self, now: Sequence[float]) -> None:
        if now != self.now:  # a write to the device takes time
            for prob, value in zip(self.probs, now, strict=True):
                prob.fill_(value)
        self.now = list(now)

    def __call__(self, t: int) -> Tensor:
        return self.probs[t]
