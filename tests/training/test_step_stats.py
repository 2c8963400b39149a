"""Sums over steps: skipped ones count as skipped, and as nothing else."""

import math

import pytest
import torch

from air.training.step_stats import StepStats


def test_sums_by_hand() -> None:
    stats = StepStats(torch.device("cpu"))
    for elbo, norm, skipped in [(1.0, 2.0, False), (math.nan, math.inf, True), (3.0, 6.0, False)]:
        stats.add(torch.tensor(elbo), torch.tensor(norm), torch.tensor(skipped))
    assert stats.read() == (2.0, 4.0, 1)
    assert stats.steps == 0


def test_skipped_steps_skipped_in_a_row_outlast_a_reading() -> None:
    stats = StepStats(torch.device("cpu"))
    rows = []
    for skipped in (True, True, False, True, True, True):
        stats.add(torch.tensor(math.nan), torch.tensor(math.nan), torch.tensor(skipped))
        rows.append(int(stats.skipped_in_a_row))
        stats.read()
    assert rows == [1, 2, 0, 1, 2, 3]


def test_no_step_that_counted_has_no_mean() -> None:
    stats = StepStats(torch.device("cpu"))
    stats.add(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(True))
    elbo, norm, skipped = stats.read()
    assert math.isnan(elbo)
    assert math.isnan(norm)
    assert skipped == pytest.approx(1)
