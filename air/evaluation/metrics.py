"""How good a model is on held-out scenes: ELBO, counts, boxes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from air.air import AIR
from air.evaluation.boxes import BoxScores, score_boxes, tight_boxes
from air.evaluation.counting import CountScores, score_counts
from air.evaluation.elbo import ElboTerms, importance_weighted_bound, sample_elbo
from air.evaluation.solids import SolidsScores, score_solids
from air.inference import forked_rng, infer
from air.priors import PresencePrior, at_least_probs
from air.solids.model import Solids, SolidsAIR
from air.solids.world import KINDS
from air.support.checks import check_whole
from air.support.handlers import closed
from air.support.images import to_tensor


class HeldOut(NamedTuple):
    """Scenes to evaluate on, with the true counts, boxes and overlaps where they are known.

    `evaluate` and `Trainer` also take NumPy arrays in the place of tensors.
    """

    images: Tensor  # [N, (C,) H, H], uint8 in [0, 255] or floats in [0, 1], on any device
    counts: Tensor | None = None  # true counts, [N]
    boxes: Tensor | None = None  # tight boxes of the objects in pixels, [N, M, 4]
    overlaps: Tensor | None = None  # number of pixels that objects share, [N]
    labels: Tensor | None = None  # kinds of the objects, [N, M]
    poses: Tensor | None = None  # poses of solids, [N, M, 4]; see `air.data.scenes.Scenes`

    def first(self, num_scenes: int) -> "HeldOut":
        """The first `num_scenes` scenes, or all if there are no more.

        Raises:
            ValueError: If `num_scenes` is negative.
        """
        check_whole("num_scenes", num_scenes, 0)
        return HeldOut._make(part if part is None else part[:num_scenes] for part in self)


class Evaluation(NamedTuple):
    """Measures of one model on a set of scenes, in nats per image."""

    elbo: float
    elbo_se: float  # standard error over images
    log_likelihood: float  # elbo = log_likelihood - all the kl
    kl_pres: float
    kl_where: float
    kl_what: float
    kl_background: float | None  # None without a model of the background
    count_histogram: list[int]  # images by inferred count (mode of q(n)), 0..T
    counts: CountScores | None = None  # None if the true counts are unknown
    boxes: BoxScores | None = None  # of the boxes around the painted objects; None as for counts
    baseline_error: float | None = None  # root mean square error of the baseline, if there is one
    bound: float | None = None  # importance-weighted bound of log p(x), if it was asked for
    bound_se: float | None = None
    solids: SolidsScores | None = None  # of a model with a renderer; None as for counts


def evaluate(
    air: AIR,
    scenes: HeldOut,
    z_pres_prior_p: PresencePrior | None = None,
    batch_size: int = 500,
    seed: int = 0,
    iwae_samples: int = 0,
    iwae_scenes: int = 2000,
    refine: bool = False,
) -> Evaluation:
    """Evaluates a model on held-out scenes.

    Args:
        air: The model.
        scenes: The scenes to evaluate on.
        z_pres_prior_p: The prior of the ELBO, as for `AIR.model`.
        batch_size: Number of images in a batch; the last batch may be smaller.
        seed: Seed of the samples; the global generators are restored afterwards.
        iwae_samples: Samples in the importance-weighted bound; 0 for no bound.
        iwae_scenes: The bound is taken over the first `iwae_scenes` scenes.
        refine: Whether to take q(n), counts by mode and boxes from refined latents (see `infer`).
            Everything else comes from the guide.

    Raises:
        ValueError: If there are no scenes, if `air` cannot take the images, if the numbers of
            images, counts, boxes and overlaps differ, if a counted object has no finite box, or if
            another argument is out of range.
    """
    check_whole("batch_size", batch_size, 1)
    check_whole("iwae_samples", iwae_samples, 0)
    check_whole("iwae_scenes", iwae_scenes, 1)
    scenes = check_scenes(air, scenes)
    parts, bound, bound_se = [], None, None
    with closed(air), forked_rng(seed, air.h_init.device):
        for images in torch.split(scenes.images, batch_size):
            inference = infer(air, images, refine)
            terms = sample_elbo(air, images, z_pres_prior_p)
            latents = inference.z_where, inference.z_what
            measured = inference.count_probs, tight_boxes(inference.changes), *latents, *terms
            parts.append([part.cpu() for part in measured])
        if iwae_samples:
            bounds = [
                importance_weighted_bound(air, images, iwae_samples, z_pres_prior_p).cpu()
                for images in torch.split(scenes.images[:iwae_scenes], batch_size)
            ]
            bound, bound_se = mean_and_se(torch.cat(bounds))
    count_probs, boxes, where, what, *joined = map(torch.cat, zip(*parts, strict=True))
    sampled = ElboTerms(*joined)
    elbo, elbo_se = mean_and_se(sampled.elbo)
    baseline_error = None
    if air.use_baselines:  # over the sampled z_pres up to the first zero
        decisions = (sampled.counts + 1).clamp(max=air.num_steps).sum()
        baseline_error = math.sqrt(sampled.baseline_squares.double().sum() / decisions)
    return Evaluation(
        elbo,
        elbo_se,
        float(sampled.log_likelihood.mean()),
        float(sampled.kl_pres.mean()),
        float(sampled.kl_where.mean()),
        float(sampled.kl_what.mean()),
        float(sampled.kl_background.mean()) if air.background else None,
        torch.bincount(count_probs.argmax(1), minlength=air.num_steps + 1).tolist(),
        *_compare_with_truth(scenes, count_probs, sampled.counts, boxes),
        baseline_error,
        bound,
        bound_se,
        _score_solids(air, scenes, where, what, count_probs.argmax(1)),
    )


def check_scenes(air: AIR, scenes: HeldOut) -> HeldOut:
    """Converts scenes to tensors and checks that `air` can take their images.

    Raises:
        ValueError: If it cannot, if there are no scenes, if the numbers of images, counts, boxes
            and overlaps differ, or if a counted object has no finite box.
    """
    scenes = HeldOut._make(part if part is None else to_tensor(part) for part in scenes)
    if not scenes.images.dim() or not len(scenes.images):
        raise ValueError("there are no scenes to evaluate on")
    for name, part in scenes._asdict().items():
        if part is not None and len(part) != len(scenes.images):
            raise ValueError(
                f"{name}: expected one for each of the {len(scenes.images)} images, got {len(part)}"
            )
    if scenes.counts is not None and scenes.boxes is not None:
        counts, boxes = scenes.counts.cpu(), scenes.boxes.cpu()
        used = torch.arange(boxes.shape[1]) < counts[:, None]
        if (counts > boxes.shape[1]).any() or not boxes[used].isfinite().all():
            raise ValueError("boxes: expected a finite box for every counted object")
    air.check_images(scenes.images)
    return scenes


def _compare_with_truth(
    scenes: HeldOut, count_probs: Tensor, sampled_counts: Tensor, boxes: Tensor
) -> tuple[CountScores | None, BoxScores | None]:
    """Scores counts if the true counts are known, and boxes if the true boxes are known too."""
    if scenes.counts is None:
        return None, None
    true = scenes.counts.cpu().long()
    true_boxes, overlaps = (None if p is None else p.cpu() for p in (scenes.boxes, scenes.overlaps))
    counting = score_counts(count_probs, sampled_counts, true, true_boxes, overlaps)
    if true_boxes is None:
        return counting, None
    mode, reached = count_probs.argmax(1), at_least_probs(count_probs)
    return counting, score_boxes(boxes, reached, mode, true_boxes, true)


def _score_solids(
    air: AIR, scenes: HeldOut, where: Tensor, what: Tensor, counts: Tensor
) -> SolidsScores | None:
    """Scores solids, if the model infers them and the true ones are known."""
    known = [p.cpu() for p in (scenes.labels, scenes.poses, scenes.counts) if p is not None]
    if not isinstance(air, SolidsAIR) or len(known) < 3:
        return None
    labels, poses, true = known
    used = torch.arange(labels.shape[1]) < true[:, None]
    kinds = labels[used]
    if ((kinds < 0) | (kinds >= len(KINDS))).any() or not poses[used].isfinite().all():
        return None  # they are labels of something else
    device = air.h_init.device
    solids = air.solids(where.to(device), what.to(device))
    return score_solids(Solids._make(part.cpu() for part in solids), counts, labels, poses, true)


def mean_and_se(values: Tensor) -> tuple[float, float]:
    """The mean of values, [N], and its standard error, which is NaN for a single value."""
    values = values.double()
    se = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), se
