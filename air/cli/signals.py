"""Signals: Ctrl-C and SIGTERM end a run in order."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def terminate_like_interrupt() -> Iterator[None]:
    """Lets SIGTERM raise KeyboardInterrupt, as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """The exit code of a process that a signal ended: 130, or 143 for SIGTERM."""
    return 128 + int(interrupt.args[0] if interrupt.args else signal.SIGINT)


@contextmanager
def stop_on_signals(stop: Callable[[], None], ignore_second: bool = False) -> Iterator[list[int]]:
    """Calls `stop` at Ctrl-C and SIGTERM, and lists the signals received.

    Args:
        stop: Asks the program to end in order.
        ignore_second: A second signal ends the program at once, unless it is to be ignored, as
            under torchrun, which repeats the signal of a scheduler.
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        stop()
        if not ignore_second:
            signal.signal(number, previous[signal.Signals(number)])

    signals = signal.SIGINT, signal.SIGTERM
    previous = {number: signal.signal(number, handle) for number in signals}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
