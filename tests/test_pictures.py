"""The script that makes folders of pictures of other people's packages."""

import contextlib
import csv
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from tests.benchmarks.pictures import main


@pytest.fixture
def characters(tmp_path: Path) -> Iterator[Path]:
    """A file like Omniglot's: rings in two alphabets for training, crosses in another one."""
    path = tmp_path / "characters.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for alphabet in ("Latin", "Greek", "Balinese"):
            image = Image.new("1", (105, 105), 1)
            draw = ImageDraw.Draw(image)
            if alphabet == "Balinese":
                draw.line((20, 50, 80, 50), 0, 3)
                draw.line((50, 20, 50, 80), 0, 3)
            else:
                draw.ellipse((20, 20, 80, 80), None, 0, 3)
            data = io.BytesIO()
            image.save(data, "PNG")
            archive.writestr(f"images/{alphabet}/character01/0001_01.png", data.getvalue())
    with contextlib.chdir(tmp_path):
        yield path


def test_characters_are_counted_and_alphabets_of_test_pictures_are_new(characters: Path) -> None:
    assert main(["omniglot", "pictures", str(characters), "--number", "60"]) == 0
    with Path("pictures/counts.csv").open() as file:
        counts = {row["name"]: int(row["count"]) for row in csv.DictReader(file)}
    assert len(counts) == 66
    for name, count in counts.items():
        with Image.open(f"pictures/{name}") as picture:
            ink = 255 - np.asarray(picture)
        labels, number = ndimage.label(ink > 0, np.ones((3, 3)))
        assert number == count
        for part in ndimage.find_objects(labels):
            rows, columns = (int(side.start + side.stop) // 2 for side in part)
            assert bool(ink[rows, columns]) == name.startswith("test/")  # a cross, not a ring


def test_what_is_missing_is_said_in_one_line(
    characters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in ("omniglot pictures", f"omniglot {characters} {characters}"):
        with pytest.raises(SystemExit, match="2"):
            main(line.split())
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "error" in said
