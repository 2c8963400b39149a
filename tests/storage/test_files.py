"""Files: intact or as before, and never larger than expected."""

import copy
import zipfile
from pathlib import Path

import pytest

from air.storage.files import MAX_BYTES, UnusableFileError, check_unpacked_size, write_atomically


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint.pt"
    target.write_text("good")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, fail)
    assert target.read_text() == "good"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_that_unpacks_to_more_than_is_sane_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as bomb:
        zeros = bytes(1 << 26)
        for part in range(MAX_BYTES // len(zeros) + 1):
            if part < 2:
                bomb.writestr(f"archive/data/{part}", zeros)
            else:  # the same bytes again, under another name
                info = copy.copy(bomb.filelist[0])
                info.filename = f"archive/data/{part}"
                bomb.filelist.append(info)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(UnusableFileError, match=r"bomb\.pt unpacks to .* bytes, more than"):
        check_unpacked_size(path)
