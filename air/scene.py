"""Scenes: the objects that a guide infers in images, and the painting of them.

A `Scene` is what one pass of the guide returns (`infer_scene`), what refinement improves, what the
teacher of `air.training.teacher` counts, and what `air.inference.infer` turns into pictures.
"""

from typing import Any, NamedTuple

import pyro.poutine as poutine
import torch
from torch import Tensor

from air.air import AIR
from air.marginal import AllStepsActive
from air.priors import count_log_probs


class Scene(NamedTuple):
    """B scenes of T objects, of which the first n are present with probability q(n)."""

    log_q: Tensor  # log q(n), n = 0..T, [B, T + 1]
    where: Tensor  # mean of q(z_where), [B, T, 3]
    where_sd: Tensor  # its standard deviation, [B, T, 3]
    what: Tensor  # mean of q(z_what), [B, T, Z]
    what_sd: Tensor  # its standard deviation, [B, T, Z]
    background: Tensor  # [B, (C,) H, H]; black without a model of the background

    @property
    def counts(self) -> Tensor:
        """The most probable counts, [B]."""
        return self.log_q.argmax(1)

    @property
    def in_use(self) -> Tensor:
        """The objects of the most probable counts, bool [B, T]."""
        return first_objects(self.counts, self.where.shape[1])

    def pick(self, rows: Tensor) -> "Scene":
        """The scenes of these indices, or of a mask."""
        return Scene._make(part[rows] for part in self)

    def put(self, rows: Tensor, scenes: "Scene") -> "Scene":
        """These scenes, with others in the place of those of these indices."""
        return Scene._make(
            part.index_copy(0, rows, new) for part, new in zip(self, scenes, strict=True)
        )


def first_objects(counts: Tensor, num_steps: int) -> Tensor:
    """The first `counts` of T objects, bool [B, T]."""
    return torch.arange(num_steps, device=counts.device) < counts[:, None]


def infer_scene(air: AIR, images: Tensor) -> Scene:
    """The scene that the guide infers in each image, [B, (C,) H, H], in one pass.

    The guide depends on z_pres only through stopping. So one run with every step active, and with
    all other latents at their means, gives every q(z_pres_t = 1 | z_pres_{t-1} = 1), and with them
    q(n). Images are those of `AIR.to_images`. Call this function within `closed`.
    """
    steps = AllStepsActive(use_means=True)
    trace: Any = poutine.trace(steps(air.guide)).get_trace(images)

    def stacked(site: str) -> tuple[Tensor, Tensor]:
        nodes = [trace.nodes[f"{site}_{t}"] for t in range(air.num_steps)]
        sds = [node["fn"].variance.sqrt() for node in nodes]
        return torch.stack([node["value"] for node in nodes], 1), torch.stack(sds, 1)

    background = torch.zeros_like(images)
    if air.background is not None:
        background = air.background.paint(trace.nodes["z_background"]["value"])
    log_q = count_log_probs(torch.cat(steps.presence, 1))
    return Scene(log_q, *stacked("z_where"), *stacked("z_what"), background)


def paint_objects(air: AIR, scene: Scene) -> Tensor:
    """Each object of each scene alone, as `AIR.paint` paints it, [T, B, (C,) H, H]."""
    return air.paint(scene.where.unbind(1), scene.what.unbind(1))


def paint(air: AIR, scene: Scene, present: Tensor | None = None) -> Tensor:
    """The canvases: background and objects, [B, (C,) H, H].

    `present`, bool [B, T], are the objects to paint; None for those of the most probable counts.
    """
    present = scene.in_use if present is None else present
    objects = paint_objects(air, scene)
    return air.likelihood.compose(objects, present.T.to(objects.dtype), scene.background)
