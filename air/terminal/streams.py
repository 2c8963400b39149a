"""Standard output and standard error whose failures do not end a run."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


@contextlib.contextmanager
def steady_streams(*, stdout_may_fail: bool = False) -> Iterator[None]:
    """Ignores failures of ``sys.stdout`` and ``sys.stderr`` in the block.

    A closed terminal, a pipe without a reader and a full disk under a log are no reason to lose a
    run, nor is a character that an encoding lacks: it is printed as a question mark. Warnings of
    the log go to ``sys.stderr``, unless the program that surrounds this one has a log of its own.

    Args:
        stdout_may_fail: Whether a failure of standard output raises OSError, for a program whose
            product is its standard output. The program must flush it before the block ends.
    """
    former, log = (sys.stdout, sys.stderr), logging.getLogger()
    handlers, errors = [*log.handlers], [getattr(each, "errors", None) for each in former]
    with open(os.devnull, "w") as devnull:
        for stream in former:
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        # A stream that was closed when the program began is None.
        out, err = (_SteadyStream(stream or devnull) for stream in former)
        sys.stdout = former[0] if stdout_may_fail else cast(TextIO, out)
        sys.stderr = cast(TextIO, err)
        logging.basicConfig(format="%(levelname)s: %(message)s")
        try:
            yield
        finally:
            sys.stdout, sys.stderr = former
            log.handlers[:] = handlers
            for stream, rule in zip(former, errors, strict=True):
                if stream is None:
                    continue
                try:
                    stream.flush()
                    if hasattr(stream, "reconfigure"):
                        stream.reconfigure(errors=rule)
                except OSError:  # the interpreter would fail to flush it too, with exit code 120
                    os.dup2(devnull.fileno(), stream.fileno())


class _SteadyStream:
    """A text stream that drops text which cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()
