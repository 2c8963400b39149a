"""Files that are written completely or not at all, and a guard against huge archives."""

import os
import shlex
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

MAX_BYTES = 8 << 30  # of a file of weights or scenes, unpacked


class UnusableFileError(ValueError):
    """A file or folder cannot be used; the message is one line for the user."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write(temporary path)``, then renames the temporary file to `path`.

    A reader finds the old file or the new one, never a part, even after a kill or a power failure,
    because the new file is flushed to the disk before it is renamed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def check_output_file(flag: str, path: Path, may_exist: bool = False) -> None:
    """Checks that the file that a flag names can be written, long before it is.

    With `may_exist`, it may be overwritten.
    """
    if path.exists() and not may_exist:
        raise UnusableFileError(f"{flag} never overwrites, and {path} exists; name another file")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise UnusableFileError(
            f"{flag}: there is no folder {path.parent} to write {path.name} into"
        )


def quoted(path: Path | str) -> str:
    """The path as a word of a command line that can be copied into a shell."""
    text = str(path)
    if text.startswith("-"):  # or it would be taken for a flag
        text = os.path.join(os.curdir, text)
    return shlex.quote(text) if os.name == "posix" else subprocess.list2cmdline([text])


def check_unpacked_size(path: Path) -> None:
    """Reads a zip file's table of contents, before anything is unpacked."""
    if path.is_file() and zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as file:
                size = sum(part.file_size for part in file.infolist())
        except Exception as error:  # zipfile raises errors of many types for foreign bytes
            raise UnusableFileError(f"{path} is damaged: {error}") from error
        if size > MAX_BYTES:
            raise UnusableFileError(
                f"{path} unpacks to {size:,} bytes, more than the {MAX_BYTES:,} of this program"
            )
