"""Scenes whose objects are known, the training of a guide on them, and sums of such scenes.

The objects of a scene are known from a threshold (`air.training.from_spots`), or from a model that
explains the scene well (`air.training.teacher`). Where the objects of two scenes are known, so are
those of their sum. Objects that touch are rare and are hard to tell apart, so half of the sums are
made of them: the objects of one scene are moved beside those of the other one.

Knobel et al. 2024 learn to count from pasted crops (arXiv:2307.08727). To train on composed scenes
is the sleep phase of wake-sleep (Hinton et al. 1995); here the parts of a composed scene are real,
so it has no errors of the decoder.
"""

import math
from typing import Any, NamedTuple

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from air.likelihoods import PixelLikelihood
from air.scene import first_objects
from air.spatial_transformer import centre_of, positive_scale, where_at

TRIES = 2  # pairs of scenes that are tried for each sum
# A sum of n objects is used only if the counts of at least this share of the batch are n, or some
# greater number: otherwise objects are taught that do not occur.
LEAST_SHARE = 0.05
MOVED = 0.5  # share of the sums in which objects are moved beside others
DISTANCES = 0.5, 1.0  # of their centres, in the sum of half sides of both windows
INSIDE = 0.85  # share of a window that must lie in the image when it is moved


class KnownObjects(NamedTuple):
    """The objects of B scenes."""

    present: Tensor  # the first n of T are, [B, T]
    where: Tensor  # z_where, [B, T, 3]
    sure: Tensor  # scenes that are used, bool [B]

    @property
    def counts(self) -> Tensor:
        """The number of objects in each scene, [B]."""
        return self.present.sum(1).long()

    def pick(self, rows: Tensor) -> "KnownObjects":
        """The objects of these scenes."""
        return KnownObjects._make(part[rows] for part in self)


class GivenObjects(Messenger):
    """Runs AIR's guide with known objects in place of its own z_pres and z_where.

    These sites are hidden from outer handlers.

    Args:
        known: The objects.
        nearest: Whether each step takes the object closest to the guide's mean of z_where. Else
            the steps take them in their order.

    Attributes:
        log_q: log q of the given z_pres and of the given z_where, each summed over steps, [B].
    """

    def __init__(self, known: KnownObjects, nearest: bool) -> None:
        super().__init__()
        self.known, self.nearest = known, nearest
        zeros = known.where.new_zeros(len(known.where))
        self.log_q = {"z_pres": zeros, "z_where": zeros}
        self.values: dict[str, Tensor] = {}  # of the hidden sites
        self._left = known.present.clone()

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        kind, _, t = msg["name"].rpartition("_")
        if kind not in self.log_q:
            return
        present, where, _ = self.known
        if kind == "z_pres":
            value = present[:, int(t), None]
        else:
            value = where[:, int(t)]
            if self.nearest:
                guess = centre_of(msg["fn"].mean.detach())[:, None]
                distances = (centre_of(where) - guess).norm(dim=-1)
                k = distances.masked_fill(self._left == 0, torch.inf).argmin(1)
                self._left = self._left.scatter(1, k[:, None], 0)
                value = _pick_one(where, k)
        self.log_q[kind] = self.log_q[kind] + msg["fn"].log_prob(value)
        self.values[msg["name"]] = value
        msg["value"], msg["done"], msg["stop"] = value, True, True


