"""Backgrounds of scenes: bytes that depend on nothing but the random numbers."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.random import Generator

from air.data.scenes import Array

BackgroundKind = Literal["black", "uniform", "gradient", "grid", "textured", "noisy"]

CELLS = 5  # of a grid, along each side of a scene
PATCHES = 6  # levels of a texture along each side, between which it is interpolated


def draw_background(
    kind: BackgroundKind, random: Generator, channels: int, side: int, levels: Sequence[int]
) -> Array:
    """Draws a background.

    Args:
        kind: Every channel has its own levels: one (uniform), two between which it changes along a
            random direction (gradient), two in the squares of a chessboard whose corner lies
            anywhere (grid), levels at 6 x 6 points (textured), or one for each pixel (noisy).
        random: Its numbers are drawn in a fixed order.
        channels: Number of channels, C.
        side: Side of the scene in pixels, H.
        levels: Bounds of all levels, of 255; the upper one is not drawn unless both are equal.

    Returns:
        Intensities, uint16 [C, H, H].
    """
    if kind == "black":
        return np.zeros((channels, side, side), np.uint16)
    low, high = levels

    def draw(*shape: int) -> Array:
        return low + (high - low) * random.random((channels, *shape))

    if kind == "noisy":
        found = draw(side, side)
    elif kind == "uniform":
        found = draw(1, 1)
    elif kind == "gradient":
        first, second, ramp = draw(1, 1), draw(1, 1), _ramp(2 * math.pi * random.random(), side)
        found = first + (second - first) * ramp
    elif kind == "grid":
        first, second, cell = draw(1, 1), draw(1, 1), max(1, side // CELLS)
        rows, columns = (
            (np.arange(side) + int(2 * cell * random.random())) // cell % 2 for _ in range(2)
        )
        found = np.where(rows[:, None] == columns, first, second)
    else:
        found = _interpolate(_interpolate(draw(PATCHES, PATCHES), side).swapaxes(1, 2), side)
    return np.broadcast_to(found, (channels, side, side)).astype(np.uint16)


def _ramp(angle: float, side: int) -> Array:
    """Rises from 0 in one corner to 1 in the opposite corner, along a direction, [H, H]."""
    # Rounded because cosines differ in the last bits between platforms.
    x, y = round(math.cos(angle), 12), round(math.sin(angle), 12)
    points = (2 * np.arange(side) + 1) / side - 1
    along = x * points[None, :] + y * points[:, None]
    return (along / (abs(x) + abs(y)) + 1) / 2


def _interpolate(values: Array, size: int) -> Array:
    """Linear interpolation along the last axis: [..., n] to [..., size]."""
    points = np.arange(size) * (values.shape[-1] - 1) / max(size - 1, 1)
    below = np.minimum(points.astype(int), values.shape[-1] - 2)
    part = points - below
    return values[..., below] * (1 - part) + values[..., below + 1] * part
