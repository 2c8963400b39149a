"""Use of a trained model: inference on images, and scenes sampled from the prior."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from air.air import AIR, Latents
from air.priors import presence_from_counts
from air.refinement import refine_scene
from air.scene import infer_scene, paint_objects
from air.spatial_transformer import window_boxes
from air.support.checks import check_whole
from air.support.handlers import closed
from air.support.images import to_tensor

# The least probability of a count in a learnt prior. A count of probability zero could not recover.
MIN_LEARNT_PROB = 1e-6


@contextmanager
def forked_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's generators for the block, and restores those of the CPU and the device."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type):
        torch.manual_seed(seed)
        yield


class Inference(NamedTuple):
    """The objects inferred in a batch of images.

    Objects of steps >= `counts` are in `z_where`, `z_what`, `boxes` and `objects` too.
    """

    count_probs: Tensor  # q(n) for n = 0..T, [B, T + 1]
    counts: Tensor  # the mode of q(n), [B]
    z_where: Tensor  # means, [B, T, 3]
    z_what: Tensor  # means, [B, T, Z]
    boxes: Tensor  # (x0, y0, x1, y1) of the windows in pixels, [B, T, 4]
    objects: Tensor  # each object painted alone on the background, [B, T, (C,) H, H]
    reconstructions: Tensor  # the first `counts` objects on the background, [B, (C,) H, H]
    backgrounds: Tensor  # [B, (C,) H, H]; black without a model of the background or a renderer
    changes: Tensor  # how far an object changes each pixel, in its strongest channel, [B, T, H, H]


def infer(air: AIR, images: Tensor | NDArray[Any], refine: bool = False) -> Inference:
    """Infers counts, windows and reconstructions for images, [B, (C,) H, H], on any device.

    The result is that of the means of q(z_where) and q(z_what), with nets in evaluation mode.
    Threads take turns, also with training by `air.training`; beside a step of Pyro's own SVI in
    another thread, call it in a process of its own.

    Args:
        air: The model.
        images: The images.
        refine: Whether to fit the latents of images that are explained badly, which takes some
            0.3 s for each of them on a CPU, and to merge two objects that one object explains as
            well (see `air.refinement`). An image has the same latents every time, whatever other
            images there are.

    Raises:
        ValueError: If the images have another shape, type or range than `AIR.to_images` takes.
    """
    images = to_tensor(images)
    air.check_images(images)
    images = images.to(air.h_init.device)
    if not len(images):
        blank = images.new_zeros(1, *images.shape[1:])
        return Inference._make(part[:0] for part in infer(air, blank))
    with closed(air):
        images = air.to_images(images)
        scene = infer_scene(air, images)
        if refine:
            if air.renderer != "none":
                raise ValueError("refine: expected windows that a decoder paints, not a renderer")
            scene = refine_scene(air, images, scene)
        painted = paint_objects(air, scene)
        present = scene.in_use.T.to(painted.dtype)
        canvas = air.likelihood.compose(painted, present, scene.background)
        alone = [air.likelihood.add(scene.background, each) for each in painted]
        objects = torch.stack([air.likelihood.show(each) for each in alone], 1)
        background = air.likelihood.show(scene.background)
    changes = (objects - background[:, None]).abs()
    return Inference(
        count_probs=scene.log_q.exp(),
        counts=scene.counts,
        z_where=scene.where,
        z_what=scene.what,
        boxes=window_boxes(air.window(scene.where), air.x_size),
        objects=objects,
        reconstructions=air.likelihood.show(canvas),
        backgrounds=background,
        changes=changes.amax(2) if air.channels > 1 else changes,
    )


def mean_count_probs(air: AIR, images: Tensor | NDArray[Any]) -> list[float]:
    """The mean of q(n) over images, [N, (C,) H, H], for n = 0..T; every probability is above 0.

    Raises:
        ValueError: If there are no images, or `infer` cannot take them.
    """
    images = to_tensor(images)
    if not images.numel():
        raise ValueError(f"images: expected one image or more, got {list(images.shape)}")
    air.check_images(images)
    with closed(air):
        log_q = [infer_scene(air, air.to_images(part)).log_q for part in torch.split(images, 500)]
    mean = torch.cat(log_q).exp().cpu().double().mean(0).clamp(min=MIN_LEARNT_PROB)
    return [float(p) for p in mean / mean.sum()]


def sample_prior(
    air: AIR, num_scenes: int, seed: int, count_prior: Sequence[float] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples scenes from the prior.

    Args:
        air: The model.
        num_scenes: Number of scenes, N.
        seed: Seed of the samples; the global generators are restored afterwards.
        count_prior: p(n), n = 0..T. None makes all counts equally likely, because nearly all
            scenes would be empty under the default prior of training.

    Returns:
        Canvases, [N, (C,) H, H], boxes as in `Inference`, [N, T, 4], and counts, [N].

    Raises:
        ValueError: If `num_scenes` is negative, or `count_prior` is not T + 1 numbers above zero.
    """
    check_whole("num_scenes", num_scenes, 0)
    size = air.num_steps + 1
    weights = [1.0] * size if count_prior is None else [float(p) for p in count_prior]
    if len(weights) != size:
        raise ValueError(
            f"count_prior: expected {size} numbers, p(0) to p({air.num_steps}), got {len(weights)}"
        )
    presence = presence_from_counts(weights)
    with closed(air), forked_rng(seed, air.h_init.device):
        (z_where, z_pres), canvas = air.prior(num_scenes, presence.__getitem__)
    boxes = window_boxes(air.window(torch.stack(z_where, 1)), air.x_size)
    return air.likelihood.show(canvas), boxes, torch.cat(z_pres, 1).sum(1).long()


def latents_to_tensor(z: Latents) -> Tensor:
    """Joins (z_where, z_pres), lists over steps, into one tensor [B, T, 4] on the CPU."""
    return torch.stack([torch.cat(step, 1).detach().cpu() for step in zip(*z, strict=True)], 1)