def make_sums(
    likelihood: PixelLikelihood, images: Tensor, alone: Tensor, known: KnownObjects, number: int
) -> tuple[Tensor, KnownObjects]:
    """Adds scenes in pairs that are picked at random.

    Two scenes are added if both are sure and have objects, if the objects of one hide little of
    the other's, and if the batch has scenes of as many objects; see `LEAST_SHARE`.

    Args:
        likelihood: Says how objects add up.
        images: The batch, [B, (C,) H, H].
        alone: The objects of each image, as `PixelLikelihood.cut_out` returns them.
        known: The objects of the images.
        number: The number of sums.

    Returns:
        The sums, and their objects from left to right. A sum is not sure if too few pairs could be
        added.
    """
    n, num_steps = known.present.shape
    counts, device = known.counts, images.device
    possible = torch.arange(num_steps + 1, device=device)
    shares = (counts[:, None] == possible).to(images.dtype).mean(0)
    most = (possible * (shares >= LEAST_SHARE)).amax()
    usable = known.sure & (counts > 0)
    valid = usable & usable[:, None] & (counts + counts[:, None] <= most)
    valid = valid & ~torch.eye(n, dtype=torch.bool, device=device)
    pairs = _valid_first(valid.flatten())[: TRIES * number]
    valid = valid.flatten()[pairs]
    mine, others = pairs // n, pairs % n
    first, moved = known.pick(mine), known.pick(others)
    pixels = _shifts(first, moved, images.shape[-1])
    centres = centre_of(moved.where) + (2 / images.shape[-1] * pixels)[:, None]
    scales = moved.where[..., :1]
    outside = (centres.abs() + INSIDE / positive_scale(scales)).amax(-1) > 1
    valid = valid & ((pixels == 0).all(1) | ~(outside & (moved.present > 0)).any(1))
    added = _shift(alone[others], pixels)
    valid = valid & likelihood.fits(alone[mine], added)

    k = _valid_first(valid)[:number]
    sums = likelihood.add(images[mine[k]], added[k]).clamp(max=1)
    where = torch.cat((first.where, where_at(centres, scales)), 1)[k]
    absent = torch.cat((first.present, moved.present), 1)[k] == 0
    order = centre_of(where)[..., 0].masked_fill(absent, torch.inf).argsort(1)[:, :num_steps]
    where = where.gather(1, order[..., None].expand(-1, -1, 3))
    present = first_objects((~absent).sum(1), num_steps).to(images.dtype)
    return sums, KnownObjects(present, where, valid[k])


def _valid_first(valid: Tensor) -> Tensor:
    """Indices of a mask, the true ones first, and both parts in random order."""
    return (valid + torch.rand(len(valid), device=valid.device)).argsort(descending=True)


def _shifts(first: KnownObjects, other: KnownObjects, side: int) -> Tensor:
    """By how many pixels (x, y) other objects move, so that one is beside one of the first."""
    n, like = len(first.where), first.where
    rand = torch.rand(5, n, device=like.device, dtype=like.dtype)
    last = like.shape[1] - 1
    mine, its = (
        _pick_one(each.where, (u * each.counts).long().clamp(max=last))
        for each, u in zip((first, other), rand, strict=False)
    )
    near, far = DISTANCES
    angle, share = 2 * math.pi * rand[2], near + (far - near) * rand[3]
    reach = share / positive_scale(mine[:, 0]) + share / positive_scale(its[:, 0])
    offset = reach[:, None] * torch.stack((angle.cos(), angle.sin()), 1)
    shift = (centre_of(mine) + offset - centre_of(its)) * (rand[4] < MOVED)[:, None]
    return (shift * side / 2).round().long()


def _shift(painted: Tensor, pixels: Tensor) -> Tensor:
    """Moves objects [B, (C,) H, H] by whole pixels (x, y), [B, 2]; empty pixels enter."""
    side = painted.shape[-1]
    x = painted.view(len(painted), -1, side, side)
    index = torch.arange(side, device=painted.device)
    for dim, steps in ((3, pixels[:, :1]), (2, pixels[:, 1:])):
        at = (index - steps).view(-1, 1, *((1, side) if dim == 3 else (side, 1)))
        x = x.gather(dim, at.clamp(0, side - 1).expand_as(x)) * ((at >= 0) & (at < side))
    return x.view_as(painted)


def _pick_one(where: Tensor, k: Tensor) -> Tensor:
    """The z_where of one object of each scene, [B, T, 3] and [B] to [B, 3]."""
    return where[torch.arange(len(where), device=where.device), k]
