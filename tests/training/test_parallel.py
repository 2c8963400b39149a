"""Several processes: what each has of its own, what they compute together, how they end."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pyro
import pytest
import torch
from air.training.parallel import SINGLE_PROCESS, WAIT_FOR_SUMS, process_group
from helpers import ROOT, SECOND_OF_TWO, SMALL
from helpers import run as run_main
from two_ranks import CASES, STEPS, make_trainer, one_step, train

from air.storage.checkpoint import read_state
from air.subsampling import draw_indices

pytestmark = pytest.mark.slow

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


def start(*words: str, environment: dict[str, str] = os.environ) -> "subprocess.Popen[str]":  # type: ignore[assignment]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**environment, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*TORCHRUN, *words], env=environment, cwd=ROOT, **pipes)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """What each of two ranks computed."""
    folder = tmp_path_factory.mktemp("ranks")
    process = start("tests/two_ranks.py", str(folder))
    _, complained = process.communicate(timeout=200)
    assert process.returncode == 0, complained
    first, second = (torch.load(folder / f"{k}.pt", weights_only=True) for k in (0, 1))
    return first, second


@pytest.mark.parametrize("size", [7, 60])
def test_shards_are_drawn_from_as_the_whole_is(size: int) -> None:
    rows = torch.arange(size)
    shards = [SINGLE_PROCESS.shard(rows), SECOND_OF_TWO.shard(rows)]
    assert torch.equal(shards[0], rows)
    assert len(shards[1]) == -(-size // 2)
    assert shards[1][-1] == rows[-1]
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


def test_each_rank_draws_random_numbers_of_its_own() -> None:
    groups = SINGLE_PROCESS, SECOND_OF_TWO
    assert len({group.seed(seed, 0) for group in groups for seed in range(50)}) == 100


def test_a_process_with_a_gpu_waits_for_no_lost_rank_when_it_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A communicator of NCCL that hangs would block an ordinary exit."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    library = mock.Mock()
    for name in (
        *("is_torchelastic_launched", "is_nccl_available", "init_process_group", "new_group"),
        *("get_rank", "get_world_size", "destroy_process_group"),
    ):
        monkeypatch.setattr(torch.distributed, name, getattr(library, name))
    with mock.patch("os._exit") as leave, pytest.raises(SystemExit), process_group():
        sys.exit(3)
    leave.assert_called_once_with(3)
    library.destroy_process_group.assert_not_called()
    library.init_process_group.assert_called_once_with("cpu:gloo,cuda:nccl", timeout=WAIT_FOR_SUMS)


def test_a_plain_start_joins_no_process_group() -> None:
    with process_group() as group:
        assert group is SINGLE_PROCESS
        assert not torch.distributed.is_initialized()
        assert group.all_gather(3) == [3]
        assert group.any(True)
        assert not group.any(False)
        assert group.all_reduce is None
        with group.main_first():
            pass


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("estimator", "captured"), CASES)
def test_a_step_of_two_ranks_is_that_of_one_process_on_the_joined_batch(
    found: Any,  # noqa: ANN401
    estimator: str,
    captured: bool,
) -> None:
    pyro.enable_validation(False)
    alone, case = one_step(estimator, captured, SINGLE_PROCESS), str((estimator, captured))
    assert same(found[0][case], found[1][case])
    assert len([name for name in alone if name.startswith("bl_")]) == (
        10 if estimator == "score" else 0
    )
    for name, value in alone.items():
        torch.testing.assert_close(
            found[0][case][name].to(value), value, rtol=1e-4, atol=1e-5 * float(value.abs().max())
        )


@pytest.mark.parametrize("estimator", ["marginal", "score"])
def test_ranks_stay_the_same_and_draw_their_own(found: Any, estimator: str) -> None:  # noqa: ANN401
    first, second = found
    for what in ("weights", "elbos", "prior"):
        one, other = first[f"{what} {estimator}"], second[f"{what} {estimator}"]
        assert same(one, other) if what == "weights" else one == other
    elbos = first[f"elbos {estimator}"]
    assert elbos[-1] > elbos[0] + 4
    assert len(elbos) == STEPS // 10
    assert (first["drawn"] != second["drawn"]).all()


def test_two_ranks_go_on_as_if_they_had_not_stopped(found: Any) -> None:  # noqa: ANN401
    for rank in found:
        assert same(rank["whole"], rank["second"])


def test_one_process_goes_on_from_two(found: Any) -> None:  # noqa: ANN401
    trainers = [make_trainer(10, SINGLE_PROCESS) for _ in range(2)]
    for trainer in trainers:
        trainer.load_state_dict(copy.deepcopy(found[0]["state"]))  # it trains what it got
        torch.manual_seed(int(torch.randint(1000, ())))  # its stream is its own, and no chance
        list(train(trainer))
        assert trainer.step == 10
    assert same(*(trainer.air.state_dict() for trainer in trainers))


def test_rank_0_runs_a_block_first(found: Any) -> None:  # noqa: ANN401
    assert found[0]["ran first"] < found[1]["ran first"]
    assert found[0]["gathered"] == found[1]["gathered"] == [{"rank": 0}, {"rank": 1}]


def test_input_that_one_rank_lacks_ends_all_and_this_rank_says_so(found: Any) -> None:  # noqa: ANN401
    assert [rank["refused"][0] for rank in found] == [2, 2]
    assert found[0]["refused"][1] == ""
    (line,) = found[1]["refused"][1].splitlines()
    assert "rank 1: " in line
    assert "scenes-1.npz" in line


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    """Until there is such a file."""
    until = time.monotonic() + 200
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.3)


def process_of(rank: int, agent: int) -> int:
    """The process of that rank, by what torchrun has set in its environment."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    mark = f"\0RANK={rank}\0".encode()
    (found,) = [k for k in children if mark in Path(f"/proc/{k}/environ").read_bytes()]
    return int(found)


