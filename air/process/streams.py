"""Standard output and standard error that never end a run.

A terminal may lack a character or be closed, a pipe may lose its reader, and the disk under a log
may be full. None of that is worth the loss of a run.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

PLAIN = {"±": "+-"}  # any other character that an encoding lacks becomes a question mark


@contextlib.contextmanager
def steady_streams(*, stdout_may_fail: bool = False) -> Iterator[None]:
    """Keeps failures of standard output and standard error from the program.

    In the block, ``sys.stdout`` and ``sys.stderr`` replace the characters that their encoding
    lacks, and drop text that cannot be written. A stream that is None drops all text. At the end
    of the block the former streams are back, except that a descriptor that still cannot be written
    leads to `os.devnull`. Otherwise the interpreter would fail to flush it, with exit code 120.

    Args:
        stdout_may_fail: Whether a failure of standard output raises OSError, for a program whose
            product is its standard output. The program is to flush it before the block ends.
    """
    _occupy_closed_descriptors()
    former = sys.stdout, sys.stderr
    steady = _SteadyStream(sys.stdout, stdout_may_fail), _SteadyStream(sys.stderr)
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in steady)
    try:
        yield
    finally:
        for name, own, before in zip(("stdout", "stderr"), steady, former, strict=True):
            own.finish()
            if getattr(sys, name) is own:  # not a stream that another thread has put there
                setattr(sys, name, before)


class _SteadyStream:
    """A text stream that raises no error, unless it `may_fail`; else the stream that it wraps."""

    def __init__(self, stream: TextIO | None, may_fail: bool = False) -> None:
        self._stream: Any = _ClosedStream(may_fail) if stream is None else stream
        self._may_fail = may_fail

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes the text, in characters that the stream has, or drops it."""
        with self._failures():
            encoding = getattr(self._stream, "encoding", None)
            # Then bytes of a file name that are no text are written as they are.
            as_is = getattr(self._stream, "errors", None) == "surrogateescape"
            errors = "surrogateescape" if as_is else "strict"
            plain = _encodable(text, encoding if isinstance(encoding, str) else "utf-8", errors)
            try:
                self._stream.write(plain)
            except UnicodeEncodeError:  # the stream passes text on to one of another encoding
                self._stream.write(_encodable(plain, "ascii"))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes the lines."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flushes the stream, if it can be."""
        with self._failures():
            self._flush()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        with contextlib.suppress(AttributeError, OSError, ValueError):
            return bool(self._stream.isatty())
        return False

    def finish(self) -> None:
        """Flushes the stream, or discards it."""
        try:
            self._flush()
        except (OSError, ValueError):
            self._discard()

    def _flush(self) -> None:
        getattr(self._stream, "flush", lambda: None)()  # a notebook's stream may have none

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Drops failures: the disk may have room again. Or raises them, and discards the stream."""
        try:
            yield
        except (OSError, ValueError):  # ValueError: the stream is closed
            if self._may_fail:
                self._discard()
                raise

    def _discard(self) -> None:
        """Lets the descriptor, if it is that of the process, lead to `os.devnull`."""
        with contextlib.suppress(AttributeError, OSError, ValueError):
            descriptor = self._stream.fileno()
            if descriptor in (1, 2):
                devnull = os.open(os.devnull, os.O_WRONLY)
                os.dup2(devnull, descriptor)
                os.close(devnull)
                self._flush()  # what was buffered


class _ClosedStream:
    """In place of a stream that was closed when the program began."""

    encoding = "utf-8"

    def __init__(self, may_fail: bool) -> None:
        self._may_fail = may_fail

    def write(self, text: str) -> int:
        if self._may_fail:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return len(text)

    def flush(self) -> None:
        pass


def _encodable(text: str, encoding: str, errors: str = "strict") -> str:
    """The text, with other characters for those that the encoding lacks."""
    try:
        text.encode(encoding, errors)
    except UnicodeEncodeError:
        if len(text) == 1:
            return PLAIN.get(text, "?")
        return "".join(_encodable(character, encoding, errors) for character in text)
    except LookupError:  # an encoding of another library
        pass
    return text


def _occupy_closed_descriptors() -> None:
    """Opens `os.devnull` as descriptor 0, 1 and 2 where they are closed.

    They stay open. Otherwise the next file to be opened would get the number, and what C code
    prints would go into that file.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
