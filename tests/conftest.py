"""Fixtures. Functions that tests import are in helpers.py and programs.py.

Imports of torch are in the fixtures: the process that only distributes tests does without.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import programs
import pytest

if TYPE_CHECKING:
    import torch
    from helpers import Run

    from air import AIR
    from air.data.scenes import Array


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves out files of slow tests where none is to run: their imports take seconds."""
    if config.option.markexpr != "not slow" or collection_path.suffix != ".py":
        return None
    return "\npytestmark = pytest.mark.slow\n" in collection_path.read_text("utf-8") or None


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Seeds the generators, empties Pyro's store, and keeps torch to one thread.

    Afterwards, the settings of torch and Pyro that the program changes are restored.
    """
    import pyro
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two on a busy machine can be ten times slower
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pyro.validation_enabled():
        yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="session", autouse=True)
def _no_call_stacks() -> Iterator[None]:
    with programs.without_call_stacks():
        yield


@pytest.fixture(scope="session", autouse=True)
def _digits_are_unpacked_once() -> Iterator[None]:
    """Which every run does that generates scenes, and takes a fifth of a short one."""
    from air import multi_mnist

    cached = functools.cache(multi_mnist.load_embedded)
    with mock.patch.object(multi_mnist, "load_embedded", cached):
        yield


@pytest.fixture
def default_signals() -> Iterator[None]:
    """The handlers of a program in a terminal, where pytest runs by nohup or in the background."""
    former = {number: signal.getsignal(number) for number in programs.SIGNALS}
    programs.default_signals()
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.fixture
def air() -> AIR:
    from helpers import small_air

    return small_air()


@pytest.fixture
def images() -> torch.Tensor:
    import torch

    return torch.rand(10, 12, 12)


@pytest.fixture(scope="session")
def digits() -> list[Array]:
    """Train images and labels, test images and labels."""
    from air.data.synthetic.digits import load_embedded

    return load_embedded()


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of programs, which share one cache of scenes."""
    cache = tmp_path_factory.mktemp("cache")
    return {**os.environ, "AIR_CACHE": str(cache)}


@pytest.fixture
def succeeds(tmp_path: Path, environment: dict[str, str]) -> Run:
    """Runs the program in this process and in the folder of the test, and requires exit code 0."""
    from helpers import run

    def done(line: str, **options: Any) -> subprocess.CompletedProcess[str]:  # noqa: ANN401
        ended = run(line, tmp_path, environment, **options)
        assert ended.returncode == 0, ended.stderr
        return ended

    return done


@pytest.fixture
def refused(
    tmp_path: Path,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[[str], str]:
    """Runs the program in this process; returns the line with which it refuses these flags."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AIR_CACHE", environment["AIR_CACHE"])

    from main import main  # here, for most tests do without

    def message(line: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(line.split())
        printed = capsys.readouterr().err
        assert ended.value.code == 2, (line, printed)
        assert printed.count("\n") == 1, (line, printed)
        return printed

    return message
