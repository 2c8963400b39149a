"""The true counts of pictures, from counts.csv in their folder or from their names."""

import csv
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from air.data.scenes import MAX_COUNT, DataError
from air.data.user_images.picture_files import COUNTS_FILE


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
        self.path, self.pattern = path, pattern
        self.file = path / COUNTS_FILE
        self._known = _read(self.file) if pattern is None and self.file.is_file() else None
        self._namesakes = Counter(file.name for file in files)

    def of(self, name: str, file: Path) -> int | None:
        """The true count of an image, by its name and its file; None if no counts are known.

        Raises:
            DataError: If its count is missing or not a number.
        """
        inside = file.relative_to(self.path).as_posix() if file != self.path else file.name
        page = inside + name.removeprefix(str(file))  # such as stack.tif[1]
        if self.pattern is not None:
            match = re.search(self.pattern, page)
            if match is None or not (match[1] or "").isdecimal():
                raise DataError(f"{name}: --count-pattern matches no count in the name {page}")
            return _to_count(match[1], name)
        if self._known is None:
            return None
        keys = [page, inside]
        if self._namesakes[file.name] == 1:
            keys.append(file.name)  # without its folder
        for key in keys:
            if key in self._known:
                return self._known[key]
        raise DataError(f"{self.file}: no count of {page}; expected a line {page},count")


def _read(file: Path) -> dict[str, int]:
    """The counts in a CSV file of name,count, with or without a header, by name."""
    counts: dict[str, int] = {}
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            for number, row in enumerate(csv.reader(lines), 1):
                cells = [cell.strip() for cell in row]
                if not any(cells) or (number == 1 and _is_header(cells)):
                    continue
                where = f"{file}, line {number}"
                if len(cells) != 2 or not cells[1].isdecimal():
                    given = " ".join(",".join(row).split())
                    raise DataError(f"{where}: expected name,count, got {given}")
                name = cells[0].replace("\\", "/").removeprefix("./")
                count = _to_count(cells[1], where)
                if counts.setdefault(name, count) != count:
                    raise DataError(f"{where}: {name} has two counts, {counts[name]} and {count}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    return counts


def _is_header(cells: Sequence[str]) -> bool:
    return not re.fullmatch(r"[-+.\d]*", cells[-1])


def _to_count(digits: str, where: str) -> int:
    digits = digits.lstrip("0") or "0"
    if len(digits) > len(str(MAX_COUNT)) or int(digits) > MAX_COUNT:
        raise DataError(f"{where}: expected a count of at most {MAX_COUNT:,}, got {digits[:20]}")
    return int(digits)
