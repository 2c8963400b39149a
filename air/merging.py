"""Merging: one object in place of two whose windows are close.

Now and then a guide puts two windows on one object, half of it under each. Both explain the scene
well, so the ELBO hardly says that one object is enough. But a window over both shows a whole object
then, which one code describes well. Two close objects are different: one code paints them badly. So
the relative residual of the merged object, |x - canvas|^2 / |x|^2, tells without labels whether two
windows hold one object or two.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from air.air import AIR
from air.spatial_transformer import image_to_window, positive_scale

CLOSE = 0.75  # distance of two centres, in sides of a window, below which objects may be merged
# Relative residual below which one object explains the scene as well as two.
ONE_OBJECT = 0.18
# The windows that are tried: how far from the middle of both centres, in half sides, and how small
# their scale, relative to the mean of both.
SHIFT, ZOOM = 0.12, 0.8
NUM_TRIES = 27  # three scales, and three shifts along each axis


class Merged(NamedTuple):
    """B scenes with one object in place of two."""

    where: Tensor  # z_where, [B, T, 3]
    what: Tensor  # z_what, [B, T, Z]
    residual: Tensor  # relative residual of the scene, [B]


def relative_residual(images: Tensor, canvas: Tensor) -> Tensor:
    """|x - canvas|^2 / |x|^2 of each image, [B, (C,) H, H] to [B]."""
    tiny = torch.finfo(images.dtype).tiny
    energy = images.flatten(1).square().sum(1).clamp(min=tiny)
    return (images - canvas).flatten(1).square().sum(1) / energy


def paint_scenes(air: AIR, where: Tensor, what: Tensor, counts: Tensor) -> Tensor:
    """The canvases of the first `counts` objects of each scene, [B, (C,) H, H]."""
    present = torch.arange(air.num_steps, device=counts.device)[:, None] < counts
    return _paint(air, where, what, present)


def _paint(air: AIR, where: Tensor, what: Tensor, present: Tensor) -> Tensor:
    painted = air.paint([*where.unbind(1)], [*what.unbind(1)])
    return air.likelihood.compose(painted, present.to(painted.dtype))


def window_at(centre: Tensor, scale: Tensor) -> Tensor:
    """z_where of a window with a centre in [-1, 1], [..., 2], and a scale, [..., 1]."""
    return torch.cat((scale, -centre * scale), -1)


def closest_windows(where: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The two closest of the first `counts` windows of each scene.

    Args:
        where: z_where, [B, T, 3].
        counts: Numbers of objects, [B].

    Returns:
        The distance of their centres in sides of a window, [B], infinite where there are fewer than
        two; and the steps of both, the earlier one first, [B, 2].
    """
    steps = torch.triu_indices(where.shape[1], where.shape[1], 1, device=where.device)
    if not steps.numel():
        return where.new_full((len(where),), torch.inf), counts.new_zeros(len(where), 2)
    scale = positive_scale(where[..., :1])
    centres = (-where[..., 1:] / scale)[:, steps]  # [B, 2, pairs, 2]
    scales = scale[:, steps, 0].mean(1)
    distances = (centres[:, 0] - centres[:, 1]).norm(dim=-1) * scales / 2
    nearest = distances.masked_fill(steps[1] >= counts[:, None], torch.inf).min(1)
    return nearest.values, steps.T[nearest.indices]


def merge(air: AIR, images: Tensor, where: Tensor, what: Tensor, counts: Tensor) -> Merged:
    """Puts one object in place of the two closest ones of each scene.

    The guide's encoder describes what lies under each of 27 windows around the middle of both; the
    one that explains the scene best is kept. Nothing here waits for the device.

    Args:
        air: The model; its objects add up, so it has no model of the background.
        images: The scenes, as `AIR.to_images` returns them, [B, (C,) H, H].
        where: z_where, [B, T, 3].
        what: z_what, [B, T, Z].
        counts: Numbers of objects, [B]; two or more, else the result means nothing.
    """
    pair = closest_windows(where, counts)[1]
    steps = torch.arange(air.num_steps, device=counts.device)
    both = where.gather(1, pair[..., None].expand(-1, -1, 3))
    scales = positive_scale(both[..., :1])
    middle, scale = (-both[..., 1:] / scales).mean(1, True), scales.mean(1, True)
    shifts = torch.linspace(-SHIFT, SHIFT, 3, dtype=where.dtype, device=where.device)
    zooms = torch.linspace(ZOOM, 1, 3, dtype=where.dtype, device=where.device)
    tries = torch.cartesian_prod(zooms, shifts, shifts)
    windows = window_at(middle + tries[:, 1:] / scale, tries[:, :1] * scale)  # [B, 27, 3]
    flat, repeated = windows.flatten(0, 1), images.repeat_interleave(len(tries), 0)
    codes, _ = air.encode(image_to_window(flat, air.window_size, air.x_size, repeated))
    others = (steps < counts[:, None]) & (steps != pair[:, :1]) & (steps != pair[:, 1:])
    canvas = _paint(air, where, what, others.T)
    canvas = air.likelihood.add(
        canvas.repeat_interleave(len(tries), 0), air.paint([flat], [codes])[0]
    )
    best = relative_residual(repeated, canvas).view(len(images), len(tries)).min(1)
    chosen = best.indices[:, None, None]
    last = (counts - 1).clamp(min=0)[:, None]

    def put(latents: Tensor, merged: Tensor) -> Tensor:
        """The merged object in the earlier step, the last object in the later one."""
        size = latents.shape[-1]
        merged = merged.view(len(images), -1, size).gather(1, chosen.expand(-1, -1, size))
        at_last = latents.gather(1, last[..., None].expand(-1, -1, size))
        places = pair.flip(1)[..., None].expand(-1, -1, size)
        return latents.scatter(1, places, torch.cat((at_last, merged), 1))

    return Merged(put(where, flat), put(what, codes), best.values)
