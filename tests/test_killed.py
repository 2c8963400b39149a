"""A run that is killed at any moment, and resumed, ends as one that was never killed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, capture_only, panes, run, visdom_server

pytestmark = pytest.mark.slow

FLAGS = (
    "--num-scenes 300 --num-test-scenes 20 -b 8 --rnn-hidden-size 16 --encoder-latent-size 5 "
    "--encoder-net 12 --decoder-net 12 --predict-net 8 --bl-predict-net 8 -t 2 --estimator score "
    "--anneal-prior exp --anneal-prior-to 1e-3 --anneal-prior-duration 200 "
    "--lr-schedule cosine --progress-every 1 --eval-every 21 --save-every 5"
)


def train(folder: Path, kills: int, flags: str, environment: dict[str, str]) -> list[int]:
    """Returns how often the run was killed, and how often while it wrote its checkpoint."""
    command = [sys.executable, str(ROOT / "tests" / "killed_runs.py"), str(folder), str(kills)]
    done = subprocess.run(
        [*command, *flags.split()], env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return [int(word) for word in done.stdout.splitlines()[-1].split()]


def lines(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: v for key, v in record.items() if "second" not in key} for record in records]


def same(one: object, other: object) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return one == other


@pytest.mark.parametrize(("captured", "steps", "kills"), [(False, 60, 10), (True, 12, 1)])
def test_a_killed_run_ends_as_one_that_was_never_killed(
    tmp_path: Path, environment: dict[str, str], captured: bool, steps: int, kills: int
) -> None:
    flags = f"{FLAGS} -n {steps}"
    if captured:
        flags += " --compile"
    done = run(f"{flags} --output-dir whole", tmp_path, environment, compiler=capture_only)
    assert done.returncode == 0, done.stderr
    with visdom_server(tmp_path / "server") as (port, _):
        page = f"--viz --visdom-server localhost:{port} --viz-every 20"
        flags = f"{'--captured' * captured} -- {flags} {page}"
        killed, writing = train(tmp_path / "killed", kills, flags, environment)
        page = panes(port, "air_killed")
    assert killed == kills
    assert writing >= kills // 10
    whole, again = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        for name in ("whole", "killed")
    )
    for key in ("step", "model", "optimizer", "rng", "tally", "miscounted"):
        assert same(whole[key], again[key]), key
    assert lines(tmp_path / "whole") == lines(tmp_path / "killed")
    assert [line["step"] for line in lines(tmp_path / "killed") if "elbo" in line] == list(
        range(1, steps + 1)
    )
    names = [
        sorted(path.name for path in (tmp_path / name / "snapshots").glob("[0-9]*.npz"))
        for name in ("whole", "killed")
    ]
    assert names[0] == names[1]
    assert not list((tmp_path / "killed").glob(".*"))
    traces = {trace["name"]: trace["x"] for trace in page["elbo"]["content"]["data"]}
    assert traces["training"] == list(range(1, steps + 1))
