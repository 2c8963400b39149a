"""Batches contain every image equally often, and none twice where they divide the set."""

import pytest
import torch

from air.support.subsampling import draw_indices

CPU = torch.device("cpu")


@pytest.mark.parametrize(("size", "n"), [(1, 1), (10, 10), (10, 3), (7, 5), (1000, 64)])
def test_every_index_is_drawn_equally_often(size: int, n: int) -> None:
    draws = 4000
    counts = torch.zeros(size)
    for _ in range(draws):
        indices = draw_indices(size, n, CPU)
        assert indices.shape == (n,)
        counts += torch.bincount(indices, minlength=size)
    expected = draws * n / size
    assert counts.size(0) == size  # none out of range
    z = (counts - expected) / expected**0.5
    assert z.abs().max() < 5


@pytest.mark.parametrize(
    ("size", "n"), [(60_000, 64), (50_000_003, 1024), (10**9, 8192), (12, 4), (9, 9)]
)
def test_indices_rise_within_the_range(size: int, n: int) -> None:
    for _ in range(50):
        indices = draw_indices(size, n, CPU)
        assert int(indices[0]) >= 0
        assert int(indices[-1]) < size
        assert (indices.diff() >= (size % n == 0)).all()  # all different where n divides the size
