"""Several ranks: what is each rank's own, what they compute together, and how they end."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import programs
import pyro
import pytest
import torch
import two_ranks
from helpers import ROOT, SETTINGS, SMALL, as_rank, trainer
from helpers import run as run_main
from two_ranks import CASES, STEPS, make_trainer, one_step, train

from air.storage.checkpoint import read_state
from air.storage.run_folder import RunFolder
from air.support.fields import SettingError
from air.support.subsampling import draw_indices
from air.training import ranks
from main import main

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


def start(*words: str, environment: dict[str, str] = os.environ) -> "subprocess.Popen[str]":  # type: ignore[assignment]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**environment, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*TORCHRUN, *words], env=environment, cwd=ROOT, **pipes)


@pytest.mark.parametrize("size", [7, 60])
def test_shards_are_drawn_from_as_all_rows_are(size: int) -> None:
    rows = torch.arange(size)
    assert torch.equal(ranks.shard(rows), rows)
    shards = []
    for rank in range(3):
        with as_rank(rank, 3):
            shards.append(ranks.shard(rows))
    assert torch.equal(torch.cat(shards), rows)
    assert {len(each) for each in shards} <= {size // 3, -(-size // 3)}
    if size % 3 == 0:  # a batch's indices fall into the same strata
        drawn = torch.stack([draw_indices(size // 3, 2, rows.device) for _ in range(500)])
        assert [int(drawn[:, k].min()) for k in (0, 1)] == [0, size // 6]
        assert [int(drawn[:, k].max()) + 1 for k in (0, 1)] == [size // 6, size // 3]


def test_each_rank_and_step_has_random_numbers_of_its_own() -> None:
    seeds = set()
    for rank in (0, 1):
        with as_rank(rank):
            seeds |= {ranks.seed_of_step(seed, step) for seed in range(20) for step in range(20)}
    assert len(seeds) == 800


def test_without_torchrun_there_is_one_rank() -> None:
    with ranks.joined_ranks():
        assert not torch.distributed.is_initialized()
        assert (ranks.rank(), ranks.world_size(), ranks.local_rank()) == (0, 1, None)
        assert ranks.is_main()
        assert ranks.any_rank(True)
        assert not ranks.any_rank(False)


def test_scenes_and_batches_that_cannot_be_divided_are_refused() -> None:
    with as_rank(0, 3), pytest.raises(SettingError, match="number of processes, 3, got 4"):
        trainer(SETTINGS)
    with as_rank(0, 4):
        made = trainer(SETTINGS)
        assert (made.batch_size, len(made.images)) == (1, 5)
        with pytest.raises(ValueError, match="at least 4 training scenes, one per process, got 3"):
            type(made)(made.air, made.images[:3], made.held_out, SETTINGS)


def test_a_rank_that_is_lost_is_named_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(tensor: torch.Tensor) -> None:
        raise RuntimeError("Connection closed by peer\nand a long story")

    with as_rank(0):
        monkeypatch.setattr("torch.distributed.all_reduce", fails)
        with pytest.raises(ConnectionError) as raised:
            ranks.any_rank(False)
    expected = "another rank has exited or cannot be reached (Connection closed by peer)"
    assert str(raised.value) == expected


# Two ranks.


def start_ranks(
    function: Callable[..., int | None],
    *arguments: object,
    folder: Path,
    environment: dict[str, str] = os.environ,  # type: ignore[assignment]
) -> list[BaseProcess]:
    """Two ranks as torchrun starts them, each of which prints into a file of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    joined = {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in "01":
        own = {**environment, **joined, "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
        options = {"folder": folder, "environment": own, "output": folder / f"{rank}.log"}
        started.append(programs.start(function, *arguments, **options))
    return started


def ends(started: list[BaseProcess], folder: Path) -> tuple[list[int | None], list[str]]:
    """The exit codes of ranks, and what each printed."""
    for each in started:
        each.join(200)
    codes = [each.exitcode for each in started]
    return codes, [(folder / f"{rank}.log").read_text() for rank in "01"]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_two_ranks_compute_what_one_process_does(tmp_path: Path) -> None:
    codes, said = ends(start_ranks(two_ranks.main, tmp_path, folder=tmp_path), tmp_path)
    assert codes == [0, 0], said
    first, second = (torch.load(tmp_path / f"{k}.pt", weights_only=True) for k in (0, 1))
    with pyro.validation_enabled(False):
        for case in CASES:
            check_a_step_on_the_joined_batch(case, first[str(case)], second[str(case)])
    # They have the same weights, and draw their own random numbers.
    for estimator, steps in STEPS.items():
        assert same(first[f"weights {estimator}"], second[f"weights {estimator}"])
        assert first[f"prior {estimator}"] == second[f"prior {estimator}"]
        elbos = first[f"elbos {estimator}"]
        assert elbos == second[f"elbos {estimator}"]
        assert len(elbos) == steps // 10
    assert first["elbos marginal"][-1] > first["elbos marginal"][0] + 4
    assert (first["drawn"] != second["drawn"]).all()
    # They resume exactly, and one process resumes from two.
    for results in (first, second):
        assert same(results["uninterrupted"], results["resumed"])
    alone = [make_trainer(10) for _ in range(2)]
    for each in alone:
        each.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        list(train(each))
    assert same(*(each.air.state_dict() for each in alone))
    # Rank 1 alone was asked to stop, before the first step.
    assert [results["stopped"] for results in (first, second)] == [(0, True)] * 2


def check_a_step_on_the_joined_batch(
    case: tuple[str, bool], first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]
) -> None:
    alone = one_step(*case)
    assert same(first, second)
    of_baseline = [name for name in alone if name.startswith("bl_")]
    assert len(of_baseline) == (10 if case[0] == "score" else 0)
    for name, value in alone.items():
        torch.testing.assert_close(
            first[name].to(value), value, rtol=1e-4, atol=1e-5 * float(value.abs().max())
        )


def wait_for(is_alive: Callable[[], bool], condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 200
    while not condition():
        assert is_alive()
        assert time.monotonic() < until
        time.sleep(0.1)


def process_of(rank: int, agent: int) -> int:
    """The process of that rank, by the environment that torchrun has set."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    mark = f"\0RANK={rank}\0".encode()
    (found,) = [k for k in children if mark in Path(f"/proc/{k}/environ").read_bytes()]
    return int(found)


def own_lines(complained: str) -> list[str]:
    """The lines of the program, not of torchrun."""
    return [line for line in complained.splitlines() if line.startswith("main.py: ")]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_ranks_that_end_lose_no_run(tmp_path: Path, environment: dict[str, str]) -> None:
    folder = tmp_path / "run"
    checkpoint = folder / "checkpoint.pt"
    steps = SMALL.replace("-n 4", "-n 100000")
    flags = f"{steps} --no-compile --save-every 20 --eval-every 0 --output-dir {folder}".split()
    options = ("--standalone", "--max-restarts", "1")
    process = start(*options, "main.py", *flags, environment=environment)
    wait_for(lambda: process.poll() is None, checkpoint.exists)
    killed_at = read_state(checkpoint)["step"]
    os.kill(process_of(1, process.pid), signal.SIGKILL)  # torchrun then starts both again
    wait_for(
        lambda: process.poll() is None, lambda: read_state(checkpoint)["step"] >= killed_at + 60
    )
    for number in (process.pid, *(process_of(rank, process.pid) for rank in (0, 1))):
        os.kill(number, signal.SIGTERM)  # as a cluster's scheduler does; torchrun sends more
    said, complained = process.communicate(timeout=60)
    (line,) = own_lines(complained)
    assert "another rank has exited" in line
    assert f"--resume {folder}" in line
    assert said.count("Interrupted, and saved at step") == 1
    stopped_at = read_state(checkpoint)["step"]
    assert f"step {stopped_at:,} of" in said
    logged = [record["step"] for record in RunFolder(folder).read_metrics()]
    assert logged == sorted(logged)

    alone = run_main(f"--resume {folder} -n {stopped_at + 5}", tmp_path, environment)
    assert alone.returncode == 0, alone.stderr


@pytest.mark.slow
def test_an_error_ends_all_ranks_with_its_line(tmp_path: Path, environment: dict[str, str]) -> None:
    words = f"{SMALL} --likelihood-sd 1e-30 -n 40 --output-dir run".split()
    started = start_ranks(main, words, folder=tmp_path, environment=environment)
    codes, said = ends(started, tmp_path)
    assert codes == [1, 1]
    for printed in said:
        (line,) = own_lines(printed)
        assert "not finite for 20 steps in a row" in line
        assert "Traceback" not in printed
