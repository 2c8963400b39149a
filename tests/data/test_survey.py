"""Images are surveyed without labels; probable mistakes are reported when data are loaded."""

import re
from pathlib import Path

import numpy as np
import pytest
from helpers import squares
from PIL import Image

from air.data.scenes import MAX_COUNT, Array, Scenes, SceneSplits
from air.data.survey import brightness_hints, data_hints, survey
from air.data.user_images.preparation import ImageSettings
from air.data.user_images.sources import sample_images

RNG = np.random.default_rng(0)
COUNTS = np.repeat([0, 1, 2], 20)


def scenes(number: int = 60, side: int = 12, ink: int = 255, ground: int = 0) -> Array:
    """Images of a square on a background."""
    x = np.full((number, side, side), ground, np.uint8)
    x[:, 2:5, 2:5] = ink
    return x


def hints(
    x: Array, counts: Array | None = None, test_counts: Array | None = None, num_steps: int = 3
) -> list[str]:
    test_x = x[: len(x) if test_counts is None else len(test_counts)]
    return data_hints(SceneSplits(Scenes(x, counts), Scenes(test_x, test_counts), ""), num_steps)


def test_usual_data_need_no_hint() -> None:
    counts = RNG.integers(0, 3, 60)
    assert hints(scenes()) == []
    assert hints(scenes(), counts, RNG.permutation(counts)) == []
    assert hints(np.stack([scenes()] * 3, 1)) == []
    assert brightness_hints(scenes(0)) == []


@pytest.mark.parametrize(
    ("x", "hint"),
    [
        (scenes(ink=1), "the largest value in the images is 1 of 255, nearly black; scale them"),
        (scenes(ink=16), "the largest value in the images is 16 of 255"),  # 12 bits as 16
        (scenes(ink=0, ground=255), "the background is light .*, add --invert, or train with --b"),
        (scenes(ground=60), r"the background is not black \(60 of 255\).* --background-m"),
        (scenes(2, side=201), "images of 201 x 201 pixels need much memory and time; reduce"),
    ],
    ids=["binary", "12 bits", "dark on light", "grey ground", "large"],
)
def test_unusual_images_are_hinted_at(x: Array, hint: str) -> None:
    for train in (Scenes(x), Scenes(x[:0], np.zeros(0, int))):  # or held-out scenes alone
        (found,) = data_hints(SceneSplits(train, Scenes(x), ""), 3)
        assert re.match(hint, found)
        assert "\n" not in found


@pytest.mark.parametrize("ground", [60, 255])
def test_a_model_of_the_background_needs_no_black(ground: int) -> None:
    x = scenes(ink=0, ground=ground)
    splits = SceneSplits(Scenes(x), Scenes(x), "")
    assert data_hints(splits, 3, on_black=False) == brightness_hints(x, on_black=False) == []
    assert len(data_hints(splits, 3)) == len(brightness_hints(x)) == 1


def test_more_objects_than_steps_are_hinted_at() -> None:
    counts = np.repeat([0, 4], 30)
    (hint,) = hints(scenes(), counts)
    assert hint.startswith("some scenes have 4 objects, but the model counts at most 3; raise")
    assert hints(scenes(), counts, num_steps=4) == []
    assert hints(scenes(), counts * 0, counts)[0] == hint
    assert len(hints(scenes(), np.full(60, MAX_COUNT), counts * 0)) == 2


def test_sorted_data_are_hinted_at() -> None:
    (hint,) = hints(scenes(), COUNTS[:40], COUNTS[40:])
    assert "(2.0 and 0.5 on average); if the data are sorted, shuffle them" in hint
    mixed = RNG.permutation(COUNTS)
    assert hints(scenes(), mixed[:40], mixed[40:]) == []
    assert hints(scenes(), mixed, np.full(9, 2)) == []  # nine scenes say little
    assert len(hints(scenes(), COUNTS[:57], COUNTS[57:])) == 1  # but the order says more


def test_a_survey_measures_images() -> None:
    images = squares(80, (60, 60), side=9, most=3)
    found = survey(images)
    assert found.images == 80
    assert sorted(found.counts) == [0] * 20 + [1] * 20 + [2] * 20 + [3] * 20
    assert found.most == 3
    assert found.side(50) == found.side(90) == 9 / 60
    assert (found.is_coloured, found.is_black, found.is_white) == (False, True, False)
    light = survey(~images)
    assert (round(light.level), light.is_black, light.is_white) == (255, False, True)
    np.testing.assert_array_equal(light.counts, found.counts)
    np.testing.assert_allclose(light.worths, found.worths, rtol=1e-3)
    coloured = survey(squares(80, (20, 20), 5, 2, channels=3))
    assert coloured.is_coloured
    noisy = RNG.normal(100, 12.75, (50, 30, 30)).astype(np.uint8)
    assert survey(noisy).noise == pytest.approx(0.05, rel=0.05)


def test_images_without_objects_have_a_survey() -> None:
    found = survey(np.zeros((3, 8, 8), np.uint8))
    assert (found.most, len(found.sides), found.is_black) == (0, 0, True)
    assert 0 < found.side(50) < 1


def test_a_sample_is_random_repeatable_and_of_training_images(tmp_path: Path) -> None:
    def read(source: Path, most: int) -> list[int]:
        return [int(x[0, 0, 0]) for x in sample_images(source, ImageSettings(), most)]

    np.save(tmp_path / "x.npy", np.arange(70, dtype=np.uint8).repeat(16).reshape(70, 4, 4))
    found = read(tmp_path, 20)
    assert len(set(found)) == 20
    assert found == read(tmp_path, 20) == sorted(found)
    assert len({n % 7 for n in found}) > 3  # files sorted by kind are all seen
    assert read(tmp_path, 70) == list(range(70))
    folder = tmp_path / "pictures"
    for name, level in (("a", 1), ("b", 2), ("test/c", 3)):
        file = folder / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), level, np.uint8)).save(file)
    assert read(folder, 9) == [1, 2]
    assert read(folder / "test", 9) == [3]
