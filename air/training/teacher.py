"""The teacher of the count: q(n) is fitted to sums of two scenes, whose counts are known.

Once the guide covers two close objects with one window, the ELBO gives it no reason to change: a
second window beside the first explains little more. But the guide counts most scenes rightly, and
one object and one object make two. So the count of the sum of two scenes is known before anyone
looks at the sum. At every step, some pairs of scenes in the batch are added, and q(n) of the sums
is fitted to the sums of the counts.

Sums alone would teach the guide to count too many everywhere. So q(n) of the batch is fitted as
well, to the counts of the teacher: a net whose weights are the running mean of the model's weights,
over some 200 steps. Where the teacher puts two windows on one object, which shows without labels
(`air.refinement.merge`), its count is one lower. No label is used.

Knobel et al. 2024 learn to count from pasted crops (arXiv:2307.08727). To train on composed scenes
is the sleep phase of wake-sleep (Hinton et al. 1995); here the parts of a composed scene are real,
so it has no errors of the decoder. The teacher is the "mean teacher" of Tarvainen and Valpola 2017
(arXiv:1703.01780).
"""

import copy
from typing import NamedTuple

import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor

from air.air import AIR
from air.marginal import AllStepsActive
from air.priors import count_log_probs
from air.refinement import BADLY_EXPLAINED, closest_windows, merge, relative_residual
from air.scene import infer_scene, paint_objects
from air.support.handlers import LocalParameters, closed

PARTNERS = 6  # scenes to which each scene is added, to see whether the sum can be used
BATCH_PER_SUM = 4  # scenes in the batch for each sum that is used
# A sum of n objects is used only if the counts of at least this share of the batch are n, or some
# greater number: otherwise objects are taught that do not occur.
LEAST_SHARE = 0.05
# Merging is tried in one sixteenth of the batch: in the scenes with the closest windows.
BATCH_PER_MERGED = 16
DECAY = 0.995  # share of the teacher's weights that a step keeps


class Counted(NamedTuple):
    """What the teacher infers in a batch."""

    counts: Tensor  # [B]
    explained: Tensor  # whether the objects explain the scene well, bool [B]
    alone: Tensor  # the objects of each image without its background; see `cut_out`


class Sums(NamedTuple):
    """M sums of two images each."""

    images: Tensor  # [M, (C,) H, H]
    counts: Tensor  # [M]
    valid: Tensor  # bool [M]; false for padding, where fewer than M pairs could be added


class Teacher:
    """A term of the training loss whose value is zero, and whose gradient teaches q(n).

    In the sums, no gradient flows through z_where and z_what. In the batch it does, because q(n) is
    that of the ELBO there.

    Args:
        air: The model.
        weight: Factor of the mean log q(n), which is then in nats per image, like the ELBO.

    Attributes:
        air: The teacher, an AIR of running means.
    """

    def __init__(self, air: AIR, weight: float) -> None:
        self.student, self.weight = air, weight
        self.air = copy.deepcopy(air).requires_grad_(False).eval()
        pairs = [
            (ours, theirs)
            for (name, ours), theirs in zip(
                air.named_parameters(), self.air.parameters(), strict=True
            )
            if not name.startswith("bl_")
        ]
        self._parameters, self._means = map(list, zip(*pairs, strict=True))

    @torch.no_grad()
    def follow(self, decay: float = DECAY) -> None:
        """Takes the model's present weights into the running means; with a decay of 0, as they are.

        Call it before the first step of a phase with a decay of 0, and after every step.
        """
        torch._foreach_lerp_(self._means, self._parameters, 1 - decay)
        buffers = zip(self.student.named_buffers(), self.air.buffers(), strict=True)
        for (name, ours), theirs in buffers:
            if "." in name:  # the background; of user-defined nets, such as the moments of batches
                theirs.copy_(ours)

    def __call__(self, images: Tensor, log_q: Tensor, size: int) -> None:
        """Adds the term to the model that runs.

        Args:
            images: The batch, [B, (C,) H, H], as `AIR.to_images` returns it.
            log_q: log q(n) for n = 0..T, [B, T + 1].
            size: Number of images by which every cost is multiplied.
        """
        counted = infer_counts(self.air, images)
        counts, sums = counted.counts, make_sums(self.student, images, counted)
        with poutine.block(), LocalParameters(), AllStepsActive(detach=True) as steps:
            self.student.guide(sums.images)
        log_q_sums = count_log_probs(torch.cat(steps.presence, 1))
        of_batch, of_sums = (
            each.gather(1, n[:, None])[:, 0]
            for each, n in ((log_q, counts), (log_q_sums, sums.counts))
        )
        total = of_batch.sum() + (of_sums * sums.valid).sum()
        term = self.weight * size * total / (len(images) + sums.valid.sum())
        pyro.factor("count_teacher", term - term.detach())


def infer_counts(air: AIR, images: Tensor) -> Counted:
    """Counts objects, as `air.inference.infer` does, and one fewer where two objects are one.

    See `air.refinement.merge` and `BATCH_PER_MERGED`. Nothing here waits for the device.
    """
    with closed(air):
        scene = infer_scene(air, images)
        tried = max(1, len(images) // BATCH_PER_MERGED)
        k = closest_windows(scene)[0].topk(tried, largest=False).indices
        scene = scene.put(k, merge(air, images[k], scene.pick(k)))
        painted = paint_objects(air, scene)
        present = scene.in_use.T.to(painted.dtype)
        canvas = air.likelihood.compose(painted, present, scene.background)
        residual = relative_residual(images, canvas, scene.background)
        alone = air.likelihood.cut_out(images, painted, present)
    return Counted(scene.counts, residual < BADLY_EXPLAINED, alone)


def make_sums(air: AIR, images: Tensor, counted: Counted) -> Sums:
    """Adds scenes in pairs; picks pairs at random that can be added.

    Two scenes can be added if both have objects and are explained well, so that their counts are
    likely right; if the objects of one hide little of the other's, see `PixelLikelihood.fits`; and
    if the batch has scenes of as many objects, see `LEAST_SHARE`.

    Args:
        air: Says how objects add up.
        images: The batch, [B, (C,) H, H].
        counted: What was inferred of it.

    Returns:
        At least one sum, and one for every `BATCH_PER_SUM` scenes in the batch.
    """
    counts, explained, alone = counted
    n, usable = len(images), explained & (counts > 0)
    possible = torch.arange(air.num_steps + 1, device=counts.device)
    shares = (counts[:, None] == possible).to(images.dtype).mean(0)
    most = (possible * (shares >= LEAST_SHARE)).amax()
    scenes = torch.arange(n, device=counts.device)
    neighbours = [scenes.roll(k % n) for k in range(1, PARTNERS + 1)]  # in the batch
    fits = torch.cat([air.likelihood.fits(images, alone, alone[k]) for k in neighbours])
    rows, partners = scenes.repeat(PARTNERS), torch.cat(neighbours)
    totals = counts[rows] + counts[partners]
    valid = usable[rows] & usable[partners] & (totals <= most) & fits
    valid = valid & (rows != partners)  # in a small batch, some neighbour is the scene itself
    # The valid ones first, both parts in random order.
    order = (valid + torch.rand(len(valid), device=counts.device)).argsort(descending=True)
    k = order[: max(1, n // BATCH_PER_SUM)]
    sums = air.likelihood.add(images[rows[k]], alone[partners[k]]).clamp(max=1)
    return Sums(sums, totals[k].clamp(max=air.num_steps), valid[k])
