"""Shapes have the side and the angle that are asked for, and antialiased edges."""

import math

import numpy as np
import pytest

from air.data.synthetic.sprites import FLATNESS, SHAPES, draw_sprite, tint


@pytest.mark.parametrize(
    ("shape", "area"), [("square", 2.0), ("ellipse", math.pi * FLATNESS), ("heart", 2.16)]
)
def test_each_shape_covers_its_known_area(shape: str, area: float) -> None:
    """The areas are for the unit circle; a heart's is 3.66 divided by the square of HEART_SIZE."""
    for side, angle in ((60, 0.0), (61, 0.3), (200, 2.0)):
        covered = draw_sprite(shape, side, angle).sum(dtype=float) / 255
        assert covered / (side / 2) ** 2 == pytest.approx(area, rel=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_circle_encloses_the_shape_at_every_angle(shape: str) -> None:
    side = 40
    middle = np.arange(side) - (side - 1) / 2
    outside = np.hypot(middle[:, None], middle) > side / 2 + 1
    reach = []
    for angle in np.linspace(0, 2 * math.pi, 24, endpoint=False):
        sprite = draw_sprite(shape, side, angle)
        assert not sprite[outside].any()
        reach.append(np.hypot(*(np.argwhere(sprite > 127) - (side - 1) / 2).T).max())
    assert min(reach) > 0.94 * side / 2 - 1  # the shape reaches the circle


@pytest.mark.parametrize("shape", SHAPES)
def test_a_quarter_turn_rotates_the_pixels(shape: str) -> None:
    upright, turned = draw_sprite(shape, 33, 0.2), draw_sprite(shape, 33, 0.2 + math.pi / 2)
    assert abs(np.rot90(upright).astype(int) - turned).mean() < 1


def test_shapes_have_the_symmetries_of_their_names() -> None:
    square, ellipse, heart = (draw_sprite(shape, 40, 0.0) for shape in SHAPES)
    assert len({a.tobytes() for a in (square, ellipse, heart)}) == 3
    for sprite in (square, ellipse, heart):
        assert np.array_equal(sprite, sprite[:, ::-1])
    for sprite in (square, ellipse):
        assert np.array_equal(sprite, sprite[::-1])
    assert heart[:20].sum() > 1.3 * heart[20:].sum()  # its point is below


def test_edges_are_antialiased() -> None:
    sprite = draw_sprite("ellipse", 18, 0.4)
    assert len(np.unique(sprite)) > 8
    assert {0, 255} <= {*sprite.flat}


def test_tint_scales_the_colour_by_the_coverage() -> None:
    covered, color = np.array([[0, 128], [255, 51]], np.uint8), np.array([255, 100, 0], np.uint8)
    expected = [[[0, 128], [255, 51]], [[0, 50], [100, 20]], [[0, 0], [0, 0]]]
    assert tint(covered, color).tolist() == expected
