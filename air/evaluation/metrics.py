"""How good a model is on held-out scenes: ELBO, counts, boxes."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from air.air import AIR
from air.arguments import check_whole
from air.evaluation.boxes import score_boxes, tight_boxes
from air.evaluation.counting import score_counts
from air.evaluation.elbo import ElboTerms, importance_weighted_bound, sample_elbo
from air.images import to_tensor
from air.inference import forked_rng, infer
from air.priors import PresencePrior, at_least_probs

MAX_OBJECTS = 1000  # in one scene; a larger count is an error in the data


class HeldOut(NamedTuple):
    """Scenes to evaluate on, with the true counts, boxes and overlaps where they are known."""

    images: Tensor  # [N, (C,) H, H], uint8 in [0, 255] or floats in [0, 1], on any device
    counts: Tensor | None = None  # true counts, [N]
    boxes: Tensor | None = None  # tight boxes of the objects in pixels, [N, M, 4]
    overlaps: Tensor | None = None  # number of pixels that objects share, [N]

    @classmethod
    def from_numpy(
        cls,
        images: NDArray[Any],
        counts: NDArray[Any] | None = None,
        boxes: NDArray[Any] | None = None,
        overlaps: NDArray[Any] | None = None,
    ) -> "HeldOut":
        """Wraps NumPy arrays without copying them.

        Raises:
            ValueError: If a count is above `MAX_OBJECTS`, or an object has no finite box.
        """
        if counts is not None and (counts > MAX_OBJECTS).any():
            raise ValueError(f"counts: expected at most {MAX_OBJECTS}, got {counts.max()}")
        if counts is not None and boxes is not None:
            used = np.arange(boxes.shape[1]) < counts[:, None]
            if (counts > boxes.shape[1]).any() or not np.isfinite(boxes[used]).all():
                raise ValueError("boxes: expected a finite box for every counted object")
        arrays = (images, counts, boxes, overlaps)
        return cls._make(array if array is None else torch.from_numpy(array) for array in arrays)

    def first(self, num_scenes: int) -> "HeldOut":
        """The first `num_scenes` scenes, or all if there are no more.

        Raises:
            ValueError: If `num_scenes` is negative.
        """
        check_whole("num_scenes", num_scenes, 0)
        return HeldOut._make(part if part is None else part[:num_scenes] for part in self)


class Evaluation(NamedTuple):
    """Measures of one model on a set of scenes; None if the scenes lack what a measure needs.

    Nats are per image; an accuracy is the fraction of scenes whose count is right. "By mode" means
    that the inferred count is the mode of q(n). The measures of counts are those of
    `counting.CountScores`.
    """

    elbo: float
    elbo_se: float  # standard error over images
    log_likelihood: float  # elbo = log_likelihood - all the kl
    kl_pres: float
    kl_where: float
    kl_what: float
    count_histogram: list[int]  # images by inferred count (mode), 0..T
    bound: float | None = None  # importance-weighted bound of log p(x)
    bound_se: float | None = None
    accuracy_mode: float | None = None
    accuracy_sample: float | None = None  # the inferred count is one sample of q(n)
    accuracy_within_one: float | None = None  # by mode, off by one at most
    accuracy_apart: float | None = None  # by mode, over scenes of several objects without overlap
    # By mode, over scenes of several objects: in bands of the distance of the closest two centres,
    # and in bands of the number of pixels that objects share.
    accuracy_by_distance: list[float | None] | None = None
    accuracy_by_overlap: list[float | None] | None = None
    calibration_error: float | None = None  # expected calibration error of q(n), in [0, 1]
    reliability: list[list[float]] | None = None  # scenes, mean confidence, accuracy of each bin
    confusion: list[list[int]] | None = None  # images by true count (rows) and inferred (mode)
    box_iou: float | None = None  # of the boxes around the painted objects; see `boxes.BoxScores`
    box_f1: float | None = None
    box_ap: float | None = None
    kl_background: float | None = None
    miscounted: list[int] | None = None  # indices of the first scenes whose count (mode) is wrong
    baseline_error: float | None = None  # root mean square error of the baseline, in nats


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
        refine: Whether q(n), counts by mode and boxes are of refined latents (see `infer`). All
            else is of the guide.

    Raises:
        ValueError: If there are no scenes, or scenes or numbers that cannot be used.
    """
    check_whole("batch_size", batch_size, 1)
    check_whole("iwae_samples", iwae_samples, 0)
    check_whole("iwae_scenes", iwae_scenes, 1)
    scenes = check_scenes(air, scenes)
    device, batches = air.h_init.device, torch.split(scenes.images, batch_size)
    with forked_rng(seed, device):
        parts = [_measure(air, batch.to(device), z_pres_prior_p, refine) for batch in batches]
        bound = _bound(air, scenes.images[:iwae_scenes], z_pres_prior_p, batch_size, iwae_samples)
    count_probs, boxes, *terms = map(torch.cat, zip(*parts, strict=True))
    sampled = ElboTerms(*terms)
    elbo, elbo_se = mean_and_se(sampled.elbo)
    return Evaluation(
        elbo,
        elbo_se,
        float(sampled.log_likelihood.mean()),
        float(sampled.kl_pres.mean()),
        float(sampled.kl_where.mean()),
        float(sampled.kl_what.mean()),
        torch.bincount(count_probs.argmax(1), minlength=air.num_steps + 1).tolist(),
        kl_background=float(sampled.kl_background.mean()) if air.background else None,
        **bound,
        **_baseline_error(sampled, air),
        **_compare_with_truth(scenes, count_probs, sampled.counts, boxes),
    )


