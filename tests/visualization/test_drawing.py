"""Pictures are sharp, have boxes at the right places, and are otherwise unchanged."""

import math

import numpy as np
import pytest
from helpers import make_scenes, make_snapshot
from numpy.typing import NDArray

from air.visualization import drawing
from air.visualization.drawing import (
    STEP_COLOURS,
    draw_boxes,
    enlarge,
    object_sheet,
    overview,
    sheets,
    tile,
)


def mask(picture: NDArray[np.uint8], colour: tuple[int, int, int]) -> NDArray[np.bool_]:
    return np.array((picture == np.array(colour)).all(axis=-1))


def one_box(*box: float) -> NDArray[np.bool_]:
    """Where a single box is drawn on an empty 50x50 image at zoom 4."""
    pictures = draw_boxes(np.zeros((1, 50, 50)), np.array([[box]]), np.array([1]), zoom=4)
    return mask(pictures[0], STEP_COLOURS[0])


def frame(x0: int, y0: int, x1: int, y1: int) -> NDArray[np.bool_]:
    """A rectangle with lines two pixels wide, cut out of a larger plane."""
    plane = np.zeros((2200, 2200), bool)
    plane[1000 + y0 : 1000 + y1, 1000 + x0 : 1000 + x1] = True
    plane[1002 + y0 : 998 + y1, 1002 + x0 : 998 + x1] = False
    return plane[1000:1200, 1000:1200]


def test_pixels_become_squares_of_three_channels_in_colour_and_others_in_grey() -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 5), np.uint8)
    blocks = np.kron(images, np.ones((3, 3), np.uint8))
    np.testing.assert_array_equal(enlarge(images, zoom=3), blocks.transpose(0, 2, 3, 1))
    for given in (images[:, 0], images[:, :1], images[:, :2]):
        grey = given if given.ndim == 3 else given.mean(1).astype(np.uint8)
        coloured = np.stack([grey] * 3, 1)
        np.testing.assert_array_equal(enlarge(given, zoom=2), enlarge(coloured, zoom=2))


def test_boxes_leave_the_input_and_the_other_pixels_alone() -> None:
    scenes = make_scenes(6)
    before = [np.array(field) for field in scenes]
    pictures = draw_boxes(scenes.images, scenes.boxes, scenes.counts, zoom=4)
    for old, new in zip(before, scenes, strict=True):
        np.testing.assert_array_equal(old, new)
    touched = (pictures != enlarge(scenes.images, 4)).any(axis=-1)
    touched[:, :32, :32] = False  # the written count
    assert not (touched & ~mask(pictures, STEP_COLOURS[0]) & ~mask(pictures, STEP_COLOURS[1])).any()


@pytest.mark.parametrize("steps", [1, 8])
def test_only_steps_in_use_are_drawn(steps: int) -> None:
    counts = np.arange(-1, steps + 3)
    boxes = np.array([[[10, 12, 30, 32]]]) + 2 * np.arange(steps)[:, None]
    pictures = draw_boxes(np.zeros((len(counts), 50, 50)), boxes.repeat(len(counts), 0), counts)
    for count, picture in zip(counts, pictures, strict=True):
        for step, colour in enumerate(STEP_COLOURS):
            assert mask(picture, colour).any() == (step < min(int(count), steps)), (count, step)


@pytest.mark.parametrize(
    ("box", "lines"),
    [
        ((10.3, 5.6, 30.1, 40.9), (41, 22, 120, 164)),  # edges fall between image pixels
        ((30.1, 40.9, 10.3, 5.6), (41, 22, 120, 164)),  # as from a negative scale
        ((0.0, 0.0, 50.0, 50.0), (0, 0, 200, 200)),
        ((-5.0, 20.0, 20.0, 60.0), (-20, 80, 80, 240)),
        ((-1e30, 10.0, 20.0, 1e30), (-999, 40, 80, 999)),
        ((20.0, 20.0, 20.25, 20.5), (80, 80, 81, 82)),  # tiny boxes stay tiny
        ((-20, 10, -2, 30), None),
        ((10, 50, 30, 70), None),
        ((1e9, 1e9, 2e9, 2e9), None),
        ((-1e9, -1e9, 1e9, 1e9), None),
        ((20.0, 20.0, 20.0, 20.0), None),
        ((math.nan, 1, 9, 9), None),
        ((1, 1, math.inf, 9), None),
        ((-math.inf, 1, 9, 9), None),
    ],
)
def test_lines_are_where_the_box_is_and_nowhere_if_it_is_out_of_sight_or_not_finite(
    box: tuple[float, ...], lines: tuple[int, ...] | None
) -> None:
    expected = frame(*lines) if lines else np.zeros((200, 200), bool)
    np.testing.assert_array_equal(one_box(*box), expected)


