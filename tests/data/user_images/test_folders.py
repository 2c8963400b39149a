"""A folder is read as its owner sees it."""

import io
import logging
import unicodedata
from functools import partial
from pathlib import Path

import pytest
from helpers import assert_refused
from PIL import Image

from air.cli.flags import Parser
from air.data.scenes import DataError
from air.data.user_images.preparation import ImageSettings
from air.data.user_images.sources import find_files, load_data, sample_images


def picture(format: str = "PNG", level: int = 9, **options: bytes) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), level).save(file, format, **options)
    return file.getvalue()


def write(folder: Path, names: dict[str, bytes]) -> Path:
    for name, content in names.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def found(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in find_files(folder)}


@pytest.mark.parametrize(
    "name",
    [
        "@eaDir/a.png/SYNOPHOTO_THUMB_M.png", "$RECYCLE.BIN/S-1/$R1.png", "__MACOSX/._a.png",
        "System Volume Information/a.png", "#recycle/a.png", "lost+found/a.png", ".cache/a.png",
        "inner/@eaDir/a.png", "RECYCLER/a.png", "@Recently-Snapshot/a.png", "found.000/a.png",
    ],
)  # fmt: skip
def test_folders_of_systems_are_left_out(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, {"a.png": picture(), "inner/b.png": picture(), name: picture()})
    assert found(folder) == {"a.png", "inner/b.png"}


def test_the_content_of_a_file_says_whether_it_is_a_picture(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = {name: picture("JPEG") for name in ("a.jfif", "b.JPE", "c.jpeg", "d", "e.photo")}
    others = {"f.heic": b"heic", "g.HEIC": b"heic", "notes": b"text", "counts.csv": b""}
    folder = write(tmp_path, pictures | others | {"inner/counts.csv": b""})
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    with caplog.at_level(logging.WARNING):
        assert found(folder) == found(folder) == {*pictures}
    (said,) = (record.getMessage() for record in caplog.records)  # once
    kinds = "no suffix (1), .csv (1), .heic (2), link to nothing (1)"
    assert f"5 files are no pictures and are left out: {kinds}" in said


ACCENTS = [f"pâté {k}.png" for k in range(4)]
COMPOSED = [unicodedata.normalize("NFC", name) for name in ACCENTS]
DECOMPOSED = [unicodedata.normalize("NFD", name) for name in ACCENTS]
ODD = [" a.png", "b .png", "c\\d.png", "e.png"]


@pytest.mark.parametrize(
    ("names", "listed", "counts_file"),
    [
        (COMPOSED, DECOMPOSED, "counts.csv"),
        (DECOMPOSED, COMPOSED, "counts.csv"),
        (ODD, ODD, "counts.csv"),
        (names := ["a.png", "b.png", "Test/c.png"], names, "Counts.csv"),
        (names := ["a.png", "b.png", "TEST/c.png"], names, "COUNTS.CSV"),
    ],
)
def test_names_find_their_counts(
    names: list[str], listed: list[str], counts_file: str, tmp_path: Path
) -> None:
    """Whatever the accents, blanks and backslashes, and letters of reserved names."""
    lines = "\n".join(f"{name},{k}" for k, name in enumerate(listed))
    folder = write(tmp_path, dict.fromkeys(names, picture()) | {counts_file: lines.encode()})
    train, held_out, _ = load_data(folder)
    assert [*train.counts, *held_out.counts] == [*range(len(names))]
    assert len(held_out.counts) == 1


def test_malformed_metadata_do_not_damage_a_picture(tmp_path: Path) -> None:
    broken = picture(exif=b"Exif\0\0\0\x08\0\x02\x01\x12\0\x03")
    scenes = load_data(write(tmp_path, {"a.png": picture(), "b.png": broken, "c.png": picture()}))
    assert len(scenes.train.x) + len(scenes.test.x) == 3
    assert (scenes.train.x == 9).all()


def test_all_damaged_pictures_are_named_at_once(tmp_path: Path) -> None:
    good = {f"{k:02}.png": picture() for k in range(6)}
    bad = {
        "a.png": b"",
        "b.png": picture()[:45],
        "c.jpg": b"<html>",
        "d.png": b"",
        "test/e.png": b"",
    }
    folder = write(tmp_path, good | bad)
    ways = partial(load_data, folder), partial(sample_images, folder, ImageSettings(), 10)
    named = r"a\.png.*b\.png.*c\.jpg.*and 2 more"
    assert_refused("5 of 11 pictures cannot be used: ", named, *ways)


def test_all_that_is_wrong_with_counts_is_said_at_once(tmp_path: Path) -> None:
    pictures = {f"{k}.png": picture() for k in range(6)} | {"damaged.png": b""}
    lines = "\n".join(["0.png,1", "1.png,", "2.png,many", "3.png;4"])
    folder = write(tmp_path, pictures | {"counts.csv": lines.encode()})
    with pytest.raises(DataError, match=r"line 2: .*; .*line 3: .*; .*line 4"):
        load_data(folder)
    (folder / "counts.csv").write_text("0.png,1\n 1.png ,2\n")
    with pytest.raises(DataError, match=r"^5 of 7 pictures .* no count of 2\.png.*and 2 more"):
        load_data(folder)


def test_a_tilde_is_the_home_folder_in_both_forms_of_a_flag() -> None:
    parser = Parser()
    parser.add_argument("--data")
    parser.add_argument("-b")
    given = parser.parse_args(["--data=~/x.npz", "-b", "a=b"])
    assert given.data == str(Path("~/x.npz").expanduser())
    assert given.b == "a=b"
