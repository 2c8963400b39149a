"""Teaches the guide to count, by scenes made by adding two scenes: one and one make two objects.

Once the guide covers two close objects with one window, the ELBO gives it no reason to change: a
second window beside the first explains little more. But the guide counts most scenes rightly, so
the count of the sum of two scenes is known before anyone looks at the sum. At every step, some
pairs of scenes in the batch are added, and q(n) of the sums is fitted to the sums of the counts.

Sums alone would teach the guide to count too many everywhere. So q(n) of the batch is fitted as
well, to the counts of an earlier guide: a net whose weights are the running mean of the model's
weights, over some 200 steps. Where it puts two windows on one object, which shows without labels
(`air.merging`), the count is one lower. No label is used.

Knobel et al. 2024 learn to count from pasted crops (arXiv:2307.08727). To train on composed scenes
is the sleep phase of wake-sleep (Hinton et al. 1995); here the parts of a composed scene are real,
so it has no errors of the decoder. The earlier guide is the "mean teacher" of Tarvainen and
Valpola 2017 (arXiv:1703.01780).
"""

import copy
from typing import Any, NamedTuple

import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor

from air.air import AIR
from air.marginal import AllStepsActive
from air.merging import closest_windows, merge, paint_scenes, relative_residual
from air.priors import count_log_probs
from air.refinement import BADLY_EXPLAINED
from air.settings import SettingError
from air.support_handlers import LocalParameters
from air.training.settings import TrainingSettings

PARTNERS = 6  # scenes to which each scene is added, to see whether the sum can be used
BATCH_PER_MADE = 4  # scenes in the batch for each sum that is used
# A sum of n objects is used only if the counts of at least this share of the batch are n, or some
# greater number: otherwise objects are taught that do not occur.
LEAST_SHARE = 0.05
# Merging is tried in one scene of every so many in the batch: in those with the closest windows.
BATCH_PER_MERGED = 16
TEACHER_DECAY = 0.995  # share of the earlier guide's weights that a step keeps


class MadeScenes(NamedTuple):
    """M scenes made by addition."""

    images: Tensor  # [M, (C,) H, H]
    counts: Tensor  # [M]
    valid: Tensor  # bool [M]; false for fillers, where fewer than M pairs could be added


class AddedScenes:
    """A term of the training loss whose value is zero, and whose gradient teaches q(n).

    In the sums, no gradient flows through z_where and z_what. In the batch it does, for there q(n)
    is that of the ELBO.

    Attributes:
        weight: Factor of the mean log q(n), which is then in nats per image, like the ELBO. A
            tensor of one number; zero at first.
        teacher: The earlier guide, an AIR.

    Raises:
        SettingError: If the AIR has a model of the background.
    """

    def __init__(self, air: AIR) -> None:
        if air.background is not None:
            reason = "0 with a model of the background, for a sum of two scenes would have two"
            raise SettingError("added_scenes", f"expected {reason}")
        self.air = air
        self.weight = torch.zeros_like(air.h_init[0, 0].detach())
        self.teacher = copy.deepcopy(air).requires_grad_(False).eval()
        self._is_set_to = 0.0
        pairs = [
            (ours, theirs)
            for (name, ours), theirs in zip(
                air.named_parameters(), self.teacher.parameters(), strict=True
            )
            if not name.startswith("bl_")
        ]
        self._parameters, self._means = map(list, zip(*pairs, strict=True))

    def set_weight(self, weight: float) -> None:
        """Changes the weight. Writes to the device only if it differs."""
        if weight != self._is_set_to:
            self.weight.fill_(weight)
            self._is_set_to = weight

    def before_step(self, step: int, settings: TrainingSettings) -> None:
        """Prepares a step, counted from zero."""
        if step == 0:  # the model may have been loaded since
            self.start()
        if step >= settings.added_scenes_from:
            self.set_weight(settings.added_scenes)

    @torch.no_grad()
    def start(self) -> None:
        """Makes the earlier guide the present one; call it before the first step."""
        torch._foreach_copy_(self._means, self._parameters)
        self._copy_buffers()

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Takes the model's present weights into the running means; call it after every step."""
        torch._foreach_lerp_(self._means, self._parameters, 1 - TEACHER_DECAY)
        self._copy_buffers()

    def _copy_buffers(self) -> None:
        """Copies the buffers of nets of one's own, such as the moments of batches."""
        for (name, ours), theirs in zip(
            self.air.named_buffers(), self.teacher.buffers(), strict=True
        ):
            if "." in name:
                theirs.copy_(ours)

    def __call__(self, images: Tensor, log_q: Tensor, size: int) -> None:
        """Adds the term to the model that runs.

        Args:
            images: The batch, [B, (C,) H, H], as `AIR.to_images` returns it.
            log_q: log q(n) for n = 0..T, [B, T + 1].
            size: Number of images by which every cost is multiplied.
        """
        counts, explained = infer_counts(self.teacher, images)
        made = make_scenes(self.air, images, counts, explained)
        with poutine.block(), AllStepsActive(detach=True) as steps:
            self.air.guide(made.images)
        log_q_made = count_log_probs(torch.cat(steps.continue_probs, 1))
        of_batch, of_made = (
            each.gather(1, n[:, None])[:, 0]
            for each, n in ((log_q, counts), (log_q_made, made.counts))
        )
        total = of_batch.sum() + (of_made * made.valid).sum()
        term = self.weight * size * total / (len(images) + made.valid.sum())
        pyro.factor("added_scenes", term - term.detach())


