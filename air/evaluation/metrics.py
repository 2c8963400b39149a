"""How good a model is on held-out scenes: count accuracy, confusion, ELBO."""

import math
from typing import Any, NamedTuple

import numpy as np
import pyro.poutine as poutine
import torch
from numpy.typing import NDArray
from torch import Tensor

from air.air import AIR
from air.evaluation.boxes import score_boxes, tight_boxes
from air.inference import forked_rng, infer
from air.priors import PresencePrior, at_least_probs

MAX_OBJECTS = 1000  # in one scene
MAX_MISCOUNTED = 16  # wrongly counted scenes that an evaluation names


class ElboTerms(NamedTuple):
    """One sample of each image's ELBO in nats, term by term, [B] each."""

    log_likelihood: Tensor
    kl_pres: Tensor  # log q(z_pres) - log p(z_pres), and so on
    kl_where: Tensor
    kl_what: Tensor
    counts: Tensor  # of the same sample
    baseline_squares: Tensor  # the baseline's squared errors, summed over the steps it is used at

    @property
    def elbo(self) -> Tensor:
        """Their sum, which is also the log of an importance weight of p(x)."""
        return self.log_likelihood - self.kl_pres - self.kl_where - self.kl_what


@torch.no_grad()
def sample_elbo(air: AIR, images: Tensor, z_pres_prior_p: PresencePrior | None = None) -> ElboTerms:
    """Draws z from the guide once for each image, [B, (C,) H, H]."""
    arguments: Any = {"data": images, "z_pres_prior_p": z_pres_prior_p}
    guide: Any = poutine.trace(air.guide).get_trace(**arguments)
    model: Any = poutine.trace(poutine.replay(air.model, trace=guide)).get_trace(**arguments)
    guide.compute_log_prob()
    model.compute_log_prob()
    presence = [guide.nodes[f"z_pres_{t}"] for t in range(air.num_steps)]

    def costs(kind: str) -> Tensor:  # [T, B]
        names = [f"{kind}_{t}" for t in range(air.num_steps)]
        return torch.stack([guide.nodes[n]["log_prob"] - model.nodes[n]["log_prob"] for n in names])

    pres, where, what = costs("z_pres"), costs("z_where"), costs("z_what")
    likelihood = model.nodes["obs"]["log_prob"]
    squares = torch.zeros_like(likelihood)
    if air.use_baselines:
        baseline = torch.stack([node["infer"]["baseline"]["baseline_value"] for node in presence])
        # Of each z_pres_t the ELBO's terms that depend on it: its own and all that come after.
        to_go = likelihood - (pres + where + what).flip(0).cumsum(0).flip(0)
        used = torch.stack([torch.ones_like(squares)] + [n["value"][:, 0] for n in presence[:-1]])
        squares = (used * (to_go - baseline) ** 2).sum(0)
    counts = sum(node["value"][:, 0] for node in presence).long()
    return ElboTerms(likelihood, pres.sum(0), where.sum(0), what.sum(0), counts, squares)


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

    images: Tensor  # [N, (C,) H, H], uint8 in [0, 255] or floats in [0, 1], on any device
    counts: Tensor | None = None  # true counts, [N]
    boxes: Tensor | None = None  # tight boxes of the objects in pixels, [N, M, 4]
    overlaps: Tensor | None = None  # pixels that two objects share, [N]

    @classmethod
    def from_numpy(cls, *arrays: NDArray[Any] | None) -> "HeldOut":
        """The fields in their order, as NumPy arrays.

        Raises:
            ValueError: If a count is beyond sense, or a box of a counted object not there.
        """
        _, counts, boxes, _ = (*arrays, None, None, None)[:4]
        if counts is not None and (counts > MAX_OBJECTS).any():
            raise ValueError(f"counts: expected at most {MAX_OBJECTS}, got {counts.max()}")
        if counts is not None and boxes is not None:
            used = np.arange(boxes.shape[1]) < counts[:, None]
            if (counts > boxes.shape[1]).any() or not np.isfinite(boxes[used]).all():
                raise ValueError("boxes: expected finite ones for all of counts")
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
    miscounted: list[int] | None = None  # the first scenes whose count (mode) is wrong, by index
    baseline_error: float | None = None  # root mean square of what the baseline is wrong by, nats


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
    bound, bound_se = mean_and_se(torch.cat(bounds)) if iwae_samples else (None, None)
    return Evaluation(
        elbo,
        elbo_se,
        float(sampled.log_likelihood.mean()),
        float(sampled.kl_pres.mean()),
        float(sampled.kl_where.mean()),
        float(sampled.kl_what.mean()),
        torch.bincount(mode, minlength=air.num_steps + 1).tolist(),
        bound=bound,
        bound_se=bound_se,
        **_baseline_error(sampled, air),
        **_against_truth(scenes, count_probs, sampled.counts, boxes),
    )


def _measure(air: AIR, images: Tensor, z_pres_prior_p: PresencePrior | None) -> tuple[Tensor, ...]:
    """q(n), boxes and the terms of a sampled ELBO for one batch, on the CPU."""
    found, terms = infer(air, images), sample_elbo(air, images, z_pres_prior_p)
    objects = found.objects.amax(-3) if air.channels > 1 else found.objects
    measured = (found.count_probs, tight_boxes(objects), *terms)
    return tuple(part.cpu() for part in measured)


def _baseline_error(sampled: ElboTerms, air: AIR) -> dict[str, Any]:
    """Over the steps that decided on an object: those taken, and the one that ended the scene."""
    if not air.use_baselines:
        return {}
    decisions = (sampled.counts + 1).clamp(max=air.num_steps).sum()
    return {"baseline_error": math.sqrt(sampled.baseline_squares.double().sum() / decisions)}


def _against_truth(
    scenes: HeldOut, count_probs: Tensor, sampled_counts: Tensor, boxes: Tensor
) -> dict[str, Any]:
    """The measures that need true counts, and those that need boxes or overlaps too."""
    if scenes.counts is None:
        return {}
    true, mode = scenes.counts.cpu().long(), count_probs.argmax(1)
    right = (mode == true).double()
    measures: dict[str, Any] = {
        "miscounted": (mode != true).nonzero()[:MAX_MISCOUNTED, 0].tolist(),
        "accuracy_mode": float(right.mean()),
        "accuracy_sample": float((sampled_counts == true).double().mean()),
        "confusion": confusion_matrix(true, mode, count_probs.size(1) - 1).tolist(),
    }
    if scenes.overlaps is not None:
        apart = (true > 1) & (scenes.overlaps.cpu() == 0)
        measures["accuracy_apart"] = float(right[apart].mean())
    if scenes.boxes is not None:
        reached = at_least_probs(count_probs)
        scores = score_boxes(boxes, reached, mode, scenes.boxes.cpu(), true)
        measures |= {f"box_{name}": score for name, score in scores._asdict().items()}
    return measures


def mean_and_se(values: Tensor) -> tuple[float, float]:
    """The mean of [N] values and its standard error, NaN for a single one."""
    values = values.double()
    se = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), se
