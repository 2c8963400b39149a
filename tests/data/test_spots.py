"""Spots are the objects that were drawn, on every background, and no label is needed."""

import numpy as np
import pytest

from air.data.scenes import Array
from air.data.spots import SpotFinder, fit_finder
from air.multi_mnist import SceneSettings, load_scenes

SIDE = 40


def discs(
    number: int, radius: float = 4.0, most: int = 3
) -> tuple[Array, list[set[tuple[int, ...]]]]:
    """Opacities of discs far from each other, [N, H, H], and their boxes."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    x, boxes = np.zeros((number, SIDE, SIDE)), []
    for image in x:
        centres: list[tuple[int, int]] = []
        wanted = int(rng.integers(most + 1))
        while len(centres) < wanted:
            a, b = (int(each) for each in rng.integers(6, SIDE - 6, 2))
            if all(max(abs(a - c), abs(b - d)) > 13 for c, d in centres):
                centres.append((a, b))
                image[np.hypot(rows - a, columns - b) <= radius] = 1
        r = int(radius)
        boxes.append({(b - r, a - r, b + r + 1, a + r + 1) for a, b in centres})
    return x, boxes


def found_boxes(finder: SpotFinder, x: Array) -> list[set[tuple[int, ...]]]:
    return [{tuple(box.tolist()) for box in spots.boxes} for spots in finder(x)]


def paint(opacity: Array, background: Array, level: float) -> Array:
    return (background * (1 - opacity) + level * opacity).astype(np.uint8)


@pytest.mark.parametrize("kind", ["black", "white", "ramps", "noise", "camera", "colour"])
def test_discs_are_found_on_every_background(kind: str) -> None:
    rng = np.random.default_rng(1)
    opacity, boxes = discs(120)
    slopes = rng.uniform(-60, 60, (120, 2, 1, 1))
    rows, columns = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    background, level = {
        "black": (np.zeros((1, SIDE, SIDE)), 250),
        "white": (np.full((1, SIDE, SIDE), 255.0), 30),
        "ramps": (100 + slopes[:, 0] * rows + slopes[:, 1] * columns, 240),
        "noise": (rng.normal(80, 8, (120, SIDE, SIDE)).clip(0, 255), 220),
        "camera": (rng.integers(0, 120, (1, SIDE // 4, SIDE // 4)).repeat(4, 1).repeat(4, 2), 250),
        "colour": (np.full((1, SIDE, SIDE), 90.0), 90),
    }[kind]
    x = paint(opacity, background, level)
    if kind == "colour":  # the discs differ in one channel only
        x = np.stack((x, paint(opacity, background, 200), x), 1)
    finder = fit_finder(x)
    assert (finder.picture is not None) == (kind == "camera")
    found = found_boxes(finder, x)
    right = np.mean([a == b for a, b in zip(found, boxes, strict=True)])
    assert right == 1.0 if kind != "noise" else right > 0.8
    assert np.mean([len(a) == len(b) for a, b in zip(found, boxes, strict=True)]) > 0.98


def test_colours_that_the_background_lacks_stand_out() -> None:
    """Of discs as light as the stones around them; a plane through the border explains neither."""
    opacity, boxes = discs(120)
    stones = np.random.default_rng(2).integers(40, 200, (120, SIDE // 2, SIDE // 2))
    stones = stones.repeat(2, 1).repeat(2, 2)[:, None].repeat(3, 1)
    red = np.array([190, 60, 60])[:, None, None]
    x = (stones * (1 - opacity[:, None]) + red * opacity[:, None]).astype(np.uint8)
    counts = [len(each) for each in boxes]
    assert [len(spots) for spots in fit_finder(x)(x)] == counts
    grey = x.mean(1).astype(np.uint8)
    assert np.equal([len(spots) for spots in fit_finder(grey)(grey)], counts).mean() < 0.5


def test_a_background_is_no_spot() -> None:
    """Strokes that cross whole images deviate as much as a low threshold asks for."""
    opacity, boxes = discs(120)
    x = paint(opacity, np.full((1, SIDE, SIDE), 100.0), 250)
    shifts = np.random.default_rng(0).integers(4, size=len(x))
    for image, k in zip(x, shifts, strict=True):
        lines = np.zeros((SIDE, SIDE), bool)
        lines[k::4] = lines[:, k::4] = True
        image[lines & (image == 100)] = 140
    counts = [len(spots) for spots in fit_finder(x)(x)]
    assert np.equal(counts, [len(each) for each in boxes]).mean() > 0.95


def test_a_dot_belongs_to_its_neighbour_and_a_ball_is_an_object() -> None:
    opacity, _ = discs(60, radius=5, most=1)
    x = paint(opacity, np.zeros((1, SIDE, SIDE)), 250)
    finder = fit_finder(x)
    image = np.zeros((SIDE, SIDE), np.uint8)
    image[10:20, 10:20] = 250
    image[6:8, 14:16] = 250  # 2 pixels above it
    (with_dot,) = found_boxes(finder, image[None])
    assert with_dot == {(10, 6, 20, 20)}
    image[30:32, 32:34] = 250
    (with_ball,) = found_boxes(finder, image[None])
    assert with_ball == {(10, 6, 20, 20), (32, 30, 34, 32)}
    image[30, 0] = 250  # a pixel alone is a speck
    assert found_boxes(finder, image[None]) == [with_ball]


def test_dust_is_no_object() -> None:
    """Bright, and far more than the discs: thirty grains on each image."""
    opacity, boxes = discs(120)
    x, rng = paint(opacity, np.zeros((1, SIDE, SIDE)), 150), np.random.default_rng(1)
    for image in x:
        for y, a in rng.integers(SIDE - 2, size=(30, 2)):
            if not image[max(y - 3, 0) : y + 5, max(a - 3, 0) : a + 5].any():
                image[y : y + 2, a : a + 2] = 250
    finder = fit_finder(x)
    assert not finder.specks
    assert found_boxes(finder, x) == boxes


def test_the_worth_is_the_squared_deviation() -> None:
    opacity, boxes = discs(100)
    x = paint(opacity, np.full((1, SIDE, SIDE), 51.0), 204)
    found = fit_finder(x)(x)
    pixels = opacity[[len(b) > 0 for b in boxes]].sum() / sum(map(len, boxes))
    worths = np.concatenate([spots.worths for spots in found])
    np.testing.assert_allclose(worths, pixels * (153 / 255) ** 2, rtol=1e-3)


def test_an_unsure_image_says_so() -> None:
    x, _ = discs(100)
    x = (250 * x).astype(np.uint8)
    finder = fit_finder(x)
    faint = x[:1] * 0
    low, high = finder.thresholds
    faint[0, 20:26, 20:26] = int((low + high) / 2)
    assert not finder(faint)[0].sure
    assert sum(spots.sure for spots in finder(x)) == len(x)


def test_spots_are_hidden_with_one_pixel_around() -> None:
    x = np.zeros((2, SIDE, SIDE), np.uint8)
    x[0, 10:20, 8:16] = x[1, :5, 20:25] = x[1, 30:, :7] = 250
    expected = np.zeros(x.shape, bool)
    expected[0, 9:21, 7:17] = expected[1, :6, 19:26] = expected[1, 29:, :8] = True
    finder = SpotFinder(None, 0.0, (50.0, 90.0), 50.0, 8.0, True, 1.0)
    np.testing.assert_array_equal(finder.hide(x, finder(x)), expected)


def test_the_cover_is_the_spots_and_what_touches_them() -> None:
    x = np.zeros((1, SIDE, SIDE), np.uint8)
    x[0, 10:18, 20:28] = 200
    x[0, 12:16, 22:26] = 0  # a hole is a part of the spot
    x[0, 30, 5:8] = 200  # too small
    expected = np.zeros(x.shape, bool)
    expected[0, 9:19, 19:29] = True
    finder = SpotFinder(None, 0.0, (50.0, 90.0), 50.0, 8.0, True, 1.0)
    assert np.array_equal(finder.cover(x, finder(x)), expected)


def test_images_without_objects_have_no_spots() -> None:
    for x in (np.zeros((5, 8, 8), np.uint8), np.full((3, 3, 9, 9), 7, np.uint8)):
        finder = fit_finder(x)
        assert [len(spots) for spots in finder(x)] == [0] * len(x)
        assert finder.agreement == 0


def test_digits_are_counted_as_by_a_threshold_or_better() -> None:
    scenes = load_scenes(SceneSettings(num_scenes=400, num_test_scenes=2)).train
    finder = fit_finder(scenes.x)
    again = fit_finder(scenes.x)
    assert finder[1:] == again[1:]
    right = [len(s) == n for s, n in zip(finder(scenes.x), scenes.counts, strict=True)]
    assert np.mean(right) > 0.92
