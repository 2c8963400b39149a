"""Learning rates, and when something is due."""

import pytest

from air.training.schedules import is_due, is_early, learning_rate_factor


def test_cosine_schedule_falls_from_one_to_a_hundredth() -> None:
    factors = [learning_rate_factor("cosine", step, 100) for step in range(101)]
    assert factors == sorted(factors, reverse=True)
    assert [factors[0], factors[50], factors[100]] == pytest.approx([1.0, 0.505, 0.01])
    assert learning_rate_factor("constant", 70, 100) == 1.0


def test_periods_and_early_steps() -> None:
    assert [step for step in range(1, 10) if is_due(step, 4)] == [4, 8]
    assert not any(is_due(step, 0) for step in range(10))
    assert [step for step in range(3000) if is_early(step)] == [
        10, 20, 50, 100, 200, 500, 1000, 2000,
    ]  # fmt: skip
