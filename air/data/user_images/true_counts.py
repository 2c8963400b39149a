"""The true counts of pictures, from counts.csv in their folder or from their names."""

import csv
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from air.data.scenes import DataError
from air.data.user_images.picture_files import COUNTS_FILE

MAX_NAMED = 3  # faults in an error
COUNT = r"0*(\d{1,9})"  # `split_scenes` checks how large counts are


class CountError(DataError):
    """The count of a picture is missing or not a number."""


class PictureCounts:
    """The counts of the pictures of a source.

    Args:
        path: The folder, or the picture itself.
        files: The pictures in it.
        pattern: A regular expression that finds the count in the name of a picture, in its one
            group; None to take counts.csv, if there is one.

    Raises:
        DataError: If counts.csv cannot be read.
    """

    def __init__(self, path: Path, files: Sequence[Path], pattern: str | None) -> None:
        self.path, self.pattern = path, None if pattern is None else _composed(pattern)
        # Some systems ignore case in names.
        same = [each for each in _inside(path) if each.name.lower() == COUNTS_FILE]
        self.file = min(same, key=lambda each: each.name != COUNTS_FILE, default=path / COUNTS_FILE)
        self._known = _read(self.file) if pattern is None and self.file.is_file() else None
        self._namesakes = Counter(file.name for file in files)

    def of(self, name: str, file: Path) -> int | None:
        """The true count of an image, by its name and its file; None if no counts are known.

        Raises:
            CountError: If its count is missing or not a number.
        """
        inside = file.relative_to(self.path).as_posix() if file != self.path else file.name
        page = inside + name.removeprefix(str(file))  # such as stack.tif[1]
        inside, page = _key(inside), _key(page)
        if self.pattern is not None:
            match = re.search(self.pattern, page)
            if match is None or not re.fullmatch(COUNT, match[1] or ""):
                raise CountError(f"{name}: --count-pattern matches no count in the name {page}")
            return int(match[1])
        if self._known is None:
            return None
        without_folder = _key(file.name) if self._namesakes[file.name] == 1 else page
        for key in (page, inside, without_folder):
            if key in self._known:
                return self._known[key]
        raise CountError(f"{self.file}: no count of {page}; expected a line {page},count")


def _inside(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.is_dir() else []


def _composed(name: str) -> str:
    """A name with its accents composed, as most programs write them; macOS decomposes them."""
    return unicodedata.normalize("NFC", name)


def _key(name: str) -> str:
    """The name of a picture as counts.csv is read: composed, with slashes, without outer blanks."""
    return _composed(name.replace("\\", "/").removeprefix("./").strip())


def _read(file: Path) -> dict[str, int]:
    """The counts in a CSV file of name,count, with or without a header, by name."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = [[cell.strip() for cell in row] for row in csv.reader(lines)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    if rows and rows[0] and not re.fullmatch(r"[-+.\d]*", rows[0][-1]):
        rows[0] = []  # a header
    counts: dict[str, int] = {}
    faults = []
    for number, row in enumerate(rows, 1):
        if not any(row):
            continue
        where = f"{file}, line {number}"
        if len(row) != 2 or not re.fullmatch(COUNT, row[1]):
            given = " ".join(",".join(row).split())[:80]
            faults.append(f"{where}: expected name,count, got {given}")
            continue
        name, count = _key(row[0]), int(row[1])
        if counts.setdefault(name, count) != count:
            faults.append(f"{where}: {name} has two counts, {counts[name]} and {count}")
    if faults:
        raise DataError(first_few(faults))
    return counts


def first_few(faults: Sequence[str], of: str = "") -> str:
    """The first faults in one line, and the number of all, for example "of 20 pictures"."""
    more = f"; and {len(faults) - MAX_NAMED} more" if len(faults) > MAX_NAMED else ""
    number = f"{len(faults)} {of}: " if of and len(faults) > 1 else ""
    return number + "; ".join(faults[:MAX_NAMED]) + more