def own_lines(complained: str) -> list[str]:
    """What the program said, not torchrun."""
    return [line for line in complained.splitlines() if line.startswith("main.py: ")]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_ranks_that_end_lose_no_run(tmp_path: Path, environment: dict[str, str]) -> None:
    folder = tmp_path / "run"
    steps = SMALL.replace("-n 4", "-n 100000")
    flags = f"{steps} --no-compile --save-every 20 --eval-every 0 --output-dir {folder}".split()
    process = start("main.py", *flags, environment=environment)
    wait_for(folder / "checkpoint.pt", process)
    ranks = [process_of(rank, process.pid) for rank in (0, 1)]
    for number in (process.pid, *ranks):  # as a cluster's scheduler does; torchrun sends more
        os.kill(number, signal.SIGTERM)
    said, complained = process.communicate(timeout=60)
    assert said.count("Interrupted, and saved at step") == 1
    assert own_lines(complained) == []
    stopped_at = read_state(folder / "checkpoint.pt")["step"]
    assert f"step {stopped_at:,} of" in said
    assert (folder / "figures" / "scenes.png").exists()

    process = start("main.py", "--resume", str(folder), environment=environment)
    until = time.monotonic() + 200
    while read_state(folder / "checkpoint.pt")["step"] == stopped_at:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.3)
    killed_at = time.monotonic()
    os.kill(process_of(1, process.pid), signal.SIGKILL)
    said, complained = process.communicate(timeout=60)
    assert time.monotonic() - killed_at < 60
    assert process.returncode == 1
    (line,) = own_lines(complained)
    assert "another rank has ended" in line
    assert f"--resume {folder}" in line
    assert complained.count("Traceback") == 1  # torchrun's

    end = read_state(folder / "checkpoint.pt")["step"] + 5
    shutil.copytree(folder, tmp_path / "copy")
    done = run_main(f"--resume {tmp_path / 'copy'} -n {end}", tmp_path, environment)  # alone
    assert done.returncode == 0, done.stderr
    metrics = (tmp_path / "copy" / "metrics.jsonl").read_text().splitlines()
    steps_told = [json.loads(line)["step"] for line in metrics if "images_per_second" in line]
    assert steps_told == sorted(set(steps_told))
    assert steps_told[-1] == end


@pytest.mark.parametrize(
    ("flags", "problem", "code"),
    [
        ("--output-dir tests", "--output-dir must be a new or empty folder", 2),
        ("--counts 0 99", "expected a whole number of at least 0, at most 50", 2),
        ("--likelihood-sd 1e-30 -n 40 --output-dir {}", "not finite for 20 steps in a row", 1),
    ],
)
def test_what_is_wrong_is_said_once(
    tmp_path: Path, environment: dict[str, str], flags: str, problem: str, code: int
) -> None:
    words = f"{SMALL} {flags.format(tmp_path / 'run')}".split()
    process = start("main.py", *words, environment=environment)
    _, complained = process.communicate(timeout=200)
    (line,) = own_lines(complained)
    assert problem in line
    assert process.returncode == 1  # torchrun's
    assert f"exitcode  : {code}" in complained
    assert complained.count("Traceback") == 1  # torchrun's


def test_all_start_over_where_one_collapsed(tmp_path: Path, environment: dict[str, str]) -> None:
    flags = f"{SMALL} -n 6 --eval-every 2 --alarm-after 2 --restarts 1 --output-dir {tmp_path}/run"
    process = start("main.py", *flags.split(), environment=environment)
    said, complained = process.communicate(timeout=200)
    assert process.returncode == 0, complained
    assert said.count("Starting over with --seed 1") == 1
    assert "Done." in said
    steps = [read_state(tmp_path / name / "checkpoint.pt")["step"] for name in ("run", "run-seed1")]
    assert steps == [2, 6]
