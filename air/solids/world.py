"""The world of solids: their sizes and colours, the ground, the light and the camera.

x is to the right, y away from the camera and z up; the ground is z = 0. A solid stands on the
ground at (x, y), has a size, and is turned by an angle about the vertical. Needs no torch.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

KINDS = "cube", "sphere", "cylinder"
HALF_SIDE = {"cube": 0.24, "sphere": 0.28, "cylinder": 0.24}  # half width of a solid of size one
HALF_HEIGHT = {"cube": 0.24, "sphere": 0.28, "cylinder": 0.32}
MIDDLE, RADIUS = 0.27, 0.42  # of a ball that holds a solid of size one: height, and radius
COLOURS = (  # of the cube, of the sphere, and of both halves of the cylinder
    (0.85, 0.15, 0.12), (0.15, 0.35, 0.9), (0.95, 0.75, 0.1), (0.05, 0.4, 0.2),
)  # fmt: skip
SYMMETRY = {"cube": 4, "sphere": None, "cylinder": 1}  # turns by 1 / n of a circle change nothing

# The camera, and the direction of the light.
HEIGHT, DISTANCE, LOOKS_AT, FIELD = 2.0, 2.6, (0.0, 0.0, 0.1), math.radians(42)
LIGHT = (-0.45, -0.5, 0.74)
AMBIENT = 0.35  # share of the light that comes from everywhere
GROUND, GROUND_FADE = 0.95, 0.12  # grey level of the ground, and its loss for each unit of depth

Array = NDArray[np.float64]


class Camera(NamedTuple):
    """A pinhole camera. Depths are distances along its axis."""

    position: Array  # [3]
    axes: Array  # to the right, downwards, and forwards, [3, 3]
    slope: float  # half a side of the image at depth one

    def rays(self, side: int) -> Array:
        """The direction of the ray through each pixel's centre, at depth one, [side, side, 3]."""
        centres = (2 * np.arange(side) + 1) / side - 1
        rows, columns = np.meshgrid(centres, centres, indexing="ij")
        image = np.stack((self.slope * columns, self.slope * rows, np.ones_like(rows)), -1)
        rays: Array = image @ self.axes
        return rays


def _camera() -> Camera:
    position = np.array([0.0, -DISTANCE, HEIGHT])
    forwards = LOOKS_AT - position
    forwards /= np.linalg.norm(forwards)
    right = np.array([1.0, 0.0, 0.0])
    return Camera(
        position, np.stack((right, np.cross(forwards, right), forwards)), math.tan(FIELD / 2)
    )


CAMERA = _camera()  # of all scenes


def ground(rays: Array) -> Array:
    """The grey level of the ground where rays, [..., 3] at depth one, meet it, [...]."""
    depth = -CAMERA.position[2] / rays[..., 2]
    levels: Array = np.clip(GROUND - GROUND_FADE * depth, 0, 1)
    return levels
