"""Coloured shapes in the manner of dSprites: squares, ellipses and hearts, drawn here.

Each lies within the circle of its size, turned by any angle, with antialiased edges.
"""

import math

import numpy as np

from air.data.digits import Array

SHAPES = ("square", "ellipse", "heart")
SAMPLES = 4  # a side, in each pixel, to antialias
FLATNESS = 0.6  # of the ellipse: its short axis in terms of the long one
HEART_SIZE, HEART_CENTRE = 1.3, 0.15  # of its curve, so that the unit circle encloses it


def draw_sprite(shape: str, side: int, angle: float) -> Array:
    """How much of each pixel a shape covers, in 255ths: uint8 [side, side].

    Args:
        shape: One of `SHAPES`.
        side: Diameter in pixels of the circle around it.
        angle: By which it is turned, in radians.
    """
    centres = (2 * np.arange(side * SAMPLES) + 1) / (side * SAMPLES) - 1
    x, y = centres[None, :], -centres[:, None]  # y upwards
    # Rounded, so that all platforms' cosines agree.
    cos, sin = round(math.cos(angle), 12), round(math.sin(angle), 12)
    inside = _is_inside(shape, cos * x + sin * y, cos * y - sin * x)
    covered = inside.reshape(side, SAMPLES, side, SAMPLES).sum((1, 3))
    return (covered * 255 // SAMPLES**2).astype(np.uint8)


def _is_inside(shape: str, x: Array, y: Array) -> Array:
    """Which points belong to a shape that the unit circle encloses."""
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= math.sqrt(0.5)
    if shape == "ellipse":
        return x**2 + (y / FLATNESS) ** 2 <= 1
    x, y = HEART_SIZE * x, HEART_SIZE * y + HEART_CENTRE
    return (x**2 + y**2 - 1) ** 3 <= x**2 * y**3


def tint(covered: Array, color: Array) -> Array:
    """A sprite [side, side] in a colour [3]: uint8 [3, side, side]."""
    return (covered.astype(np.uint16) * color[:, None, None] // 255).astype(np.uint8)
