"""A run that is killed, or preempted on a cluster, at any moment, ends as one that never was."""

import os
import random
import shutil
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from helpers import ROOT, SMALL, panes, run, visdom_server

from air.storage.run_folder import RunFolder
from main import main

pytestmark = pytest.mark.slow

STEPS, KILLS = 40, 6
FLAGS = (
    f"{SMALL} -n {STEPS} -t 2 --num-test-scenes 20 --anneal-prior exp --anneal-prior-to 1e-3 "
    "--anneal-prior-duration 200 --lr-schedule cosine --progress-every 1 --eval-every 21 "
    "--save-every 5"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    """A run that is not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(f"{FLAGS} --output-dir run", folder, environment)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def lines(folder: Path) -> list[dict[str, Any]]:
    records = RunFolder(folder).read_metrics()
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


# Killed.


def train(folder: Path, environment: dict[str, str], page: str) -> int:
    """Trains and kills again and again, every third time while the run writes a checkpoint.

    Returns:
        How often it was killed in writing.
    """
    random.seed(0)
    writing = 0
    for number in range(KILLS + 1):
        if (folder / "checkpoint.pt").exists():
            line = f"--resume {folder} {page}"
        else:
            shutil.rmtree(folder, ignore_errors=True)
            line = f"{FLAGS} --output-dir {folder} {page}"
        options = {"folder": folder.parent, "environment": environment}
        life = programs.start(main, line.split(), **options)
        if number < KILLS:
            wait_for_a_moment(life, folder, in_writing=number % 3 == 2)
            life.kill()
        life.join()
        assert life.exitcode == (-9 if number < KILLS else 0)
        writing += number < KILLS and is_writing(folder)
    return writing


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


def test_a_killed_run_ends_as_one_that_was_never_killed(
    tmp_path: Path, environment: dict[str, str], whole: Path
) -> None:
    with visdom_server(tmp_path / "server") as (port, _):
        page = f"--viz --visdom-server localhost:{port} --viz-every 20"
        writing = train(tmp_path / "killed", environment, page)
        page_shown = panes(port, "air_killed")
    assert writing >= 1
    assert_same_run(whole, tmp_path / "killed")
    assert snapshots(whole) == snapshots(tmp_path / "killed")
    taken = [line["step"] for line in lines(tmp_path / "killed") if "elbo" in line]
    assert taken == list(range(1, STEPS + 1))
    traces = {trace["name"]: trace["x"] for trace in page_shown["elbo"]["content"]["data"]}
    assert traces["training"] == taken


# Preempted: the batch script for Slurm. Scripts stand in for scontrol and for srun, which like
# Slurm's has the program started elsewhere, waits for it, and ends as it did.

SCRIPT = ROOT / "tests" / "benchmarks" / "train.slurm"
SLURM = {
    "srun": 'echo "$@" >words; read -r code <ended; exit "$code"',
    "scontrol": 'echo "$@" >>requeued',
}
linux = pytest.mark.skipif(sys.platform != "linux", reason="runs a script for Slurm")


@pytest.fixture
def cluster(tmp_path: Path, environment: dict[str, str]) -> dict[str, str]:
    """The environment of a job in this folder."""
    (tmp_path / "bin").mkdir()
    for name, command in SLURM.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{command}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    os.mkfifo(tmp_path / "ended")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return {**environment, "PATH": path, "SLURM_JOB_ID": "7"}


def start_job(folder: Path, cluster: dict[str, str], flags: str) -> tuple[Any, str]:
    """Starts the script as Slurm does; returns its process, and what it asks srun to start."""
    words = folder / "words"
    words.unlink(missing_ok=True)
    job = subprocess.Popen(["bash", str(SCRIPT), *flags.split()], cwd=folder, env=cluster)
    while not (words.exists() and words.read_text().endswith("\n")):
        assert job.poll() is None
        time.sleep(0.003)
    return job, words.read_text()


def end_job(folder: Path, job: Any, code: int) -> int:  # noqa: ANN401
    """Tells srun how the program ended; returns the exit code of the script."""
    (folder / "ended").write_text(f"{code}\n")
    return int(job.wait(timeout=100))


@linux
@pytest.mark.parametrize("left", ["nothing", "figures", "checkpoint.pt"])
def test_a_job_begins_or_resumes_a_run(left: str, tmp_path: Path, cluster: dict[str, str]) -> None:
    folder = tmp_path / "runs" / "slurm-7"
    if left != "nothing":
        (folder / "figures").mkdir(parents=True)
    if left == "checkpoint.pt":
        (folder / left).touch()
    job, words = start_job(tmp_path, cluster, "--seed 3")
    assert end_job(tmp_path, job, 0) == 0
    begins = left != "checkpoint.pt"
    flags = "--seed 3 --output-dir" if begins else "--resume"
    assert words == f"python main.py {flags} runs/slurm-7\n"
    assert folder.exists() != begins  # main.py refuses a folder that is not empty


@linux
@pytest.mark.parametrize(("code", "requeues"), [(0, 0), (1, 0), (2, 0), (143, 0), (138, 1)])
def test_a_job_is_requeued_after_usr1_alone(
    tmp_path: Path, cluster: dict[str, str], code: int, requeues: int
) -> None:
    job, _ = start_job(tmp_path, cluster, "--seed 3")
    assert end_job(tmp_path, job, code) == (0 if requeues else code)
    assert (tmp_path / "requeued").exists() == bool(requeues)
