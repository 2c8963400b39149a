"""Fixtures; what tests import is in helpers.py."""

import os
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pyro
import pytest
import torch
from helpers import small_air

from air import AIR


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Seeds the generators, empties Pyro's store, and keeps torch to one thread.

    Afterwards what the program changes in torch and Pyro is as before.
    """
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
    """To capture a step, torch makes a mode of fake tensors for each tensor, as if it were alone.

    Each keeps its call stack, for a message about mixed modes; they take a fifth of the time.
    """
    without = mock.Mock(wraps=traceback, extract_stack=list)
    with mock.patch("torch._subclasses.fake_tensor.traceback", without, create=True):
        yield


@pytest.fixture
def default_signals() -> Iterator[None]:
    """Signals as in the foreground, for programs that a test starts too.

    nohup and a shell without job control let the tests ignore SIGHUP or SIGINT.
    """
    defaults = {signal.SIGINT: signal.default_int_handler}
    if hasattr(signal, "SIGHUP"):
        defaults[signal.SIGHUP] = signal.SIG_DFL
    former = {number: signal.signal(number, default) for number, default in defaults.items()}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.fixture
def air() -> AIR:
    return small_air()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(10, 12, 12)


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One cache of scenes for all."""
    cache = tmp_path_factory.mktemp("cache")
    return {**os.environ, "AIR_CACHE": str(cache)}


@pytest.fixture
def refused(
    tmp_path: Path,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[[str], str]:
    """Gives the line with which the program refuses these flags; in this process, to be fast."""
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
