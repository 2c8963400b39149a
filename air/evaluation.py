"""How good a model is on held-out scenes: count accuracy, confusion, ELBO."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro.poutine as poutine
import torch
from numpy.typing import NDArray
from pyro.poutine.messenger import Messenger
from torch import Tensor

from air.air import AIR
from air.boxes import score_boxes, tight_boxes
from air.priors import PresencePrior, geometric_count_prior
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
    objects: Tensor  # each painted alone, [B, T, H, H]
    reconstructions: Tensor  # the canvas of the first `counts` of them, [B, H, H]


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

    z_where, z_what = (
        [trace.nodes[f"{kind}_{t}"]["value"] for t in steps] for kind in ("z_where", "z_what")
    )
    objects = air.paint(z_where, z_what).transpose(0, 1)
    in_use = torch.arange(air.num_steps, device=counts.device) < counts[:, None]
    canvas = (objects * in_use[:, :, None, None]).sum(1)
    where = torch.stack(z_where, 1)
    boxes = window_boxes(where, air.x_size)
    return Inference(count_probs, counts, where, boxes, objects, canvas)


@torch.no_grad()
def sample_prior(air: AIR, number: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draws scenes from the prior with all counts equally likely: [N, H, H], boxes and counts.

    Under the count prior of training nearly all would be empty. The boxes are as in `Inference`.
    """
    presence = geometric_count_prior(1.0, air.num_steps)
    with forked_rng(seed, air.h_init.device):
        (z_where, z_pres), canvas = air.prior(number, presence.__getitem__)
    boxes = window_boxes(torch.stack(z_where, 1), air.x_size)
    return canvas, boxes, torch.cat(z_pres, 1).sum(1).long()


class ElboTerms(NamedTuple):
    """One sample of each image's ELBO in nats, term by term, [B] each."""

    log_likelihood: Tensor
    kl_pres: Tensor  # log q(z_pres) - log p(z_pres), and so on
    kl_where: Tensor
    kl_what: Tensor
    counts: Tensor  # of the same sample

    @property
    def elbo(self) -> Tensor:
        """Their sum, which is also the log of an importance weight of p(x)."""
        return self.log_likelihood - self.kl_pres - self.kl_where - self.kl_what


@torch.no_grad()
def sample_elbo(air: AIR, images: Tensor, z_pres_prior_p: PresencePrior | None = None) -> ElboTerms:
    """Draws z from the guide once for each image, [B, H, H]."""
    arguments: Any = {"data": images, "z_pres_prior_p": z_pres_prior_p}
    guide: Any = poutine.trace(air.guide).get_trace(**arguments)
    model: Any = poutine.trace(poutine.replay(air.model, trace=guide)).get_trace(**arguments)
    guide.compute_log_prob()
    model.compute_log_prob()
    steps = range(air.num_steps)

    def kl(kind: str) -> Tensor:
        names = [f"{kind}_{t}" for t in steps]
        return sum(guide.nodes[n]["log_prob"] - model.nodes[n]["log_prob"] for n in names)

    counts = sum(guide.nodes[f"z_pres_{t}"]["value"][:, 0] for t in steps).long()
    likelihood = model.nodes["obs"]["log_prob"]
    return ElboTerms(likelihood, kl("z_pres"), kl("z_where"), kl("z_what"), counts)


@torch.no_grad()
def importance_weighted_bound(
    air: AIR, images: Tensor, samples: int, z_pres_prior_p: PresencePrior | None = None
) -> Tensor:
    """A lower bound of each image's log p(x) in nats, [B]: log of the mean of K weights p / q.

    One sample is drawn at a time, so that memory does not grow with their number. With more of
    them the bound rises from the ELBO to log p(x) (Burda et al. 2016, arXiv:1509.00519); with
    none it is minus infinity.
    """
    images = images.to(air.h_init.device)
    log_sum = torch.full((len(images),), -math.inf, device=images.device)
    for _ in range(samples):
        log_weights = sample_elbo(air, images, z_pres_prior_p).elbo
        log_sum = torch.logaddexp(log_sum.to(log_weights), log_weights)
    return log_sum - math.log(max(samples, 1))


class HeldOut(NamedTuple):
    """Scenes to evaluate on, and what is known of them."""

    images: Tensor  # [N, H, H], uint8 in [0, 255] or floats in [0, 1], on any device
    counts: Tensor | None = None  # true counts, [N]
    boxes: Tensor | None = None  # tight boxes of the objects in pixels, [N, M, 4]
    overlaps: Tensor | None = None  # pixels that two objects share, [N]

    @classmethod
    def from_numpy(cls, *arrays: NDArray[Any] | None) -> "HeldOut":
        """The fields in their order, as NumPy arrays."""
        return cls(*(None if a is None else torch.from_numpy(a) for a in arrays))  # type: ignore[arg-type]

    def first(self, number: int) -> "HeldOut":
        """The first so many of them."""
        return HeldOut._make(part if part is None else part[:number] for part in self)


