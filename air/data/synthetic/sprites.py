"""Coloured squares, ellipses and hearts, after dSprites; drawn here, with antialiased edges."""

import math

import numpy as np

from air.data.scenes import Array

SHAPES = ("square", "ellipse", "heart")
SAMPLES = 4  # points along each side of a pixel, for antialiasing
FLATNESS = 0.6  # short axis of the ellipse divided by its long axis
HEART_SIZE, HEART_CENTRE = 1.3, 0.15  # scale and shift that fit its curve into the unit circle


def draw_sprite(shape: str, side: int, angle: float) -> Array:
    """The coverage of each pixel by a shape, in 255ths: uint8 [side, side].

    Args:
        shape: One of `SHAPES`.
        side: Diameter in pixels of the circle that encloses the shape.
        angle: Rotation in radians.
    """
    centres = (2 * np.arange(side * SAMPLES) + 1) / (side * SAMPLES) - 1
    x = centres[None, :]
    y = -centres[:, None]  # upwards
    # Rounded because cosines differ in the last bits between platforms.
    cos = round(math.cos(angle), 12)
    sin = round(math.sin(angle), 12)
    inside = _is_inside(shape, cos * x + sin * y, cos * y - sin * x)
    samples_inside = inside.reshape(side, SAMPLES, side, SAMPLES).sum((1, 3))
    return (samples_inside * 255 // SAMPLES**2).astype(np.uint8)


def _is_inside(shape: str, x: Array, y: Array) -> Array:
    """Whether points are inside a shape; the unit circle encloses every shape."""
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= math.sqrt(0.5)
    if shape == "ellipse":
        return x**2 + (y / FLATNESS) ** 2 <= 1
    x, y = HEART_SIZE * x, HEART_SIZE * y + HEART_CENTRE
    return (x**2 + y**2 - 1) ** 3 <= x**2 * y**3


def tint(coverage: Array, color: Array) -> Array:
    """Colours a sprite [side, side] with a colour [3]: uint8 [3, side, side]."""
    return (coverage.astype(np.uint16) * color[:, None, None] // 255).astype(np.uint8)
