"""The batch script for Slurm: a run that is preempted again and again ends as one that never was.

Scripts named srun and scontrol stand in for Slurm.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, run
from test_killed import FLAGS, assert_same_run

from air.storage.checkpoint import read_state

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="runs a script for Slurm"),
]

SCRIPT = ROOT / "tests" / "benchmarks" / "train.slurm"
SLURM = {
    "srun": 'echo $$ >process; exec "$@"',  # its process becomes that of the program
    "scontrol": 'echo "$@" >>requeued',
    "python": f'exec {sys.executable} "$@"',
}
STEPS, PREEMPTIONS = 40, 2


@pytest.fixture
def cluster(tmp_path: Path, environment: dict[str, str]) -> dict[str, str]:
    """The environment of a job in this folder."""
    (tmp_path / "bin").mkdir()
    for name, command in SLURM.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{command}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "main.py").write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import main, programs\n"  # not this file
        "with programs.paint_no_figures():\n"
        "    sys.exit(main.main())\n"
    )
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return {**environment, "PATH": path, "SLURM_JOB_ID": "7"}


def run_job(folder: Path, cluster: dict[str, str], flags: str, steps: int | None) -> int:
    """Runs the script as Slurm does; returns its exit code.

    USR1 is sent when so many steps were taken, with 0 when Python has just started, or never.
    """
    process, metrics = folder / "process", folder / "runs" / "slurm-7" / "metrics.jsonl"
    process.unlink(missing_ok=True)
    command = ["bash", str(SCRIPT), *flags.split()]
    with (
        (folder / "log").open("a") as log,
        subprocess.Popen(command, cwd=folder, env=cluster, stdout=log, stderr=log) as job,
    ):
        while steps is not None and job.poll() is None:
            started = process.exists() and process.read_text().endswith("\n")
            taken = metrics.read_text().count('"elbo"') if steps and metrics.exists() else 0
            if started and taken >= steps:
                os.kill(int(process.read_text()), signal.SIGUSR1)
                break
            time.sleep(0.003)
        return job.wait(timeout=100)


def test_a_preempted_run_ends_as_one_that_never_was(
    tmp_path: Path, cluster: dict[str, str]
) -> None:
    flags = f"{FLAGS} -n {STEPS}"
    done = run(f"{flags} --output-dir whole", tmp_path, cluster)
    assert done.returncode == 0, done.stderr
    folder, requeued = tmp_path / "runs" / "slurm-7", tmp_path / "requeued"
    (folder / "figures").mkdir(parents=True)  # of a job that ended before its first checkpoint
    random.seed(0)
    moments = [0, *sorted(random.sample(range(1, STEPS - 20, 3), PREEMPTIONS))]
    saved_at = []
    for steps in moments:
        code = run_job(tmp_path, cluster, flags, steps)
        assert code == 0, (tmp_path / "log").read_text()
        if steps:
            saved_at.append(read_state(folder / "checkpoint.pt")["step"])
    assert requeued.read_text() == "requeue 7\n" * len(moments)
    assert saved_at == sorted(set(saved_at))  # progress between any two
    assert 0 < saved_at[0] < saved_at[-1] < STEPS
    assert run_job(tmp_path, cluster, flags, steps=None) == 0
    assert requeued.read_text().count("requeue") == len(moments)
    assert_same_run(tmp_path / "whole", folder)


@pytest.mark.parametrize(("code", "requeues"), [(0, 0), (1, 0), (2, 0), (143, 0), (138, 1)])
def test_a_job_is_requeued_after_usr1_alone(
    tmp_path: Path, cluster: dict[str, str], code: int, requeues: int
) -> None:
    (tmp_path / "bin" / "srun").write_text(f'#!/bin/bash\necho "$@" >words\nexit {code}\n')
    assert run_job(tmp_path, cluster, "--seed 3", steps=None) == (0 if requeues else code)
    assert (tmp_path / "requeued").exists() == bool(requeues)
    words = (tmp_path / "words").read_text()
    assert words == "python main.py --seed 3 --output-dir runs/slurm-7\n"