def check_scenes(air: AIR, scenes: HeldOut) -> HeldOut:
    """The scenes as tensors, whose images `air` can take.

    Raises:
        ValueError: If it cannot, if there are no scenes, or not as many counts, boxes or overlaps.
    """
    scenes = HeldOut._make(part if part is None else to_tensor(part) for part in scenes)
    if not scenes.images.dim() or not len(scenes.images):
        raise ValueError("there are no scenes to evaluate on")
    for name, part in scenes._asdict().items():
        if part is not None and len(part) != len(scenes.images):
            raise ValueError(
                f"{name}: expected one for each of the {len(scenes.images)} images, got {len(part)}"
            )
    air.check_images(scenes.images)
    return scenes


def _measure(
    air: AIR, images: Tensor, z_pres_prior_p: PresencePrior | None, refine: bool
) -> tuple[Tensor, ...]:
    """q(n), boxes and the terms of a sampled ELBO for one batch, on the CPU."""
    inference = infer(air, images, refine)
    terms = sample_elbo(air, images, z_pres_prior_p)
    boxes = tight_boxes(inference.changes)
    return tuple(part.cpu() for part in (inference.count_probs, boxes, *terms))


def _bound(
    air: AIR, images: Tensor, prior: PresencePrior | None, batch_size: int, samples: int
) -> dict[str, Any]:
    """The mean of the importance-weighted bound and its standard error, if there are samples."""
    if not samples:
        return {}
    batches = torch.split(images, batch_size)
    bounds = [importance_weighted_bound(air, batch, samples, prior).cpu() for batch in batches]
    return dict(zip(("bound", "bound_se"), mean_and_se(torch.cat(bounds)), strict=True))


def _baseline_error(sampled: ElboTerms, air: AIR) -> dict[str, Any]:
    """The baseline's root mean square error over the sampled z_pres up to the first zero."""
    if not air.use_baselines:
        return {}
    decisions = (sampled.counts + 1).clamp(max=air.num_steps).sum()
    return {"baseline_error": math.sqrt(sampled.baseline_squares.double().sum() / decisions)}


def _compare_with_truth(
    scenes: HeldOut, count_probs: Tensor, sampled_counts: Tensor, boxes: Tensor
) -> dict[str, Any]:
    """The measures that need true counts, and the measures that need true boxes or overlaps too."""
    if scenes.counts is None:
        return {}
    true = scenes.counts.cpu().long()
    true_boxes, overlaps = (None if p is None else p.cpu() for p in (scenes.boxes, scenes.overlaps))
    counting = score_counts(count_probs, sampled_counts, true, true_boxes, overlaps)
    measures: dict[str, Any] = counting._asdict()
    if true_boxes is not None:
        reached, mode = at_least_probs(count_probs), count_probs.argmax(1)
        scores = score_boxes(boxes, reached, mode, true_boxes, true)
        measures |= {f"box_{name}": score for name, score in scores._asdict().items()}
    return measures


def mean_and_se(values: Tensor) -> tuple[float, float]:
    """The mean of values, [N], and its standard error, which is NaN for a single value."""
    values = values.double()
    se = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), se
