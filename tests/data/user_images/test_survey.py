"""Data that are probably not what their owner means are named when they are loaded."""

import re
from pathlib import Path

import numpy as np
import pytest
from air.data.shards import map_scenes

from air.data.scenes import MAX_COUNT, Array, Scenes, SceneSplits
from air.data.user_images.survey import brightness_hints, data_hints

RNG = np.random.default_rng(0)


def scenes(number: int = 40, side: int = 12, ink: int = 255, ground: int = 0) -> Array:
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
    counts = RNG.integers(0, 3, 40)
    assert hints(scenes()) == []
    assert hints(scenes(), counts, RNG.permutation(counts)) == []
    assert hints(np.stack([scenes()] * 3, 1)) == []
    assert brightness_hints(scenes(0)) == []


@pytest.mark.parametrize(
    ("x", "hint"),
    [
        (scenes(ink=1), "the largest value of the images is 1 of 255, nearly black; scale them"),
        (scenes(ink=16), "the largest value of the images is 16 of 255"),  # 12 bits as 16
        (scenes(ink=0), "the largest value of the images is 0 of 255"),
        (scenes(ink=0, ground=255), "the images are light .*, add --invert, or --preset backg"),
        (scenes(ground=60), r"the background is not black \(median 60 of 255\).* --preset backg"),
        (scenes(2, side=201), "images of 201 x 201 pixels need much memory and time; --x-size"),
    ],
    ids=["binary", "12 bits", "black", "dark on light", "grey ground", "large"],
)
def test_unusual_images_are_hinted_at(x: Array, hint: str) -> None:
    (found,) = hints(x)
    assert re.match(hint, found)
    assert "\n" not in found


@pytest.mark.parametrize("ground", [60, 255])
def test_a_model_of_the_background_needs_no_black(ground: int) -> None:
    x = scenes(ink=0, ground=ground)
    splits = SceneSplits(Scenes(x, None), Scenes(x, None), "")
    assert data_hints(splits, 3, on_black=False) == brightness_hints(x, on_black=False) == []
    assert len(data_hints(splits, 3)) == len(brightness_hints(x)) == 1


def test_more_objects_than_steps_are_hinted_at() -> None:
    counts = np.repeat([0, 4], 20)
    (hint,) = hints(scenes(), counts)
    assert hint.startswith("some scenes hold 4 objects, more than the 3 that the model can count")
    assert hints(scenes(), counts, num_steps=4) == []
    assert hints(scenes(), counts * 0, counts)[0] == hint
    assert len(hints(scenes(), np.full(40, MAX_COUNT), counts * 0)) == 2


def test_sorted_data_are_hinted_at() -> None:
    counts = np.repeat([0, 1, 2], 20)
    x = scenes(60)
    (hint,) = hints(x, counts[:40], counts[40:])
    assert "(2.0 and 0.5 on average); if the data are sorted, shuffle them" in hint
    mixed = RNG.permutation(counts)
    assert hints(x, mixed[:40], mixed[40:]) == []
    assert hints(x, mixed, np.full(9, 2)) == []  # nine scenes say little
    assert len(hints(x, counts[:57], counts[57:])) == 1  # but the order says more


def test_held_out_scenes_alone_are_looked_at() -> None:
    empty = Scenes(scenes()[:0], np.zeros(0, int))
    (hint,) = data_hints(SceneSplits(empty, Scenes(scenes(ink=9), np.zeros(40, int)), ""), 3)
    assert hint.startswith("the largest value")


def test_scenes_in_files_are_looked_at(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", scenes(1200, ink=1))
    (hint,) = data_hints(map_scenes(tmp_path), 3)
    assert hint.startswith("the largest value of the images is 1 of 255")
