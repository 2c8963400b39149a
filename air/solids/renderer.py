"""A differentiable ray caster for three solids on a ground plane, seen by one camera.

It is a given renderer, as in section 3.3 of the paper: nothing in it is learnt. The solids are
convex. So a ray is inside a solid on one interval [near, far], which is the intersection of the
intervals of simpler bodies (slabs, an infinite cylinder, a ball), and it hits the solid if the
interval is not empty. The coverage of a pixel is a sigmoid of far - near, which is negative for a
miss. So silhouettes have gradients, and a gradient points to a solid even from pixels beside it.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from air.solids.world import (
    AMBIENT,
    CAMERA,
    COLOURS,
    HALF_HEIGHT,
    HALF_SIDE,
    LIGHT,
    MIDDLE,
    RADIUS,
    ground,
)

# Softness: of silhouettes and of edges between faces, in units of depth, and of the seams of the
# cylinder's colours.
EDGE, FACE_EDGE, SEAM = 0.03, 0.03, 0.2
ROUND = 1e-3  # squared distance below which the edge of a round body is linear; see `_interval`
PATCH = 0.5  # side of the patch in which a solid is drawn, in sides of the image

Point = tuple[Tensor, Tensor, Tensor]  # x, y, z


class Renderer(nn.Module):
    """Casts a ray through each pixel's centre, for solids of all kinds at once.

    Args:
        side: The side H of the images in pixels.

    Attributes:
        ground: The picture of the empty ground, [3, H, H]. To train on pictures with another
            ground, change it in place; the median of many pictures shows it.
    """

    position: Tensor
    axes: Tensor
    rays: Tensor
    colours: Tensor
    light: Tensor
    ground: Tensor

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side, self.slope = side, CAMERA.slope
        self.patch = math.ceil(PATCH * side)
        rays = CAMERA.rays(side)
        for name, value in (
            ("position", CAMERA.position),
            ("axes", CAMERA.axes),
            ("rays", rays.reshape(-1, 3).T),
            ("colours", COLOURS),
            ("light", np.divide(LIGHT, np.linalg.norm(LIGHT))),
            ("ground", ground(rays)[None].repeat(3, 0)),
        ):
            tensor = torch.tensor(value, dtype=torch.get_default_dtype())
            # The ground alone is saved with the weights: a user may set another one.
            self.register_buffer(name, tensor, persistent=name == "ground")

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:  # noqa: ANN401
        state.setdefault(f"{prefix}ground", self.ground)  # which earlier files lack
        super()._load_from_state_dict(state, prefix, *args)

    def forward(self, size: Tensor, place: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        """Draws n solids, each as a cube, a sphere and a cylinder.

        Rays are cast only in a patch of G x G pixels around each solid, G = `patch`.

        Args:
            size: Sizes, [n]; one is the size of a typical solid.
            place: (x, y) on the ground, [n, 2].
            turns: The cosine and sine of the angles by which the cube and the cylinder are turned,
                [n, 2, 2]. A sphere looks the same from all sides.

        Returns:
            For each solid and kind, the colours multiplied by the coverage, and the coverage,
            [n, 3, 4, G * G]; and the pixels of the patch, which `put` expects, [n, G * G].
        """
        pixels = self._pixels(size, place)
        d = self.rays[:, pixels] / size[:, None]  # in sizes of the solid, [3, n, G * G]
        x, y = (self.position[:2] - place).T[..., None] / size[:, None]
        z = self.position[2] / size[:, None]
        drawn = [
            self._cube((x, y, z), d, turns[:, 0]),
            self._sphere((x, y, z), d),
            self._cylinder((x, y, z), d, turns[:, 1]),
        ]
        return torch.stack(drawn, 1), pixels

    @torch.no_grad()
    def _pixels(self, size: Tensor, place: Tensor) -> Tensor:
        """The indices of the pixels around solids, as far as they are in the image."""
        centre, _ = self.outlines(size, place)
        corner = ((centre + 1) * self.side - self.patch) / 2
        x, y = corner.round().clamp(0, self.side - self.patch).long().T
        steps = torch.arange(self.patch, device=place.device)
        rows, columns = y[:, None] + steps, x[:, None] + steps
        return (rows[:, :, None] * self.side + columns[:, None]).flatten(1)

    def put(self, patches: Tensor, pixels: Tensor) -> Tensor:
        """Puts patches into images that are zero elsewhere: [n, C, G * G] to [n, C, H, H]."""
        n, channels = patches.shape[:2]
        images = patches.new_zeros(n, channels, self.side**2)
        images = images.scatter(2, pixels[:, None].expand_as(patches), patches)
        return images.view(n, channels, self.side, self.side)

    # Each returns [n, 4, P], for a solid of size one at the origin, the start of the rays, [n, 1]
    # each, and their directions, [3, n, P].

    def _cube(self, start: Point, rays: Tensor, turn: Tensor) -> Tensor:
        (x, y, z), (dx, dy, dz) = start, rays.unbind()
        half, (cos, sin) = HALF_SIDE["cube"], turn.T[..., None]
        (u, v), (du, dv) = _turn(x, y, cos, sin), _turn(dx, dy, cos, sin)
        slabs = [_slab(u, du, -half, half), _slab(v, dv, -half, half), _slab(z, dz, 0, 2 * half)]
        nears = torch.stack([near for near, _ in slabs])
        near, far = nears.amax(0), torch.stack([far for _, far in slabs]).amin(0)
        faces = ((nears - near) / FACE_EDGE).softmax(0)
        lx, ly, lz = self.light
        lit_u = (-du.sign() * (lx * cos + ly * sin)).clamp(min=0)
        lit_v = (-dv.sign() * (ly * cos - lx * sin)).clamp(min=0)
        lit = faces[0] * lit_u + faces[1] * lit_v + faces[2] * lz
        return _layer(near, far, self._shade(lit) * self.colours[0, :, None])

    def _sphere(self, start: Point, rays: Tensor) -> Tensor:
        radius = HALF_SIDE["sphere"]
        (x, y, z), (dx, dy, dz) = start, rays.unbind()
        z = z - radius
        near, far = _interval(
            dx * dx + dy * dy + dz * dz, x * dx + y * dy + z * dz, x * x + y * y + z * z, radius
        )
        lx, ly, lz = self.light / radius
        lit = (lx * (x + near * dx) + ly * (y + near * dy) + lz * (z + near * dz)).clamp(0, 1)
        return _layer(near, far, self._shade(lit) * self.colours[1, :, None])

    def _cylinder(self, start: Point, rays: Tensor, turn: Tensor) -> Tensor:
        (x, y, z), (dx, dy, dz) = start, rays.unbind()
        radius = HALF_SIDE["cylinder"]
        side = _interval(dx * dx + dy * dy, x * dx + y * dy, x * x + y * y, radius)
        slab = _slab(z, dz, 0, 2 * HALF_HEIGHT["cylinder"])
        near, far = torch.maximum(side[0], slab[0]), torch.minimum(side[1], slab[1])
        top = torch.sigmoid((slab[0] - side[0]) / FACE_EDGE)
        px, py = x + near * dx, y + near * dy  # where the ray enters, relative to the axis
        lx, ly, lz = self.light
        lit = top * lz + (1 - top) * ((lx * px + ly * py) / radius).clamp(0, 1)
        along = _turn(px, py, *turn.T[..., None])[0] / radius
        first = torch.sigmoid(along / SEAM)[:, None]
        colours = self.colours[2, :, None] * first + self.colours[3, :, None] * (1 - first)
        return _layer(near, far, self._shade(lit) * colours)

    def _shade(self, lit: Tensor) -> Tensor:
        return (AMBIENT + (1 - AMBIENT) * lit)[:, None]

    def outlines(self, size: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """The centre (x, y) of each solid in the image, in [-1, 1], and half the side around it.

        Args:
            size: [...].
            place: [..., 2].

        Returns:
            [..., 2] and [..., 1].
        """
        middle = torch.cat((place, MIDDLE * size[..., None]), -1)
        offset = (middle - self.position) @ self.axes.T  # to the right, down, and in depth
        depth = offset[..., 2:].clamp(min=0.1)
        centre = offset[..., :2] / (depth * self.slope)
        return centre, RADIUS * size[..., None] / (depth * self.slope)

    def places_at(self, centre: Tensor) -> Tensor:
        """The place of a solid of size one with this centre in the image: [..., 2] to [..., 2]."""
        ray = nn.functional.pad(self.slope * centre, (0, 1), value=1.0) @ self.axes
        height = MIDDLE - self.position[2]
        # A ray that goes up never meets that height, and leads to a place far away.
        depth = height / ray[..., 2:].clamp(max=-0.05)
        return self.position[:2] + depth * ray[..., :2]

    def depth(self, place: Tensor) -> Tensor:
        """The depth of a place on the ground, [..., 2] to [...]."""
        offset = nn.functional.pad(place, (0, 1)) - self.position
        return offset @ self.axes[2]

    def azimuth(self, place: Tensor) -> Tensor:
        """The angle at which the camera sees a place, [..., 2] to [...]; zero straight ahead."""
        return torch.atan2(-place[..., 0], place[..., 1] - self.position[1])


def _turn(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """(x, y) in the axes of a solid that is turned by the angle."""
    return cos * x + sin * y, cos * y - sin * x


def _slab(start: Tensor, step: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The depths at which rays enter and leave the space between two planes."""
    step = torch.where(step.abs() < 1e-6, 1e-6, step)
    one, other = (low - start) / step, (high - start) / step
    return torch.minimum(one, other), torch.maximum(one, other)


def _interval(a: Tensor, b: Tensor, c: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """The depths at which rays enter and leave a ball or an infinite cylinder.

    The squared distance from the axis is a t^2 + 2 b t + c. For rays that miss, near > far.
    """
    middle = -b / a
    squared = radius**2 - (c + b * middle)  # half the chord squared, times a; < 0 for a miss
    half = squared / torch.sqrt((squared.abs() + ROUND) * a)  # a square root, linear around zero
    return middle - half, middle + half


def _layer(near: Tensor, far: Tensor, colours: Tensor) -> Tensor:
    """Colours, [n, 3, P], times the coverage, and the coverage, [n, 4, P], of intervals, [n, P]."""
    coverage = torch.sigmoid((far - near) / EDGE)[:, None]
    return torch.cat((colours * coverage, coverage), 1)
