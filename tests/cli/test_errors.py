"""Errors in the user's words, and signals; injected where they happen."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SMALL, panes, visdom_server
from helpers import run as run_main

from air.cli.errors import explain
from air.cli.flags import build_parser
from air.storage.checkpoint import CheckpointError
from air.storage.run_folder import RunFolder
from air.training.compiled_svi import RecordingError
from air.visualization.visdom_panes import ORDER

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", 0)


def test_errors_that_are_the_users_to_mend_are_explained(run: RunFolder) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")
    assert explain(full, run) == (
        "cannot write: [Errno 28] No space left on device: 'metrics.jsonl'. No checkpoint was "
        "written yet"
    )
    run.save({})
    assert f"--resume {run.path}" in str(explain(full, run))
    stuck = str(explain(FloatingPointError("the weight x was not finite"), run))
    assert f"a lower --learning-rate, from its weights by --load {run.checkpoint}" in stuck
    assert "no CUDA graph" in str(explain(RecordingError("no CUDA graph: x"), run))
    spaced = RunFolder.create(run.path / "o 11", 0)
    stuck = str(explain(FloatingPointError("the weight x was not finite"), spaced))
    assert stuck.endswith(f" --load '{spaced.checkpoint}'")
    assert explain(ZeroDivisionError("a defect"), run) is None
    assert explain(RuntimeError("shapes"), run) is None


def test_out_of_memory_is_told_with_what_to_lower(run: RunFolder) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)  # what torch says on a CPU
    for error in (caught.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        for known in (run, None):
            assert "out of memory; lower --batch-size" in str(explain(error, known))


def test_an_error_line_keeps_the_spaces_of_a_path(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().error("no such\n\n  run: --resume 'o  11'\n")
    assert capsys.readouterr().err.endswith("error: no such run: --resume 'o  11'\n")


def mounted(folder: Path, options: str) -> None:
    """Mounts a file system in memory; skips the test where that cannot be."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount, stderr=-3).returncode:
        pytest.skip("needs root, to mount a file system")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Where a small or read-only file system may be mounted."""
    folder = tmp_path / "disk"
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False, stderr=-3)


def test_a_full_disk_ends_training_and_leaves_the_last_checkpoint(
    disk: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    mounted(disk, "size=16m")
    flags = f"{SMALL} --output-dir {disk}/run --progress-every 1 --eval-every 0 -n 500"
    command = [sys.executable, str(ROOT / "main.py"), *flags.split(), "--save-every", "20"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=-1, stderr=-1, text=True
    ) as process:
        checkpoint = disk / "run" / "checkpoint.pt"
        while not checkpoint.exists():
            assert process.poll() is None
            time.sleep(0.01)
        size = checkpoint.stat().st_size
        with contextlib.suppress(OSError), (disk / "ballast").open("wb") as file:
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            file.write(bytes(max(free - size // 2, 0)))  # no room for another checkpoint
        _, complaint = process.communicate(timeout=120)
    assert process.returncode == 1
    assert complaint.count("\n") == 1, complaint
    assert "No space left on device" in complaint
    assert f"--resume {disk}/run" in complaint
    (disk / "ballast").unlink()
    step = torch.load(checkpoint, weights_only=True)["step"]
    assert 0 < step < 500
    shutil.copytree(disk / "run", tmp_path / "run")
    done = run_main(f"--resume run -n {step + 3} --save-every 0", tmp_path, environment)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if '"elbo"' in line]
    assert steps == list(range(1, step + 4))


def test_a_read_only_folder_is_found_before_training(
    disk: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    mounted(disk, "size=9m")
    run = RunFolder.create(disk / "old", 0)
    run.log({"step": 1})
    (disk / "new").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(CheckpointError, match=r"cannot write into .*Read-only file system"):
        run.truncate_after(1)
    done = run_main(f"{SMALL} --output-dir disk/new", tmp_path, environment)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "cannot write" in done.stderr
    assert "Read-only file system" in done.stderr


def catches(process: int, number: signal.Signals) -> bool:
    """Whether a process has said what it does at a signal."""
    status = Path(f"/proc/{process}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux about signals")
@pytest.mark.parametrize("moment", ["making scenes", "evaluating"])
def test_a_signal_at_any_moment_ends_in_one_line(
    tmp_path: Path, environment: dict[str, str], moment: str
) -> None:
    scenes = "--num-scenes 60000" if moment == "making scenes" else ""
    line = f"{SMALL} {scenes} --output-dir run --evaluate --iwae-samples 100000"
    own = {**environment, "AIR_CACHE": str(tmp_path / "cache"), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(ROOT / "main.py"), *line.split()]
    with subprocess.Popen(
        command, cwd=tmp_path, env=own, stdout=-1, stderr=-1, text=True
    ) as process:
        if moment == "making scenes":
            while not catches(process.pid, signal.SIGTERM):
                assert process.poll() is None
                time.sleep(0.05)
            time.sleep(2)
        else:
            while not (tmp_path / "run" / "figures" / "curves.png").exists():  # the last of them
                assert process.poll() is None
                time.sleep(0.05)
            time.sleep(1)
        process.send_signal(signal.SIGTERM)
        try:
            complaint = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == 143
    assert complaint.count("\n") == complaint.count("interrupted. ") == 1, complaint
    if moment == "making scenes":
        assert not list(tmp_path.glob("cache/**/*.npz"))
        assert not list(tmp_path.glob("cache/.scenes*"))


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGUSR1"])
def test_a_signal_while_compiling_ends_the_run_saved(
    name: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    """A terminal and a scheduler send it to the compiler's processes too."""
    code = (  # Inductor works on something small before the step, which takes it a minute
        "import sys, main, torch\n"
        "def compiler(graph):\n"
        "    torch.compile(lambda x: x.sin() + x.cos().sum())(torch.rand(1000))\n"
        "    return graph\n"
        "sys.exit(main.main(sys.argv[1:], compiler=compiler))"
    )
    line = f"{SMALL} -t 1 -n 50 --compile --output-dir run"
    compiling = tmp_path / "inductor"
    own = {**environment, "TORCHINDUCTOR_CACHE_DIR": str(compiling), "PYTHONUNBUFFERED": "1"}
    own |= {"PYTHONPATH": str(ROOT)}
    # Scalar code, without trying which vectors the compiler knows and without common headers: so
    # what Inductor compiles first is the function, and the signal does not wait for more.
    own |= {"TORCHINDUCTOR_VEC_ISA_OK": "0", "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}
    command = [sys.executable, "-c", code, *line.split()]
    with subprocess.Popen(
        command, cwd=tmp_path, env=own, stdout=-1, stderr=-1, text=True, start_new_session=True
    ) as process:
        while not list(compiling.rglob("*.cpp")):
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, number := getattr(signal, name))
        said, complaint = process.communicate(timeout=200)
    assert process.returncode == 128 + number, complaint
    assert "Traceback" not in complaint
    step = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"]
    assert step < 50
    assert f"Interrupted, and saved at step {step} of 50" in said


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of memory")
def test_a_run_out_of_memory_says_what_to_lower(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    code = (
        "import resource, sys, main, torch\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "most = pages * resource.getpagesize() + 700 * 2**20\n"  # for the nets, not for Adam
        "resource.setrlimit(resource.RLIMIT_AS, (most, most))\n"
        "sys.exit(main.main(sys.argv[1:]))"
    )
    line = f"{SMALL} --decoder-net 60000 --encoder-net 60000 --no-compile --output-dir run"
    own = {**environment, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *line.split()]
    done = subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "out of memory; lower --batch-size, " in done.stderr
    assert (tmp_path / "run" / "config.json").exists()


def test_two_at_once(tmp_path: Path, environment: dict[str, str]) -> None:
    """The same new cache and the same page serve both; the same folder serves one."""
    own = {**environment, "AIR_CACHE": str(tmp_path / "cache")}
    with visdom_server(tmp_path / "server") as (port, _):
        flags = f"{SMALL} -n 20 --viz --visdom-port {port} --visdom-env same --output-dir"
        runs = [
            subprocess.Popen(
                [sys.executable, str(ROOT / "main.py"), *flags.split(), name],
                cwd=tmp_path, env=own, stdout=-1, stderr=-1, text=True,
            )
            for name in ("one", "two", "one")
        ]  # fmt: skip
        said = [run.communicate(timeout=200)[1] for run in runs]
        assert runs[1].returncode == 0, said[1]
        assert sorted([runs[0].returncode, runs[2].returncode]) == [0, 2]
        assert sorted([said[0].count("\n"), said[2].count("\n")]) == [0, 1]
        assert "one is " in said[0] + said[2]  # in use, or no longer empty
        assert set(panes(port, "same")) == set(ORDER) - {"baseline", "backgrounds"}
    sums = [
        json.loads((tmp_path / name / "config.json").read_text())["data_sha256"]
        for name in ("one", "two")
    ]
    assert sums[0] == sums[1]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_run_that_cannot_move_is_saved_and_named(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    done = run_main(f"{SMALL} -n 60 --likelihood-sd 1e-30 --output-dir run", tmp_path, environment)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert "log_likelihood and with it the loss" in done.stderr
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 20
    assert all(weight.isfinite().all() for weight in state["model"].values())