@torch.no_grad()
def infer_counts(air: AIR, images: Tensor) -> tuple[Tensor, Tensor]:
    """Counts, [B], and whether the objects explain the scene well, bool [B].

    Counts are the modes of q(n), as in `air.inference.infer`, and one fewer where two objects are
    one, see `air.merging` and `BATCH_PER_MERGED`. Nothing here waits for the device.
    """
    with poutine.block(), LocalParameters(), AllStepsActive(use_means=True) as steps:
        trace: Any = poutine.trace(air.guide).get_trace(images)
    counts = count_log_probs(torch.cat(steps.continue_probs, 1)).argmax(1)
    where, what = (
        torch.stack([trace.nodes[f"{site}_{t}"]["value"] for t in range(air.num_steps)], 1)
        for site in ("z_where", "z_what")
    )
    residual = relative_residual(images, paint_scenes(air, where, what, counts))
    tried = max(1, len(images) // BATCH_PER_MERGED)
    k = closest_windows(where, counts)[0].topk(tried, largest=False).indices
    merged = merge(air, images[k], where[k], what[k], counts[k])
    after = torch.where(merged.are_one, relative_residual(images[k], merged.canvas), residual[k])
    counts = counts.scatter(0, k, counts[k] - merged.are_one.to(counts.dtype))
    return counts, residual.scatter(0, k, after) < BADLY_EXPLAINED


def make_scenes(air: AIR, images: Tensor, counts: Tensor, explained: Tensor) -> MadeScenes:
    """Adds scenes in pairs; picks pairs at random that can be added.

    Two scenes can be added if both have objects and are explained well, so that their counts are
    likely right; if no intensity of the sum is above one (with Bernoulli pixels none is, so objects
    may overlap); and if the batch has scenes of as many objects, see `LEAST_SHARE`.

    Args:
        air: Says how objects add up.
        images: The batch, [B, (C,) H, H].
        counts: The inferred counts, [B].
        explained: Whether the inferred objects explain the scene well, bool [B].

    Returns:
        At least one scene, and one for every `BATCH_PER_MADE` scenes in the batch.
    """
    n, usable = len(images), explained & (counts > 0)
    possible = torch.arange(air.num_steps + 1, device=counts.device)
    shares = (counts[:, None] == possible).to(images.dtype).mean(0)
    most = (possible * (shares >= LEAST_SHARE)).amax()
    scenes = torch.arange(n, device=counts.device)
    neighbours = [scenes.roll(k % n) for k in range(1, PARTNERS + 1)]  # in the batch
    brightest = [air.likelihood.add(images, images[k]).flatten(1).amax(1) for k in neighbours]
    rows, partners, fits = scenes.repeat(PARTNERS), torch.cat(neighbours), torch.cat(brightest) <= 1
    totals = counts[rows] + counts[partners]
    valid = usable[rows] & usable[partners] & (totals <= most) & fits
    valid = valid & (rows != partners)  # in a small batch, some neighbour is the scene itself
    # The valid ones first, both parts in random order.
    order = (valid + torch.rand(len(valid), device=counts.device)).argsort(descending=True)
    k = order[: max(1, n // BATCH_PER_MADE)]
    sums = air.likelihood.add(images[rows[k]], images[partners[k]]).clamp(max=1)
    return MadeScenes(sums, totals[k].clamp(max=air.num_steps), valid[k])
