"""Scenes of solids on the ground, drawn in NumPy with hard edges and 4 x 4 rays a pixel.

The ray casting here shares `air.solids.world` with the renderer, and no formula for a solid: it
tests each face. So the model never sees pictures that its own renderer made.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.random import Generator

from air.data.scenes import Array, Scenes
from air.solids.world import (
    AMBIENT,
    CAMERA,
    COLOURS,
    HALF_HEIGHT,
    HALF_SIDE,
    KINDS,
    LIGHT,
    MIDDLE,
    RADIUS,
    SYMMETRY,
    ground,
)

RAYS = 4  # along a side of a pixel
REACH = 0.8  # solids stand within this distance of the origin, along x and along y
SIZES = 0.85, 1.15
GAP = 0.62  # least distance of two solids of size one; only corners of cubes can meet
ATTEMPTS = 1000  # to place the solids of one scene


def cast(kind: str, size: float, place: Array, angle: float, rays: Array) -> tuple[Array, Array]:
    """Casts rays at one solid.

    Args:
        kind: One of `KINDS`.
        size: Its size.
        place: (x, y) on the ground.
        angle: The angle about the vertical, in radians.
        rays: Directions at depth one, [..., 3].

    Returns:
        The depth at which each ray hits it, [...], infinite for a miss; and the colour, [..., 3].
    """
    shape, rays = rays.shape, rays.reshape(-1, 3)
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    start = turn @ (CAMERA.position - [*place, 0])
    rays, light = rays @ turn.T, turn @ np.array(LIGHT) / np.linalg.norm(LIGHT)
    half, height = size * HALF_SIDE[kind], 2 * size * HALF_HEIGHT[kind]
    depth = np.full(len(rays), np.inf)
    colour = np.zeros((len(rays), 3))

    def hit(at: Array, valid: Array, normals: Array, colours: Array) -> None:
        nearer = valid & (at > 0) & (at < depth)
        lit = AMBIENT + (1 - AMBIENT) * np.clip(normals @ light, 0, 1)
        depth[nearer] = at[nearer]
        colour[nearer] = (lit[:, None] * colours)[nearer]

    def plane(axis: int, level: float) -> tuple[Array, Array]:
        with np.errstate(divide="ignore", invalid="ignore"):
            at = (level - start[axis]) / rays[:, axis]
            return at, start + at[:, None] * rays

    def constant(*normal: float) -> Array:
        return np.broadcast_to(np.array(normal), rays.shape)

    if kind == "cube":
        red = np.array(COLOURS[0])
        for axis in (0, 1):
            for sign in (-1.0, 1.0):
                at, points = plane(axis, sign * half)
                inside = (abs(points[:, 1 - axis]) <= half) & (points[:, 2] >= 0)
                normal = [0.0, 0.0, 0.0]
                normal[axis] = sign
                hit(at, inside & (points[:, 2] <= height), constant(*normal), red)
        at, points = plane(2, height)
        hit(at, np.all(abs(points[:, :2]) <= half, 1), constant(0, 0, 1), red)
        return depth.reshape(shape[:-1]), colour.reshape(shape)
    # A round body: by the point of each ray that is closest to its centre, or to its axis.
    centre, axes = np.array([0, 0, height / 2]), slice(0, 3 if kind == "sphere" else 2)
    speed = np.linalg.norm(rays[:, axes], axis=1)
    closest = ((centre - start)[axes] * rays[:, axes]).sum(1) / speed**2
    missed = np.linalg.norm((start + closest[:, None] * rays - centre)[:, axes], axis=1)
    at = closest - np.sqrt(np.clip(half**2 - missed**2, 0, None)) / speed
    points = start + at[:, None] * rays
    if kind == "sphere":
        hit(at, missed <= half, (points - centre) / half, np.array(COLOURS[1]))
        return depth.reshape(shape[:-1]), colour.reshape(shape)
    yellow, green = np.array(COLOURS[2]), np.array(COLOURS[3])
    valid = (missed <= half) & (points[:, 2] >= 0) & (points[:, 2] <= height)
    normals = points / half * [1, 1, 0]
    hit(at, valid, normals, np.where(points[:, :1] > 0, yellow, green))
    at, points = plane(2, height)
    valid = np.linalg.norm(points[:, :2], axis=1) <= half
    hit(at, valid, constant(0, 0, 1), np.where(points[:, :1] > 0, yellow, green))
    return depth.reshape(shape[:-1]), colour.reshape(shape)


class SolidsGenerator:
    """Draws scenes of solids, images of H x H pixels."""

    def __init__(self, side: int, random: Generator) -> None:
        self.side, self.random = side, random
        rays = CAMERA.rays(side * RAYS)
        rays = rays.reshape(side, RAYS, side, RAYS, 3).swapaxes(1, 2)
        self.rays: Array = rays.reshape(side**2, RAYS**2, 3)  # of each pixel
        self.ground: Array = ground(self.rays)[..., None].repeat(3, 2)
        ways = self.rays.mean(1)
        self.ways: Array = ways / np.linalg.norm(ways, axis=1, keepdims=True)

    def draw_solids(self, count: int) -> list[tuple[int, Array]]:
        """Kinds and poses (size, x, y, angle) of solids that stand apart; see `GAP`."""
        for _ in range(ATTEMPTS):
            sizes = self.random.uniform(*SIZES, count)
            places = self.random.uniform(-REACH, REACH, (count, 2))
            between = np.linalg.norm(places[:, None] - places, axis=2)
            least = GAP * (sizes[:, None] + sizes) / 2
            if (between >= least)[~np.eye(count, dtype=bool)].all():
                break
        else:
            raise ValueError(f"counts: {count} solids do not fit on the ground; use fewer")
        kinds = self.random.integers(len(KINDS), size=count)
        turns = [SYMMETRY[KINDS[kind]] for kind in kinds]
        angles = [self.random.uniform(0, 2 * np.pi / n) if n else 0.0 for n in turns]
        poses = np.column_stack((sizes, places, angles))
        return list(zip(kinds.tolist(), poses, strict=True))

    def draw(self, solids: Sequence[tuple[int, Array]]) -> tuple[Array, list[Array]]:
        """Draws solids, of which nearer ones hide others.

        Returns:
            The image, uint8 [3, H, H], and which pixels each solid alone would cover, bool [H, H].
        """
        depth = np.full(self.rays.shape[:2], np.inf)
        colour, masks = self.ground.copy(), []
        for kind, (size, x, y, angle) in solids:
            towards = np.array([x, y, size * MIDDLE]) - CAMERA.position
            closest = (self.ways @ towards)[:, None] * self.ways
            near = np.flatnonzero(np.linalg.norm(closest - towards, axis=1) < 1.2 * size * RADIUS)
            at, own = cast(KINDS[kind], size, np.array([x, y]), angle, self.rays[near])
            nearer = at < depth[near]
            depth[near] = np.where(nearer, at, depth[near])
            colour[near] = np.where(nearer[..., None], own, colour[near])
            mask = np.zeros(self.side**2, bool)
            mask[near] = np.isfinite(at).mean(1) >= 0.5
            masks.append(mask.reshape(self.side, self.side))
        pixels = np.floor(255 * np.clip(colour.mean(1), 0, 1) + 0.5).astype(np.uint8)
        return pixels.T.reshape(3, self.side, self.side), masks


def draw_scenes(
    number: int,
    counts: Sequence[int],
    side: int,
    seed: Any,  # noqa: ANN401
) -> Scenes:
    """Draws scenes, with the kinds of the solids as labels, and their poses.

    Args:
        number: The number of scenes.
        counts: Possible numbers of solids, equally likely.
        side: The side of the images in pixels.
        seed: The seed, as NumPy takes it.

    Raises:
        ValueError: If so many solids do not fit on the ground.
    """
    generator = SolidsGenerator(side, np.random.default_rng(seed))
    most = max(counts)
    x = np.zeros((number, 3, side, side), np.uint8)
    drawn, overlaps = np.zeros(number, np.int64), np.zeros(number, np.int64)
    labels = np.full((number, most), -1)
    boxes, poses = (np.full((number, most, 4), np.nan, np.float32) for _ in range(2))
    for n in range(number):
        drawn[n] = counts[int(generator.random.integers(len(counts)))]
        solids = generator.draw_solids(int(drawn[n]))
        x[n], masks = generator.draw(solids)
        overlaps[n] = sum(map(np.sum, masks)) - np.any([*masks, np.zeros((side, side))], 0).sum()
        for i, ((kind, pose), mask) in enumerate(zip(solids, masks, strict=True)):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            labels[n, i], poses[n, i] = kind, pose
            boxes[n, i] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return Scenes(x, drawn, overlaps, labels, boxes, poses)
