"""Merging: one object in place of two whose windows are close.

Now and then a guide puts two windows on one object, half of it under each. Both explain the scene
well, so the ELBO hardly says that one object is enough. But a window over both shows a whole object
then, which one code describes well. Two close objects are different: one code paints them badly. So
the residual of the merged object tells without labels whether two windows hold one object or two. A
residual is the share of what all other objects leave that stays unexplained, |x - canvas|^2 /
|x - canvas of the others|^2; so it does not depend on how many other objects the scene has.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from air.air import AIR
from air.spatial_transformer import image_to_window, positive_scale

CLOSE = 0.75  # distance of two centres, in sides of a window, below which objects may be merged
# Two objects are one if one alone leaves less than the first share unexplained, and less than the
# second more than both leave.
ONE_OBJECT, WORSE = 0.18, 0.05
# The windows that are tried: their distances from the middle of both centres, in half sides, and
# their scales, relative to the mean of both. A lower scale is a larger window.
SHIFT, ZOOM = 0.12, 0.8
NUM_ALONG = 3  # values along each axis, and of the scale
NUM_TRIES = NUM_ALONG**3


class Merged(NamedTuple):
    """B scenes with one object in place of two; the first n - 1 of the T objects are present."""

    where: Tensor  # z_where, [B, T, 3]
    what: Tensor  # z_what, [B, T, Z]
    canvas: Tensor  # [B, (C,) H, H]
    are_one: Tensor  # whether the two objects are one, bool [B]


def relative_residual(images: Tensor, canvas: Tensor) -> Tensor:
    """|x - canvas|^2 / |x|^2 of each image, [B, (C,) H, H] to [B]."""
    tiny = torch.finfo(images.dtype).tiny
    return _energy(images - canvas) / _energy(images).clamp(min=tiny)


def paint_scenes(air: AIR, where: Tensor, what: Tensor, counts: Tensor) -> Tensor:
    """The canvases of the first `counts` objects of each scene, [B, (C,) H, H]."""
    painted = air.paint([*where.unbind(1)], [*what.unbind(1)])
    return air.likelihood.compose(painted, in_use(air, counts).T.to(painted.dtype))


def in_use(air: AIR, counts: Tensor) -> Tensor:
    """The steps of the first `counts` objects of each scene, bool [B, T]."""
    return torch.arange(air.num_steps, device=counts.device) < counts[:, None]


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
        counts: Numbers of objects, n, [B]. With fewer than two, objects are never one, and the
            other results mean nothing.

    Returns:
        The scenes. The merged object is in the earlier step of both, the last object in the later.
    """
    near, pair = closest_windows(where, counts)
    painted = air.paint([*where.unbind(1)], [*what.unbind(1)])
    present, steps = in_use(air, counts), torch.arange(air.num_steps, device=counts.device)
    others = present & (steps != pair[:, :1]) & (steps != pair[:, 1:])
    of_both, of_others = (
        air.likelihood.compose(painted, each.T.to(painted.dtype)) for each in (present, others)
    )
    windows = _windows_around(where.gather(1, pair[..., None].expand(-1, -1, 3)))  # [B, 27, 3]
    flat, scenes = windows.flatten(0, 1), images.repeat_interleave(NUM_TRIES, 0)
    behind = of_others.repeat_interleave(NUM_TRIES, 0)
    seen = scenes if air.guide_input == "image" else scenes - behind
    codes, _ = air.encode(image_to_window(flat, air.window_size, air.x_size, seen))
    canvases = air.likelihood.add(behind, air.paint([flat], [codes])[0])
    left = _energy(images - of_others).clamp(min=torch.finfo(images.dtype).tiny)
    best = _energy(scenes - canvases).view(len(images), NUM_TRIES).min(1)
    residual, of_two = best.values / left, _energy(images - of_both) / left
    chosen = torch.arange(len(images), device=images.device) * NUM_TRIES + best.indices
    last = (counts - 1).clamp(min=0)[:, None, None]

    def put(latents: Tensor, merged: Tensor) -> Tensor:
        at_last = latents.gather(1, last.expand(-1, -1, latents.shape[-1]))
        both = torch.cat((at_last, merged[chosen][:, None]), 1)
        return latents.scatter(1, pair.flip(1)[..., None].expand_as(both), both)

    are_one = (near < CLOSE) & (residual < ONE_OBJECT) & (residual < of_two + WORSE)
    return Merged(put(where, flat), put(what, codes), canvases[chosen], are_one)


def _windows_around(both: Tensor) -> Tensor:
    """z_where of windows around the middle of two, [B, 2, 3] to [B, 27, 3]."""
    scales = positive_scale(both[..., :1])
    middle, scale = (-both[..., 1:] / scales).mean(1, True), scales.mean(1, True)
    kind: Any = {"dtype": both.dtype, "device": both.device}
    shifts = torch.linspace(-SHIFT, SHIFT, NUM_ALONG, **kind)
    tries = torch.cartesian_prod(torch.linspace(ZOOM, 1, NUM_ALONG, **kind), shifts, shifts)
    return window_at(middle + tries[:, 1:] / scale, tries[:, :1] * scale)


def _energy(images: Tensor) -> Tensor:
    return images.flatten(1).square().sum(1)
