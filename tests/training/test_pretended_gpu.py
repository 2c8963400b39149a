"""The CUDA path of the program, on a pretended GPU: fake tensors in a CPU build of torch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from pretended_gpu.check import CHECKS

pytestmark = pytest.mark.slow

SOURCES = ROOT / "tests" / "pretended_gpu"
TORCH = Path(torch.__file__).parent
# The library must be there before torch is, which looks once for what it brings.
START = (
    "import ctypes, runpy, sys; ctypes.CDLL(sys.argv[1]); "
    "runpy.run_path(sys.argv[2], run_name='__main__')"
)


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each check found wrong, by its name; all run in one process, to import torch once."""
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++"))), None)
    if sys.platform != "linux" or compiler is None:
        pytest.skip("needs Linux and a C++ compiler")
    if torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        pytest.skip("needs a CPU build of torch; with CUDA, tests on a GPU take its place")
    if not (TORCH / "include/ATen/detail/CUDAHooksInterface.h").is_file():
        pytest.skip("needs the headers of torch, which this build does not bring")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers of this run
    return run_once(compiler, folder / "pretended_gpu")


def run_once(compiler: str, folder: Path) -> dict[str, str]:
    """Runs the checks, or waits until another worker has run them."""
    import fcntl

    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcomes = folder / "outcomes"
        if not outcomes.exists():
            outcomes.write_text(run_checks(compile_library(compiler, folder)))
    lines = [json.loads(line) for line in outcomes.read_text().splitlines()]
    return {line["name"]: line.get("detail", "") for line in lines}


def compile_library(compiler: str, folder: Path) -> Path:
    library = folder / "pretend_gpu.so"
    flags = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{TORCH}/include", f"-L{TORCH}/lib"]
    linked = ["-Wl,--no-as-needed", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{TORCH}/lib"]
    command = [compiler, *flags, str(SOURCES / "pretend_gpu.cpp"), *linked, "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return library


def run_checks(library: Path) -> str:
    """The lines that check.py prints."""
    command = [sys.executable, "-c", START, str(library), str(SOURCES / "check.py")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", CHECKS)
def test_on_a_pretended_gpu(name: str, found: dict[str, str]) -> None:
    if found[name]:
        pytest.fail(found[name], pytrace=False)
