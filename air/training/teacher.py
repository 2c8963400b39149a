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

The teacher is the "mean teacher" of Tarvainen and Valpola 2017 (arXiv:1703.01780); sums are made in
`air.training.known_objects`.
"""

import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor

from air.air import AIR
from air.refinement import closest_windows, merge, relative_residual
from air.scene import infer_scene, paint_objects
from air.support.checks import copied
from air.support.handlers import LocalParameters, closed
from air.training.known_objects import GivenObjects, KnownObjects, make_sums

BATCH_PER_SUM = 4  # scenes in the batch for each sum
# Merging is tried in one sixteenth of the batch: in the scenes with the closest windows.
BATCH_PER_MERGED = 16
BADLY_EXPLAINED = 0.5  # relative residual from which the objects of a scene are not known
DECAY = 0.995  # share of the teacher's weights that a step keeps


class Teacher:
    """A term of the training loss whose value is zero, and whose gradient teaches q(n).

    In the sums, the windows are those that the teacher found in the parts. In the batch, gradients
    flow through z_where and z_what too, because q(n) is that of the ELBO there.

    Args:
        air: The model.
        weight: Factor of the mean log q(n), which is then in nats per image, like the ELBO.

    Attributes:
        air: The teacher, an AIR of running means.
    """

    def __init__(self, air: AIR, weight: float) -> None:
        self.student, self.weight = air, weight
        reason = "the teacher of added scenes is a copy; --added-scenes 0 trains without it"
        self.air = copied("the model", air, reason).requires_grad_(False).eval()
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
        """Adds the term to the model that runs; see `CountTerm`."""
        known, alone = infer_objects(self.air, images)
        number = max(1, len(images) // BATCH_PER_SUM)
        sums, of_sums = make_sums(self.student.likelihood, images, alone, known, number)
        with poutine.block(), LocalParameters(), GivenObjects(of_sums, nearest=True) as given:
            self.student.guide(sums)
        of_batch = log_q.gather(1, known.counts[:, None]).sum()
        total = of_batch + (given.log_q["z_pres"] * of_sums.sure).sum()
        term = self.weight * size * total / (len(images) + of_sums.sure.sum())
        pyro.factor("count_teacher", term - term.detach())


def infer_objects(air: AIR, images: Tensor) -> tuple[KnownObjects, Tensor]:
    """Infers objects, as `air.inference.infer` does, and one fewer where two objects are one.

    See `air.refinement.merge` and `BATCH_PER_MERGED`. Nothing here waits for the device.

    Returns:
        The objects, which are sure where they explain the image well; and the objects of each image
        without its background, as `PixelLikelihood.cut_out` returns them.
    """
    with closed(air):
        scene = infer_scene(air, images)
        tried = max(1, len(images) // BATCH_PER_MERGED)
        k = closest_windows(scene)[0].topk(tried, largest=False).indices
        scene = scene.put(k, merge(air, images[k], scene.pick(k)))
        painted = paint_objects(air, scene)
        present = scene.in_use.to(painted.dtype)
        canvas = air.likelihood.compose(painted, present.T, scene.background)
        residual = relative_residual(images, canvas, scene.background)
        alone = air.likelihood.cut_out(images, painted, present.T)
    return KnownObjects(present, scene.where, residual < BADLY_EXPLAINED), alone
