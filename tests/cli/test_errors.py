"""Errors in the user's words, and signals; injected where they happen."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import programs
import pyro
import pytest
import torch
from helpers import SMALL, Run
from helpers import run as run_main
from torch import fx

from air.cli.errors import explain
from air.cli.flags import build_parser
from air.storage.checkpoint import CheckpointError
from air.storage.run_folder import RunFolder
from main import main

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
    lost = str(explain(ConnectionError("another rank has exited (x)"), run))
    assert lost.startswith("another rank has exited (x). Resume from the last checkpoint")
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
    disk: Path,
    tmp_path: Path,
    environment: dict[str, str],
    succeeds: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mounted(disk, "size=16m")
    save = RunFolder.save

    def save_and_fill(self: RunFolder, state: dict[str, object]) -> None:
        save(self, state)
        with contextlib.suppress(OSError), (disk / "ballast").open("wb") as file:
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            size = self.checkpoint.stat().st_size
            file.write(bytes(max(free - size // 2, 0)))  # no room for another checkpoint

    monkeypatch.setattr(RunFolder, "save", save_and_fill)
    flags = f"{SMALL} --output-dir {disk}/run --progress-every 1 --eval-every 0 -n 9 --save-every 4"
    done = run_main(flags, tmp_path, environment)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "No space left on device" in done.stderr
    assert f"--resume {disk}/run" in done.stderr
    monkeypatch.undo()
    (disk / "ballast").unlink()
    assert torch.load(disk / "run" / "checkpoint.pt", weights_only=True)["step"] == 4
    shutil.copytree(disk / "run", tmp_path / "run")
    succeeds("--resume run -n 7 --save-every 0")
    records = RunFolder(tmp_path / "run").read_metrics()
    assert [each["step"] for each in records if "elbo" in each] == [*range(1, 8)]


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


@pytest.mark.parametrize(
    "function",
    [
        "air.multi_mnist.draw_background",
        "zipfile.ZipFile.open",
        "air.evaluation.metrics.importance_weighted_bound",
    ],
)
def test_a_signal_at_any_moment_ends_in_one_line(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """While scenes are drawn or written, or the trained model is evaluated."""
    monkeypatch.setattr(function, lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    line = f"{SMALL} --background noisy --output-dir run --evaluate"
    cache = tmp_path / "cache"
    is_bound = function.endswith("bound")
    own = environment if is_bound else {**environment, "AIR_CACHE": str(cache)}
    done = run_main(line, tmp_path, own)
    assert done.returncode == 143
    assert done.stderr.count("\n") == done.stderr.count("interrupted. ") == 1, done.stderr
    assert done.stderr.endswith("interrupted. Training had not begun\n") != is_bound
    assert ("--resume run" in done.stderr) == (tmp_path / "run").exists() == is_bound
    assert not [path for path in cache.rglob("*") if path.is_file()]


def compile_something_small(line: str) -> int:
    """Runs the program; Inductor does not work on its step, which takes it a minute."""
    import torch._inductor.config as inductor

    os.setsid()
    # Scalar code, without trying which vectors the compiler knows and without common headers: so
    # what Inductor compiles first is the function, and the signal does not wait for more.
    inductor.cpp.vec_isa_ok = False
    inductor.cpp_cache_precompile_headers = False

    def compiler(graph: fx.GraphModule) -> fx.GraphModule:
        torch.compile(lambda x: x.sin() + x.cos().sum())(torch.rand(1000))
        return graph

    return main(line.split(), compiler=compiler)


def test_signals_while_compiling_end_the_run_saved(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    """A terminal and a scheduler send them to the compiler's processes too."""
    line = f"{SMALL} -t 1 -n 50 --compile --output-dir run"
    compiling, log = tmp_path / "inductor", tmp_path / "log"
    own = {**environment, "TORCHINDUCTOR_CACHE_DIR": str(compiling)}
    options = {"folder": tmp_path, "environment": own, "output": log}
    process = programs.start(compile_something_small, line, **options)
    while not list(compiling.rglob("*.cpp")):
        assert process.is_alive(), log.read_text()
        time.sleep(0.05)
    for number in (signal.SIGINT, signal.SIGUSR1):
        os.killpg(int(process.pid or 0), number)
    process.join(200)
    said = log.read_text()
    assert process.exitcode in (128 + signal.SIGINT, 128 + signal.SIGUSR1), said
    assert "Traceback" not in said
    step = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"]
    assert step < 50
    assert f"Interrupted, and saved at step {step} of 50" in said


def test_a_defect_of_the_program_keeps_its_traceback(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if its type is that of errors in the input, once training has begun."""
    threads = torch.get_num_threads()
    monkeypatch.setattr("air.training.svi.SVI.step_async", mock.Mock(side_effect=ValueError("x")))
    with pytest.raises(ValueError, match=r"^x$"):
        run_main(f"{SMALL} --threads {threads + 1} --output-dir run", tmp_path, environment)
    assert (torch.get_num_threads(), pyro.infer.is_validation_enabled()) == (threads, True)


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
