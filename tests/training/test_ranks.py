"""Processes that train together: what is each one's own."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, Second

from air.cli.config import pick_device
from air.subsampling import draw_indices
from air.training.ranks import Ranks


@pytest.mark.parametrize("size", [7, 60])
def test_parts_are_drawn_from_as_the_whole_is(size: int) -> None:
    rows = torch.arange(size)
    parts = [Ranks().part(rows), Second().part(rows)]
    assert torch.equal(parts[0], rows)
    assert len(parts[1]) == -(-size // 2)
    assert parts[1][-1] == rows[-1]
    if size % 2 == 0:  # a batch's indices fall into the same strata
        torch.manual_seed(0)
        whole = torch.stack([draw_indices(size, 4, rows.device) for _ in range(4000)])
        part = torch.stack([draw_indices(size // 2, 2, rows.device) for _ in range(4000)])
        for k in range(2):
            low, high = size // 4 * k, size // 4 * (k + 1)
            drawn = part[:, k], whole[:, k]
            assert all(((low <= d) & (d < high)).all() for d in drawn)
            counts = [torch.bincount(d - low, minlength=high - low).double() for d in drawn]
            assert (counts[0] - counts[1]).abs().max() < 5 * (2 * 4000 / (high - low)) ** 0.5


def test_each_has_a_device_and_a_seed_of_its_own() -> None:
    with pytest.raises(ValueError, match="use cuda, not cuda:1"):
        pick_device("cuda:1", local_rank=1)
    assert pick_device("cpu", local_rank=1).type == "cpu"
    assert len({ranks.seed(seed, 0) for ranks in (Ranks(), Second()) for seed in range(50)}) == 100


def test_a_plain_start_imports_nothing_of_it() -> None:
    code = (
        "import sys, main; ranks = main.join_ranks()\n"
        "import torch.distributed as d; print(ranks.size, d.is_initialized())\n"
        "print([name for name in sys.modules if name.startswith('air.dist')])"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert said.stdout.split("\n")[:2] == ["1 False", "[]"], said.stderr
