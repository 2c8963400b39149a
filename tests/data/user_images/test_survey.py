"""Images are surveyed without labels; probable mistakes are reported when data are loaded."""

import re
from pathlib import Path

import numpy as np
import pytest
from helpers import squares

from air.data.scenes import MAX_COUNT, Array, Scenes, SceneSplits
from air.data.user_images.preparation import ImageSettings
from air.data.user_images.sources import source_images
from air.data.user_images.survey import brightness_hints, data_hints, sample_images, survey

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
        (scenes(ink=0, ground=255), "the background is light .*, add --invert, or --preset backg"),
        (scenes(ground=60), r"the background is not black \(60 of 255\).* --preset backg"),
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
    images = squares(80, (60, 48), side=9, most=3)
    found = survey(list(images))
    assert (found.widths, found.heights) == ((48, 48), (60, 60))
    assert (found.is_coloured, found.background) == (False, 0.0)
    assert sorted(found.counts) == [0] * 20 + [1] * 20 + [2] * 20 + [3] * 20
    assert found.most == 3
    assert found.side(50) == found.side(90) == 9 / 60
    assert found.coverage == pytest.approx((images > 0).mean())
    assert survey(list(~images)) == found._replace(background=255)
    colours = list(squares(8, (20, 20), 5, 2, channels=3))
    mixed = survey([*colours, np.full((1, 9, 30), 200, np.uint8)])
    assert (mixed.widths, mixed.heights, mixed.is_coloured) == ((20, 30), (9, 20), True)


def test_specks_and_objects_that_touch_do_not_count() -> None:
    images = squares(90, (48, 48), side=8, most=2)
    images[::2, 0, 40:42, 40:42] = 255  # a speck
    images[1, 0, :8, 8:16] = 255  # one of 90 images shows two squares that touch
    found = survey(list(images))
    assert found.most == 2
    assert found.side(90) == 8 / 48


def test_a_sample_is_spread_over_the_images_and_loads_no_others(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(70, dtype=np.uint8).repeat(16).reshape(70, 4, 4))
    found = source_images(tmp_path, ImageSettings(), lambda number: number // 10)
    assert [int(pixels[0, 0, 0]) for _, pixels in found] == list(range(0, 70, 7))
    assert len(sample_images(tmp_path, ImageSettings(), 20)) == 18  # every fourth
