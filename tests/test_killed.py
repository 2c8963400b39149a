"""A run that is killed at any moment, and resumed, ends as one that was never killed."""

import json
import random
import shutil
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from helpers import capture_only, panes, run, visdom_server

from main import main

pytestmark = pytest.mark.slow

FLAGS = (
    "--no-survey --num-scenes 300 --num-test-scenes 20 -b 8 --rnn-hidden-size 16 "
    "--encoder-latent-size 5 "
    "--encoder-net 12 --decoder-net 12 --predict-net 8 --bl-predict-net 8 -t 2 --estimator score "
    "--anneal-prior exp --anneal-prior-to 1e-3 --anneal-prior-duration 200 "
    "--lr-schedule cosine --progress-every 1 --eval-every 21 --save-every 5"
)


def train(folder: Path, kills: int, environment: dict[str, str], flags: str, page: str) -> int:
    """Trains and kills so often, every third time while the run writes a checkpoint.

    Returns:
        How often it was killed in writing.
    """
    random.seed(0)
    writing = 0
    for number in range(kills + 1):
        if (folder / "checkpoint.pt").exists():
            line = f"--resume {folder} {page}"
        else:
            shutil.rmtree(folder, ignore_errors=True)
            line = f"{flags} --output-dir {folder} {page}"
        options = {"folder": folder.parent, "environment": environment}
        life = programs.start(main_captured, line.split(), **options)
        if number < kills:
            wait_for_a_moment(life, folder, in_writing=number % 3 == 2)
            life.kill()
        life.join()
        assert life.exitcode == (-9 if number < kills else 0)
        writing += number < kills and is_writing(folder)
    return writing


def main_captured(words: list[str]) -> int:
    return main(words, compiler=capture_only)  # Inductor would compile for a minute


def is_writing(folder: Path) -> bool:
    """Whether the temporary file of a checkpoint is there."""
    return any(folder.glob(".checkpoint.pt.*.tmp"))


def written(path: Path) -> tuple[int, int]:
    """When a file was written, in nanoseconds, and its size; zeros where it is not there."""
    found = path.stat() if path.exists() else None
    return (found.st_mtime_ns, found.st_size) if found else (0, 0)


def wait_for_a_moment(life: BaseProcess, folder: Path, in_writing: bool) -> None:
    """Waits until a run writes its second checkpoint, or for a time in its start, or a few steps.

    Each step adds a line to metrics.jsonl.
    """
    steps, pause = random.randrange(7), random.uniform(0, 0.4)
    until = time.monotonic() + pause
    checkpoint, size = written(folder / "checkpoint.pt"), written(folder / "metrics.jsonl")[1]
    while life.is_alive():
        if in_writing:
            if is_writing(folder) and written(folder / "checkpoint.pt") != checkpoint:
                return
        elif steps == 0 and time.monotonic() > until:
            return
        before, size = size, written(folder / "metrics.jsonl")[1]
        if size > before and steps > 0:
            steps, until = steps - 1, time.monotonic() + pause / 10
        time.sleep(0.0005)


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


def snapshots(run: Path) -> set[str]:
    return {each.name for each in run.glob("snapshots/[0-9]*.npz")}


def assert_same_run(whole: Path, other: Path) -> None:
    """The second run has the states, metrics and snapshots of the first."""
    states = [torch.load(path / "checkpoint.pt", weights_only=True) for path in (whole, other)]
    for key in ("step", "model", "optimizer", "rng", "tally", "miscounted"):
        assert same(states[0][key], states[1][key]), key
    assert lines(whole) == lines(other)
    assert snapshots(whole) <= snapshots(other)  # an interrupted run leaves one where it stopped
    assert not list(other.glob(".*"))


@pytest.mark.parametrize(("captured", "steps", "kills"), [(False, 60, 6), (True, 12, 1)])
def test_a_killed_run_ends_as_one_that_was_never_killed(
    tmp_path: Path, environment: dict[str, str], captured: bool, steps: int, kills: int
) -> None:
    flags = f"{FLAGS} -n {steps} {'--compile -t 1' * captured}"
    done = run(f"{flags} --output-dir whole", tmp_path, environment, compiler=capture_only)
    assert done.returncode == 0, done.stderr
    with visdom_server(tmp_path / "server") as (port, _):
        page = f"--viz --visdom-server localhost:{port} --viz-every 20"
        writing = train(tmp_path / "killed", kills, environment, flags, page)
        page_shown = panes(port, "air_killed")
    assert writing >= kills // 6
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert snapshots(tmp_path / "whole") == snapshots(tmp_path / "killed")
    taken = [line["step"] for line in lines(tmp_path / "killed") if "elbo" in line]
    assert taken == list(range(1, steps + 1))
    traces = {trace["name"]: trace["x"] for trace in page_shown["elbo"]["content"]["data"]}
    assert traces["training"] == taken