def test_a_wrong_count_says_so() -> None:
    images, _, boxes, *_ = make_scenes(2)
    pictures = draw_boxes(images, boxes, np.array([1, 1]), true_counts=np.array([1, 2]))
    assert [mask(picture, drawing.LABEL_COLOURS[1]).any() for picture in pictures] == [False, True]


def test_tile_pads_the_last_row_with_gaps() -> None:
    pictures = np.stack([np.full((5, 7, 3), value, np.uint8) for value in (10, 20, 30)])
    grey, gap = drawing._GAP_COLOUR, drawing._GAP
    sheet = tile(pictures, 2)
    assert sheet.shape == (5 + gap + 5, 7 + gap + 7, 3)
    for value, y, x in ((10, 0, 0), (20, 0, -7), (30, -5, 0), (grey, -5, -7)):
        assert (sheet[y : y + 5 or None, x : x + 7 or None] == value).all()
    assert tile(pictures, 8).shape == (5, 3 * 7 + 2 * gap, 3)
    np.testing.assert_array_equal(tile(pictures, 2, rows=1), tile(pictures[:2], 2))
    empty = tile(pictures[:0], 4, rows=2)
    assert empty.shape == (2 * 5 + gap, 4 * 7 + 3 * gap, 3)
    assert (empty == grey).all()


def test_sheets_show_their_scenes() -> None:
    snapshot = make_snapshot(count=10)
    found = sheets(snapshot, 4, 3)
    images, rebuilt, boxes, counts, true, _ = snapshot.scenes
    drawn = draw_boxes(images, boxes, counts, 3, true)
    np.testing.assert_array_equal(found["inputs"], tile(enlarge(images, 3), 4))
    np.testing.assert_array_equal(found["reconstructions"], tile(enlarge(rebuilt, 3), 4))
    np.testing.assert_array_equal(found["inferred"], tile(drawn, 4))
    assert mask(found["errors"], drawing.LABEL_COLOURS[1]).any()
    rows = overview(snapshot, 3)[-3 * 150 - 2 * drawing._GAP :]
    cells = np.concatenate((enlarge(images[:8], 3), drawn[:8], enlarge(rebuilt[:8], 3)))
    np.testing.assert_array_equal(rows, tile(cells, 8))


def test_the_map_of_a_step_is_the_share_of_windows_over_each_pixel() -> None:
    scenes = make_scenes(9)
    side, steps = 50, scenes.boxes.shape[1]
    drawn = drawing.scan_map(scenes, 1)[-side:]  # below the titles
    for t in range(steps):
        expected = np.zeros((side, side))
        for y, x in np.ndindex(side, side):
            expected[y, x] = sum(
                x0 <= x + 0.5 < x1 and y0 <= y + 0.5 < y1
                for count, boxes in zip(scenes.counts, scenes.boxes, strict=True)
                for x0, y0, x1, y1 in boxes[t : t + 1]
                if count > t
            )
        shade = expected / max(expected.max(), 1)
        shown = drawn[:, t * (side + 4) :][:, :side] / np.array(STEP_COLOURS[t])
        below = slice(14, None)  # the number of scenes
        np.testing.assert_allclose(shown.max(-1)[below], shade[below], atol=0.02)


@pytest.mark.parametrize("steps", [1, 5])
def test_objects_stand_beside_what_their_step_attends_to(steps: int) -> None:
    snapshot = make_snapshot(steps=steps)
    counts = np.minimum(np.arange(20) % (steps + 1), steps)
    whole = np.tile([5.0, 5.0, 25.0, 25.0], (20, steps, 1))
    scenes = snapshot.scenes._replace(counts=counts, true_counts=counts, boxes=whole)
    snapshot = snapshot._replace(scenes=scenes, objects=np.full_like(snapshot.objects, 200))
    sheet = object_sheet(snapshot, 2)
    cells = 2 * steps + 2
    top = len(sheet) - 5 * 100 - 4 * drawing._GAP  # below the header
    assert sheet.shape[1] == cells * 100 + (cells - 1) * drawing._GAP

    def cell(row: int, column: int) -> NDArray[np.uint8]:
        size = 100 + drawing._GAP
        y, x = top + row * size, column * size
        return sheet[y : y + 100, x : x + 100]

    for row in range(5):
        np.testing.assert_array_equal(
            cell(row, cells - 1), enlarge(scenes.reconstructions[row : row + 1], 2)[0]
        )
        for step in range(steps):
            painted = cell(row, 2 + 2 * step)
            used = step < counts[row]
            assert mask(painted, STEP_COLOURS[step]).any() == used
            assert painted[1, 1, 0] == (200 if used else 200 * drawing._UNUSED)
            seen = cell(row, 1 + 2 * step)[-1, :, 0]  # below the number
            expected = snapshot.windows[row, step, -1] * (1.0 if used else drawing._UNUSED)
            np.testing.assert_array_equal(seen[::12][:8], expected.astype(np.uint8)[:8])
    assert len(object_sheet(snapshot, 2, 2)) == top + 2 * 100 + drawing._GAP
