"""How good a model is on held-out scenes: count accuracy, confusion, ELBO."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from air.air import AIR
from air.priors import PresencePrior
from air.spatial_transformer import window_boxes


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
    boxes: Tensor  # (x0, y0, x1, y1) of the windows in pixels, [B, T, 4]
    reconstructions: Tensor  # the canvas painted from the first `counts` objects, [B, H, H]


@torch.no_grad()
def infer(air: AIR, images: Tensor) -> Inference:
    """Infers counts, windows and reconstructions for images, [B, H, H].

    q(n) = (1 - q_{n+1}) * q_1 * ... * q_n, where q_t = q(z_pres_t = 1 | z_pres_{t-1} = 1, x)
    along the path on which z_where and z_what are at their means.
    """
    trace: Any = poutine.trace(_MeanPath()(air.guide)).get_trace(images)
    steps = range(air.num_steps)
    going_on = torch.cat([trace.nodes[f"z_pres_{t}"]["fn"].mean for t in steps], 1)  # [B, T]
    none = torch.zeros_like(going_on[:, :1])
    reached = torch.cat((1 - none, going_on.cumprod(1)), 1)  # q(n >= t)
    count_probs = reached * torch.cat((1 - going_on, 1 - none), 1)
    counts = count_probs.argmax(1)

    choices = {name: s["value"] for name, s in trace.nodes.items() if name.startswith("z_")}
    choices |= {f"z_pres_{t}": (counts > t).to(going_on)[:, None] for t in steps}
    _, canvas = poutine.condition(air.prior, data=choices)(len(images))
    z_where = torch.stack([choices[f"z_where_{t}"] for t in steps], 1)
    return Inference(count_probs, counts, z_where, window_boxes(z_where, air.x_size), canvas)


@torch.no_grad()
def sample_elbo(
    air: AIR, images: Tensor, z_pres_prior_p: PresencePrior | None = None
) -> tuple[Tensor, Tensor]:
    """One sample of each image's ELBO in nats, [B], and of its count, [B]."""
    arguments: Any = {"data": images, "z_pres_prior_p": z_pres_prior_p}
    guide_trace: Any = poutine.trace(air.guide).get_trace(**arguments)
    model = poutine.replay(air.model, trace=guide_trace)
    model_trace = poutine.trace(model).get_trace(**arguments)
    elbo = _log_prob(model_trace) - _log_prob(guide_trace)
    counts = sum(guide_trace.nodes[f"z_pres_{t}"]["value"][:, 0] for t in range(air.num_steps))
    return elbo, torch.as_tensor(counts).long()


def _log_prob(trace: Trace) -> Tensor:
    """The log probability of each image's choices in a trace, [B]."""
    trace.compute_log_prob()
    terms = [s["log_prob"] for s in trace.nodes.values() if s["type"] == "sample"]
    return torch.as_tensor(sum(terms))


class Evaluation(NamedTuple):
    """Measures of one model on one set of scenes; the last three need true counts."""

    elbo: float  # nats per image
    elbo_se: float  # its standard error over images
    count_histogram: list[int]  # images by inferred count (mode), 0..T
    accuracy_mode: float | None  # share of images whose count is the mode of q(n)
    accuracy_sample: float | None  # the same for the count of one sample from the guide
    confusion: list[list[int]] | None  # images by true count (rows) and inferred count (mode)


def confusion_matrix(true: Tensor, inferred: Tensor, num_steps: int) -> Tensor:
    """Images by true count, 0 to the largest, and inferred count, 0..num_steps."""
    rows = int(true.max()) + 1 if len(true) else 1
    cells = true * (num_steps + 1) + inferred
    return torch.bincount(cells, minlength=rows * (num_steps + 1)).reshape(rows, -1)


def evaluate(
    air: AIR,
    images: Tensor,
    true_counts: Tensor | None,
    z_pres_prior_p: PresencePrior | None = None,
    batch_size: int = 500,
    seed: int = 0,
) -> Evaluation:
    """Evaluates a model on held-out scenes, in batches of which the last may be short.

    Args:
        air: The model.
        images: [N, H, H], uint8 in [0, 255] or floats in [0, 1], on any device.
        true_counts: [N], or None where they are not known.
        z_pres_prior_p: The prior the ELBO is taken under, as for `AIR.model`.
        batch_size: Images at a time.
        seed: Of the samples. The state of the global generators is left as it was, so that
            training goes on the same whether and whenever it is evaluated.

    Raises:
        ValueError: If there are no images.
    """
    if not len(images):
        raise ValueError("there are no scenes to evaluate on")
    device = air.h_init.device
    elbos, modes, samples = [], [], []
    with forked_rng(seed, device):
        for batch in torch.split(images, batch_size):
            on_device = batch.to(device)
            modes.append(infer(air, on_device).counts.cpu())
            elbo, count = sample_elbo(air, on_device, z_pres_prior_p)
            elbos.append(elbo.double().cpu())
            samples.append(count.cpu())
    elbo, mode, sample = torch.cat(elbos), torch.cat(modes), torch.cat(samples)
    elbo_se = float(elbo.std()) / math.sqrt(len(elbo)) if len(elbo) > 1 else math.nan
    histogram = torch.bincount(mode, minlength=air.num_steps + 1).tolist()
    if true_counts is None:
        return Evaluation(float(elbo.mean()), elbo_se, histogram, None, None, None)
    true = true_counts.cpu().long()
    return Evaluation(
        float(elbo.mean()),
        elbo_se,
        histogram,
        float((mode == true).double().mean()),
        float((sample == true).double().mean()),
        confusion_matrix(true, mode, air.num_steps).tolist(),
    )
