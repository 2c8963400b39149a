"""Trains a run that is killed again and again, and resumed each time, until it is done.

    python tests/killed_runs.py FOLDER KILLS [--captured] -- FLAGS OF main.py

Every life is a fork of this process, which has imported all that takes long. It is killed at some
moment, every third time while it writes a checkpoint. Prints how often it was killed, and how often
in writing.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

# What torch and the program import when they first need it: each life would spend a second on it.
import scipy.optimize  # noqa: F401
import torch._dynamo  # noqa: F401
import visdom  # noqa: F401

import main
from air.training.compiled_svi import Compiler, inductor


def live(arguments: list[str], compiler: Compiler) -> int:
    """Starts a life; returns its process."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            code = main.main(arguments, compiler=compiler)
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            os._exit(code)
    return process


def is_writing(folder: Path) -> bool:
    """Whether the temporary file of a checkpoint is there."""
    return any(folder.glob(".checkpoint.pt.*.tmp"))


def state_of(path: Path) -> tuple[int, int]:
    """When a file was written, in nanoseconds, and its size; zeros where it is not there."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def kill(process: int, folder: Path, in_writing: bool) -> bool | None:
    """Kills a life; returns whether it was writing, or None if it came to its end before.

    That is in its start, or after up to six steps, each of which adds a line to metrics.jsonl; or
    in writing its second checkpoint, so that the run comes forward.
    """
    steps, pause = random.randrange(7), random.uniform(0, 0.4)
    until = time.monotonic() + pause
    checkpoint = state_of(folder / "checkpoint.pt")
    size = state_of(folder / "metrics.jsonl")[1]
    while True:
        if os.waitpid(process, os.WNOHANG)[0]:
            return None
        if in_writing:
            if is_writing(folder) and state_of(folder / "checkpoint.pt") != checkpoint:
                break
        elif steps == 0 and time.monotonic() > until:
            break
        before, size = size, state_of(folder / "metrics.jsonl")[1]
        if size > before and steps > 0:
            steps, until = steps - 1, time.monotonic() + pause / 10
        time.sleep(0.0005)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return is_writing(folder)


def run(folder: Path, kills: int, flags: list[str], compiler: Compiler) -> None:
    """Kills so often, unless the run is done before, and lets the last life end."""
    random.seed(0)
    page = flags[flags.index("--viz") :] if "--viz" in flags else []
    killed = writing = 0
    while True:
        if (folder / "checkpoint.pt").exists():
            arguments = ["--resume", str(folder), *page]
        else:
            shutil.rmtree(folder, ignore_errors=True)
            arguments = [*flags, "--output-dir", str(folder)]
        process = live(arguments, compiler)
        if killed >= kills:
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            break
        was_writing = kill(process, folder, in_writing=killed % 3 == 2)
        if was_writing is None:
            code = 0
            break
        killed, writing = killed + 1, writing + was_writing
    print(killed, writing)
    sys.exit(code)


if __name__ == "__main__":
    target, number, *given = sys.argv[1:]
    captured = "--captured" in given
    if captured:  # Inductor compiles for a minute
        given.remove("--captured")
    run(Path(target), int(number), given[1:], (lambda graph: graph) if captured else inductor)
