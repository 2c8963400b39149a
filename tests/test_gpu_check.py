"""The first command on a machine with a GPU, as far as it goes without one."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run
from torch._inductor.runtime.runtime_utils import cache_dir

from tests.benchmarks import gpu_check
from tests.benchmarks.bench_step import Case, Timing
from tests.benchmarks.gpu_check import CHECKS, Check, Options

pytestmark = pytest.mark.slow


def test_all_that_needs_no_gpu_is_ok_on_the_cpu(tmp_path: Path) -> None:
    words = ["tests/benchmarks/gpu_check.py", "--device", "cpu", "--quick"]
    own = {**os.environ, "TMPDIR": str(tmp_path)}
    # Inductor's files where other tests have theirs, and no common headers, for a single function:
    # in a new place it would first try what the compiler knows, and compile the headers.
    own["TORCHINDUCTOR_CACHE_DIR"] = cache_dir()
    own["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "0"
    done = subprocess.run(
        [sys.executable, ROOT / words[0], *words[1:]],
        cwd=tmp_path, env=own, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(CHECKS)
    for line, check in zip(lines, CHECKS, strict=True):
        status = r"skipped \(needs CUDA\) " if check.gpus[0] else r"ok       "
        assert re.match(rf"{status}{check.name}( +\S.*)?$", line), line
    assert not list(tmp_path.glob("*/*/checkpoint.pt"))  # it leaves no runs


def test_a_check_that_fails_fails_the_command_and_the_others_go_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def raises(options: Options) -> str:
        raise RuntimeError("CUDA error: a long story\nof many lines")

    def finds(options: Options) -> str:
        assert options.device == "cuda", "2 recordings"
        return "1 recording"

    def works(options: Options) -> str:
        return f"{options.device}, quick {options.quick}"

    good = Check("good", works)
    checks = [Check("raises", raises), Check("finds", finds), Check("gpu", finds, (1, 1)), good]
    assert gpu_check.main(["--device", "cpu"], checks) == 1
    said = capsys.readouterr()
    assert [line.split(maxsplit=1) for line in said.out.splitlines()] == [
        ["FAIL", "raises     RuntimeError: CUDA error: a long story"],
        ["FAIL", "finds      2 recordings"],
        ["skipped", "(needs CUDA) gpu"],
        ["ok", "good       cpu, quick False"],
    ]
    assert "of many lines" in said.err
    assert gpu_check.main(["--device", "cpu", "--quick"], [good]) == 0


def test_a_short_run_tells_its_elbo(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_here(options: Options, line: str) -> None:
        """Other tests here start the program by itself."""
        done = run(line, options.folder, environment)
        assert done.returncode == 0, done.stderr

    monkeypatch.setattr(gpu_check, "run_program", run_here)
    said = gpu_check.short_run(Options("cpu", True, tmp_path), "one")
    assert re.fullmatch(r"10 steps, ELBO \d+\.\d+ to \d+\.\d+", said)


def test_a_run_that_fails_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as failed:
        gpu_check.run_program(Options("cpu", True, tmp_path), "--device cud --output-dir run")
    assert re.fullmatch(
        r"main.py --device cud .*: exit code 2: main.py: error: .*", str(failed.value)
    )


@pytest.mark.parametrize(
    ("plain", "compiled", "floor", "holds"),
    [(20, 0.5, 0.5, True), (20, 0.7, 0.7, False), (20, 0.5, 0.3, False), (9, 0.5, 0.5, False)],
)
def test_goals_of_speed_are_a_verdict_on_whole_measurements(
    plain: float,
    compiled: float,
    floor: float,
    holds: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = {"plain": plain, "compiled": compiled, "floor": floor}

    def measure(cases: list[Case], turns: int, steps: int) -> list[Timing]:
        return [Timing(1.0, 1e-3 * taken[case.form], 0) for case in cases]

    monkeypatch.setattr(gpu_check, "measure", measure)
    assert f"compiled {compiled:.2f} ms" in gpu_check.speed(Options("cuda", True, tmp_path))
    if holds:
        assert "times the floor" in gpu_check.speed(Options("cuda", False, tmp_path))
    else:
        with pytest.raises(AssertionError, match=r"the goals: at most 0\.6 ms"):
            gpu_check.speed(Options("cuda", False, tmp_path))


def test_without_a_gpu_nothing_is_checked_by_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu_check.main([])
    assert ended.value.code == 2
    assert "finds no GPU" in capsys.readouterr().err


def test_calls_that_wait_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def work() -> None:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    (place,) = gpu_check.waits(work)
    assert place.startswith("test_gpu_check.py:")
    assert modes == ["warn", "default"]
