"""What the guide finds in a picture, and scenes drawn from the prior; neither trains anything."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from air.air import AIR, Latents
from air.priors import continue_probs_from_counts
from air.spatial_transformer import window_boxes

RAREST = 1e-6  # probability of a count in a learnt prior: never so low that none can come back


@contextmanager
def forked_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's generators for the block, and puts them back as they were after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class _MeanPath(Messenger):
    """Runs the guide with every step active and z_where and z_what at their means.

    The guide depends on z_pres only through stopping, so this one path gives every q(n).
    """

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"].startswith("z_"):
            mean = msg["fn"].mean
            msg["value"] = torch.ones_like(mean) if msg["name"].startswith("z_pres") else mean
            msg["done"] = True


class Inference(NamedTuple):
    """What the guide finds in a batch of images, without sampling."""

    count_probs: Tensor  # q(n) for n = 0..T, [B, T + 1]
    counts: Tensor  # its mode, [B]
    z_where: Tensor  # means, [B, T, 3]; those of steps >= count are not in use
    z_what: Tensor  # alike, [B, T, Z]
    boxes: Tensor  # (x0, y0, x1, y1) of the windows in pixels, [B, T, 4]
    objects: Tensor  # each painted alone, [B, T, (C,) H, H]
    reconstructions: Tensor  # the canvas of the first `counts` of them, [B, (C,) H, H]


@torch.no_grad()
def infer(air: AIR, images: Tensor) -> Inference:
    """Infers counts, windows and reconstructions for images, [B, (C,) H, H].

    q(n) = (1 - q_{n+1}) * q_1 * ... * q_n, where q_t = q(z_pres_t = 1 | z_pres_{t-1} = 1, x)
    along the path on which z_where and z_what are at their means.
    """
    trace: Any = poutine.trace(_MeanPath()(air.guide)).get_trace(images)
    steps = range(air.num_steps)
    continue_probs = torch.cat([trace.nodes[f"z_pres_{t}"]["fn"].mean for t in steps], 1)  # [B, T]
    none = torch.zeros_like(continue_probs[:, :1])
    reached = torch.cat((1 - none, continue_probs.cumprod(1)), 1)  # q(n >= t)
    count_probs = reached * torch.cat((1 - continue_probs, 1 - none), 1)
    counts = count_probs.argmax(1)

    z_where, z_what = (
        [trace.nodes[f"{kind}_{t}"]["value"] for t in steps] for kind in ("z_where", "z_what")
    )
    objects = air.paint(z_where, z_what).transpose(0, 1)
    in_use = torch.arange(air.num_steps, device=counts.device) < counts[:, None]
    canvas = air.likelihood.compose(objects.transpose(0, 1), in_use.t())
    where, what = torch.stack(z_where, 1), torch.stack(z_what, 1)
    boxes = window_boxes(where, air.x_size)
    return Inference(count_probs, counts, where, what, boxes, objects, canvas)


def mean_count_probs(air: AIR, images: Tensor) -> list[float]:
    """The mean of q(n) over images, [N, (C,) H, H], for n = 0..T; none of them quite zero."""
    parts = [infer(air, part).count_probs for part in torch.split(images, 500)]
    mean = torch.cat(parts).double().mean(0).clamp(min=RAREST)
    return [float(p) for p in mean / mean.sum()]


@torch.no_grad()
def sample_prior(
    air: AIR, number: int, seed: int, count_prior: Sequence[float] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws scenes from the prior: [N, (C,) H, H], boxes as in `Inference`, and counts.

    Without a `count_prior`, p(n), all counts are equally likely: under that of training, before it
    is learnt, nearly all scenes would be empty.
    """
    presence = continue_probs_from_counts(count_prior or [1.0] * (air.num_steps + 1))
    with forked_rng(seed, air.h_init.device):
        (z_where, z_pres), canvas = air.prior(number, presence.__getitem__)
    boxes = window_boxes(torch.stack(z_where, 1), air.x_size)
    return canvas, boxes, torch.cat(z_pres, 1).sum(1).long()


def latents_to_tensor(z: Latents) -> Tensor:
    """Joins (z_where, z_pres), lists over steps, into one tensor [B, T, 4] on the CPU."""
    return torch.stack([torch.cat(step, 1).detach().cpu() for step in zip(*z, strict=True)], 1)
