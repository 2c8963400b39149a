"""Omniglot's archives: characters become bright on black; damaged archives are refused."""

import io
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from PIL import Image, ImageDraw

from air.data.scenes import DataError
from air.data.synthetic.omniglot import OMNIGLOT_FILES, load_omniglot, read_characters
from air.data.synthetic.scene_settings import Recipe, with_own_defaults
from air.multi_mnist import SceneSettings, load_scenes


def png(*line: int) -> bytes:
    """A dark line on white, 105 x 105, as Omniglot's pictures."""
    image = Image.new("1", (105, 105), 1)
    ImageDraw.Draw(image).line(line, 0, 3)
    image.save(packed := io.BytesIO(), "PNG")
    return packed.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Both archives; the characters are upright, slanting and level lines."""
    lines = {"upright": (50, 10, 50, 90), "slanting": (20, 20, 80, 80), "level": (5, 60, 95, 60)}
    for archive, names in zip(OMNIGLOT_FILES, (["upright", "slanting"], ["level"]), strict=True):
        with ZipFile(tmp_path / archive, "w") as file:
            for name in names:
                for n in range(2):
                    file.writestr(f"images/Alphabet/{name}/{n}.png", png(*lines[name]))
    return tmp_path


def test_characters_fill_their_square_and_have_their_numbers(folder: Path) -> None:
    train, train_labels, test, test_labels = load_omniglot(folder)
    assert (train.shape, train.dtype, test.shape) == ((4, 28, 28), np.uint8, (2, 28, 28))
    assert train_labels.tolist() == [0, 0, 1, 1]  # in the order of their names
    assert test_labels.tolist() == [0, 0]
    assert train.max((1, 2)).tolist() == [255] * 4
    slanting, upright, level = train[0], train[2], test[0]
    assert np.flatnonzero(upright.any(1)).tolist() == list(range(1, 27))  # a margin of one pixel
    assert abs(np.flatnonzero(upright.any(0)).mean() - 13.5) <= 0.5  # in the middle
    assert (level == upright.T).mean() > 0.95
    assert (np.diag(slanting)[3:-3] > 128).all()


@pytest.mark.parametrize(
    "content", [b"no archive", None, {"a.txt": b"text"}, {"a/b.png": png(0, 0, 0, 0)[:40]}]
)
def test_a_damaged_archive_is_refused(
    content: bytes | dict[str, bytes] | None, folder: Path
) -> None:
    path = folder / next(iter(OMNIGLOT_FILES))
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        with ZipFile(path, "w") as file:
            for name, data in content.items():
                file.writestr(name, data)
    with pytest.raises(DataError, match=f"^{path}: expected Omniglot's archive .*, got "):
        read_characters(path)


@pytest.mark.parametrize("recipe", ["omniglot", "strokes"])
def test_recipes_show_other_characters_in_held_out_scenes(
    recipe: Recipe, folder: Path, tmp_path: Path
) -> None:
    given = {"recipe": recipe, "num_scenes": 60, "num_test_scenes": 60}
    settings = SceneSettings(**with_own_defaults(given))
    splits = load_scenes(settings, cache_dir=tmp_path / "cache", mnist_dir=folder)
    for scenes, labels in ((splits.train, {0, 1}), (splits.test, {0})):
        if recipe == "omniglot":
            assert set(scenes.counts.tolist()) == {0, 1, 2, 3, 4}
        else:  # a stroke is an object, and nobody has counted them
            assert scenes.counts is None
        assert set(scenes.labels[scenes.labels >= 0].tolist()) == labels
