"""Sums over steps: skipped ones count as skipped, and as nothing else."""

import math

import pytest
import torch

from air.training.step_stats import StepStats


def add(stats: StepStats, elbo: float, norm: float, skipped: bool) -> None:
    stats.sums.copy_(stats.with_step(*map(torch.tensor, (elbo, norm, skipped))))


def test_sums_by_hand() -> None:
    stats = StepStats(torch.device("cpu"))
    steps = [
        (1.0, 2.0, False),
        (math.nan, 1.0, True),
        (-math.inf, math.inf, True),
        (3.0, 6.0, False),
    ]
    for elbo, norm, skipped in steps:
        add(stats, elbo, norm, skipped)
    assert stats.read() == (2.0, 4.0, 2)
    assert stats.sums.tolist() == [0.0] * 5


def test_skipped_steps_skipped_in_a_row_outlast_a_reading() -> None:
    stats = StepStats(torch.device("cpu"))
    rows = []
    for skipped in (True, True, False, True, True, True):
        add(stats, math.nan, math.nan, skipped)
        rows.append(stats.skipped_in_a_row)
        stats.read()
    assert rows == [1, 2, 0, 1, 2, 3]


def test_no_step_that_counted_has_no_mean() -> None:
    stats = StepStats(torch.device("cpu"))
    add(stats, 1.0, 1.0, True)
    elbo, norm, skipped = stats.read()
    assert math.isnan(elbo)
    assert math.isnan(norm)
    assert skipped == pytest.approx(1)
