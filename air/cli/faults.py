"""What ends a run before its time: signals, and errors in the user's words."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from air.storage.run_folder import RunFolder
from air.training.compiled_svi import RecordingError
from air.training.ranks import RankLostError
from air.training.trainer import Trainer


@contextmanager
def terminate_like_interrupt() -> Iterator[None]:
    """Lets SIGTERM unwind the program as Ctrl-C does, so that it cleans up behind itself."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """That of a process which a signal ends: 130, or 143 for SIGTERM."""
    return 128 + int(interrupt.args[0] if interrupt.args else signal.SIGINT)


@contextmanager
def stop_on_signals(trainer: Trainer) -> Iterator[list[int]]:
    """Lets Ctrl-C and SIGTERM end training after the step at hand; a second one ends at once.

    Not so under torchrun: a scheduler's signal comes twice there, and in a while as SIGKILL.
    Gives the list of signals received.
    """
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        trainer.stop_requested = True
        if trainer.ranks.local_rank is None:
            signal.signal(number, previous[signal.Signals(number)])

    signals = signal.SIGINT, signal.SIGTERM
    previous = {number: signal.signal(number, stop) for number in signals}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def explain(error: Exception, run: RunFolder | None) -> str | None:
    """What went wrong and what to do about it, in one line; None for a defect of the program.

    Args:
        error: The error.
        run: The run that it ended; None before there was one.
    """
    if isinstance(error, FloatingPointError) and run:
        return (
            f"{error}. The run is saved as it is; begin a new one with a lower --learning-rate, "
            f"from its weights by --load {run.checkpoint}"
        )
    if isinstance(error, RecordingError | RankLostError):
        what = str(error)
    elif isinstance(error, OSError):
        what = f"cannot write: {error}"
    elif _is_out_of_memory(error):
        flags = "--batch-size, --eval-scenes, --model-steps, --num-scenes or the nets' sizes"
        what = f"out of memory; lower {flags}"
    else:
        return None
    return f"{what}. {run.resume_hint()}" if run else what


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    texts = "can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED"
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
