"""The count prior and its annealing."""

import math
import operator
from itertools import accumulate

import pytest
import torch

from air.priors import (
    Annealing,
    CountPrior,
    count_log_probs,
    counts_from_presence,
    geometric_presence,
    presence_from_counts,
)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.01, 1e-9])
def test_the_counts_are_geometric(num_steps: int, ratio: float) -> None:
    presence = geometric_presence(ratio, num_steps)
    assert len(presence) == num_steps
    p, reached = [], 1.0
    for q in presence:
        p.append(reached * (1 - q))
        reached *= q
    p.append(reached)
    assert sum(p) == pytest.approx(1)
    for n in range(num_steps + 1):  # the last terms are tiny: compare logarithms
        total = sum(ratio**j for j in range(num_steps + 1))
        assert math.log(p[n]) == pytest.approx(n * math.log(ratio) - math.log(total), abs=1e-6)


def at(step: int, kind: Annealing, start: float, end: float, begin: int, duration: int) -> float:
    prior = CountPrior([start], kind, end, begin, duration)
    prior.set_step(step)
    return prior.now[0]


@pytest.mark.parametrize(("kind", "middle"), [("lin", 0.5), ("exp", 0.4), ("none", 0.8)])
def test_a_prior_moves_from_start_to_end(kind: Annealing, middle: float) -> None:
    end = 0.8 if kind == "none" else 0.2
    values = [at(step, kind, 0.8, 0.2, 10, 20) for step in (0, 10, 20, 30, 99)]
    assert values == pytest.approx([0.8, 0.8, middle, end, end])


def test_a_prior_moves_in_place_until_it_is_learnt() -> None:
    """So that a captured step, which holds its tensors, sees the new values."""
    prior = CountPrior([0.5, 0.25], "lin", 0.0, 0, 100)
    first, second = prior(0), prior(1)
    prior.set_step(50)
    assert (float(first), float(second)) == (0.25, 0.125)
    prior.learn([1.0, 2.0, 1.0])
    assert prior.learnt == [1.0, 2.0, 1.0]
    prior.set_step(90)
    assert prior.now == presence_from_counts([1.0, 2.0, 1.0])
    assert [float(first), float(second)] == pytest.approx(prior.now)


def test_counts_and_continue_probabilities_are_inverse() -> None:
    for probs in ([0.5, 0.3, 0.2], [1.0, 1.0, 1.0, 1.0], [2.0, 1e-6, 3.0]):
        presence = presence_from_counts(probs)
        found = count_log_probs(torch.tensor(presence, dtype=torch.float64)).exp()
        expected = torch.tensor(probs, dtype=torch.float64)
        assert torch.allclose(found, expected / expected.sum())
    assert presence_from_counts([0.01**n for n in range(4)]) == pytest.approx(
        geometric_presence(0.01, 3)
    )
    for presence in ([0.9, 0.5, 0.1], [1e-4] * 3, [1.0, 1.0, 0.0]):
        assert presence_from_counts(counts_from_presence(presence)) == pytest.approx(
            presence, rel=1e-12
        )
    for wrong in ([], [1.0], [0.5, 0.0], [0.5, -1.0], [0.5, math.inf], [0.5, math.nan]):
        with pytest.raises(ValueError, match="the probabilities of the counts must be above zero"):
            presence_from_counts(wrong)


def test_probabilities_of_counts_equal_the_same_products_in_plain_python() -> None:
    for presence in ([], [0.3], [1.0, 0.0], [1e-4] * 3, torch.rand(40).double().tolist()):
        at_least = accumulate(presence, operator.mul, initial=1.0)
        stop = [*(1 - q for q in presence), 1.0]
        expected = [max(p * s, 1e-30) for p, s in zip(at_least, stop, strict=True)]
        assert counts_from_presence(presence) == expected, "to the last bit"