class Evaluation(NamedTuple):
    """Measures of one model on one set of scenes; None where what they need is not known.

    Nats are per image; an accuracy is the share of scenes whose count is right.
    """

    elbo: float
    elbo_se: float  # standard error over images
    log_likelihood: float  # the ELBO's terms: log_likelihood - kl_pres - kl_where - kl_what
    kl_pres: float
    kl_where: float
    kl_what: float
    count_histogram: list[int]  # images by inferred count (mode), 0..T
    bound: float | None = None  # importance-weighted bound of log p(x)
    bound_se: float | None = None
    accuracy_mode: float | None = None  # by the mode of q(n)
    accuracy_sample: float | None = None  # by one sample
    accuracy_apart: float | None = None  # by mode, over scenes of several objects apart: those
    # that share no pixel
    confusion: list[list[int]] | None = None  # images by true count (rows) and inferred (mode)
    box_iou: float | None = None  # of the objects as painted; see `boxes.BoxScores`
    box_f1: float | None = None
    box_ap: float | None = None


def confusion_matrix(true: Tensor, inferred: Tensor, num_steps: int) -> Tensor:
    """Images by true count, 0 to the largest, and inferred count, 0..num_steps."""
    rows = int(true.max()) + 1 if len(true) else 1
    cells = true * (num_steps + 1) + inferred
    return torch.bincount(cells, minlength=rows * (num_steps + 1)).reshape(rows, -1)


def evaluate(
    air: AIR,
    scenes: HeldOut,
    z_pres_prior_p: PresencePrior | None = None,
    batch_size: int = 500,
    seed: int = 0,
    iwae_samples: int = 0,
    iwae_scenes: int = 2000,
) -> Evaluation:
    """Evaluates a model on held-out scenes, in batches of which the last may be short.

    Args:
        air: The model.
        scenes: To evaluate on.
        z_pres_prior_p: The prior the ELBO is taken under, as for `AIR.model`.
        batch_size: Images at a time.
        seed: Of the samples. The global generators are left as they were, so that training goes
            on the same whether and whenever it is evaluated.
        iwae_samples: Samples in the importance-weighted bound; 0 for no bound.
        iwae_scenes: The bound is that of the first so many scenes.

    Raises:
        ValueError: If there are no scenes.
    """
    if not len(scenes.images):
        raise ValueError("there are no scenes to evaluate on")
    with forked_rng(seed, air.h_init.device):
        batches = torch.split(scenes.images, batch_size)
        parts = [_measure(air, batch.to(air.h_init.device), z_pres_prior_p) for batch in batches]
        bounds = [
            importance_weighted_bound(air, batch, iwae_samples, z_pres_prior_p).cpu()
            for batch in torch.split(scenes.images[:iwae_scenes], batch_size)
        ]
    count_probs, boxes, *terms = map(torch.cat, zip(*parts, strict=True))
    sampled, mode = ElboTerms(*terms), count_probs.argmax(1)
    elbo, elbo_se = mean_and_se(sampled.elbo)
    return Evaluation(
        elbo,
        elbo_se,
        float(sampled.log_likelihood.mean()),
        float(sampled.kl_pres.mean()),
        float(sampled.kl_where.mean()),
        float(sampled.kl_what.mean()),
        torch.bincount(mode, minlength=air.num_steps + 1).tolist(),
        *(mean_and_se(torch.cat(bounds)) if iwae_samples else (None, None)),
        **_against_truth(scenes, count_probs, sampled.counts, boxes),
    )


def _measure(air: AIR, images: Tensor, z_pres_prior_p: PresencePrior | None) -> tuple[Tensor, ...]:
    """q(n), boxes and the terms of a sampled ELBO for one batch, on the CPU."""
    found, terms = infer(air, images), sample_elbo(air, images, z_pres_prior_p)
    measured = (found.count_probs, tight_boxes(found.objects), *terms)
    return tuple(part.cpu() for part in measured)


def _against_truth(
    scenes: HeldOut, count_probs: Tensor, sampled_counts: Tensor, boxes: Tensor
) -> dict[str, Any]:
    """The measures that need true counts, and those that need boxes or overlaps too."""
    if scenes.counts is None:
        return {}
    true, mode = scenes.counts.cpu().long(), count_probs.argmax(1)
    right = (mode == true).double()
    measures = {
        "accuracy_mode": float(right.mean()),
        "accuracy_sample": float((sampled_counts == true).double().mean()),
        "confusion": confusion_matrix(true, mode, count_probs.size(1) - 1).tolist(),
    }
    if scenes.overlaps is not None:
        apart = (true > 1) & (scenes.overlaps.cpu() == 0)
        measures["accuracy_apart"] = float(right[apart].mean())
    if scenes.boxes is not None:
        reached = count_probs.flip(1).cumsum(1).flip(1)[:, 1:]  # q(n >= t)
        scores = score_boxes(boxes, reached, mode, scenes.boxes.cpu(), true)
        measures |= {f"box_{name}": score for name, score in scores._asdict().items()}
    return measures


def mean_and_se(values: Tensor) -> tuple[float, float]:
    """The mean of [N] values and its standard error, NaN for a single one."""
    values = values.double()
    se = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), se
