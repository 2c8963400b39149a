"""Signals end a run in order: Ctrl-C, and those by which shells and schedulers end a program."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# SIGHUP: a terminal was closed. SIGUSR1 and SIGUSR2: a scheduler warns of the end of the time.
# SIGXCPU: the CPU time is used up. Windows has the first two alone.
ENDING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")


class Signals:
    """Decides the effect of a signal: KeyboardInterrupt or, in training, a request to stop.

    After such a request the run is saved. A second signal of the same kind then interrupts the
    program. One of another kind has no effect: a scheduler sends SIGUSR1 first, SIGTERM later.
    """

    def __init__(self) -> None:
        self._received: list[int] = []  # while training
        self._stop: Callable[[], None] | None = None
        self._ignore_repeated = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal, as Python calls handlers."""
        repeated = number in self._received
        if self._stop is None or (repeated and not self._ignore_repeated):
            raise KeyboardInterrupt(number)
        self._received.append(number)
        self._stop()

    def ask_by(self, stop: Callable[[], None], ignore_repeated: bool = False) -> None:
        """From now on a signal calls `stop`, which asks training to stop.

        Args:
            stop: Asks training to stop.
            ignore_repeated: Whether repeated signals have no effect, as under torchrun, which
                repeats the signal of a scheduler.
        """
        self._stop, self._ignore_repeated = stop, ignore_repeated

    def first(self) -> int | None:
        """The first signal since `ask_by`; if there is none, None, and signals interrupt again.

        With `ignore_repeated` they do not: another process may have received a signal, and its
        repetition must not interrupt the saving here.
        """
        if not (self._received or self._ignore_repeated):
            self._stop = None
        return next(iter(self._received), None)  # a signal may have come meanwhile


@contextmanager
def interrupt_on_signals() -> Iterator[Signals]:
    """Lets the signals of `ENDING` raise KeyboardInterrupt, whose argument is the signal's number.

    A signal that is ignored, as SIGHUP is under nohup, or whose handler is not Python's is left
    alone. In a thread other than the main thread, where Python handles no signals, all are.
    """
    signals = Signals()
    previous = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
        handlers = {number: signal.getsignal(number) for number in numbers}
        previous = {n: h for n, h in handlers.items() if h not in (signal.SIG_IGN, None)}
    try:
        for number in previous:
            signal.signal(number, signals.handle)
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """The exit code of a process that a signal ended: 130, or 143 for SIGTERM."""
    return 128 + int(interrupt.args[0] if interrupt.args else signal.SIGINT)
