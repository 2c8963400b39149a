"""Starts functions in processes of their own, forked from one that has imported the program.

To import torch and Pyro takes a new process seconds of CPU time; a fork takes milliseconds. Each
test process has a server of forks, started by the first program. Where there is no fork, a program
is a new process.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent
# Ignored where pytest runs in the background or by nohup.
SIGNALS = [
    getattr(signal, name)
    for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]
FORKS = "forkserver" in multiprocessing.get_all_start_methods()
CONTEXT: Any = multiprocessing.get_context("forkserver" if FORKS else "spawn")
IMPORTED = ["helpers", "pytest", "main", "air.detect", "scipy.optimize", "torch._dynamo"]


def default_signals() -> None:
    """Gives signals the handlers that they have in a program started from a terminal."""
    for number in SIGNALS:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default)


def draw_no_figures() -> contextlib.AbstractContextManager[object]:
    """In this context, runs are not drawn, which takes most of the time of a short one."""
    from air import viz

    return mock.patch.object(viz, "draw_run")


def without_call_stacks() -> contextlib.AbstractContextManager[object]:
    """In this context, torch's modes of fake tensors keep no call stacks: half of a capture's time.

    A capture makes one mode for each tensor; a call stack is for a message about mixed modes.
    """
    without = mock.Mock(wraps=traceback, extract_stack=list)
    return mock.patch("torch._subclasses.fake_tensor.traceback", without, create=True)


def start(
    function: Callable[..., int | None],
    *arguments: object,
    folder: Path,
    environment: Mapping[str, str] = os.environ,
    output: Path | None = None,
) -> BaseProcess:
    """Calls a function in a process with that working folder; what it returns is the exit code.

    No run is drawn.

    Args:
        function: Of a module, not of a function.
        arguments: Of the function.
        folder: Working folder.
        environment: All its variables.
        output: File for what it prints; without one, nothing is kept.
    """
    if FORKS:
        places = f"{ROOT}{os.pathsep}{Path(__file__).parent}"
        with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "PYTHONPATH": places}):
            CONTEXT.set_forkserver_preload(IMPORTED)
            multiprocessing.forkserver.ensure_running()  # type: ignore[attr-defined]
    settings = folder, dict(environment), output or Path(os.devnull)
    process: BaseProcess = CONTEXT.Process(target=_live, args=(settings, function, arguments))
    process.daemon = True  # killed if the tests end first
    process.start()
    return process


def _live(
    settings: tuple[Path, dict[str, str], Path],
    function: Callable[..., int | None],
    arguments: tuple[object, ...],
) -> None:
    folder, environment, output = settings
    default_signals()
    sys.argv = ["main.py"]
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with (
        output.open("a", buffering=1) as stream,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
        draw_no_figures(),
        without_call_stacks(),
    ):
        sys.exit(function(*arguments))
