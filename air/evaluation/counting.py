"""How well objects are counted: accuracy, also of close objects, confusion and calibration.

A count is inferred by the mode of q(n); its confidence is the probability of the mode. Counts are
calibrated if, of all scenes with a confidence of 0.9, nine in ten are counted right (Naeini et al.
2015; Guo et al. 2017, arXiv:1706.04599).
"""

from typing import NamedTuple

import torch
from torch import Tensor

MAX_MISCOUNTED = 16  # wrongly counted scenes that an evaluation lists
# The bounds of the band in the middle, both included. DISTANCES: pixels between two centres.
# SHARED_PIXELS: pixels that belong to several objects. In the default scenes, where digits are
# some 16 pixels long, 61 % of the pairs below 11, 27 % of the pairs from 11 to 17 and 1 % of the
# pairs above 17 share a pixel.
DISTANCES = 11, 17
DISTANCE_BANDS = (
    f"below {DISTANCES[0]} px",
    "{} to {} px".format(*DISTANCES),
    f"above {DISTANCES[1]} px",
)
SHARED_PIXELS = 1, 4
NUM_BINS = 10  # of confidence, equally wide


class CountScores(NamedTuple):
    """Scores of inferred counts; an accuracy is the fraction of scenes whose count is right.

    "Several" objects are two or more. The lists by distance and by overlap have one accuracy for
    each band of `DISTANCES` and `SHARED_PIXELS`, None for a band without scenes.
    """

    accuracy_mode: float  # the inferred count is the mode of q(n), as in all but accuracy_sample
    accuracy_sample: float  # the inferred count is one sample of q(n)
    accuracy_within_one: float  # the inferred count is off by one at most
    accuracy_by_distance: list[float | None] | None  # several objects, by the closest two centres
    accuracy_by_overlap: list[float | None] | None  # several objects, by the pixels they share
    calibration_error: float  # mean of |accuracy - confidence| over bins, weighted by their scenes
    reliability: list[list[float]]  # for each bin: scenes, mean confidence, accuracy; or zeros
    confusion: list[list[int]]  # scenes by true count (rows) and inferred count
    miscounted: list[int]  # indices of the first scenes whose count is wrong


def score_counts(
    count_probs: Tensor,
    sampled_counts: Tensor,
    true_counts: Tensor,
    boxes: Tensor | None = None,
    overlaps: Tensor | None = None,
) -> CountScores:
    """Scores q(n) against true counts, all on the CPU.

    Args:
        count_probs: q(n) for n = 0..T, [N, T + 1].
        sampled_counts: One sample of q(n) for each scene, [N].
        true_counts: Whole numbers, [N].
        boxes: True boxes (x0, y0, x1, y1) in pixels, [N, M, 4]; those beyond the true count are
            ignored.
        overlaps: Number of pixels that the objects of each scene share, [N].
    """
    mode = count_probs.argmax(1)
    right = mode == true_counts
    by_distance = by_overlap = None
    if boxes is not None:
        by_distance = _accuracy_by_band(right, least_distances(boxes, true_counts), DISTANCES)
    if overlaps is not None:
        several = true_counts > 1
        by_overlap = _accuracy_by_band(right[several], overlaps[several], SHARED_PIXELS)
    bins = reliability(count_probs.amax(1), right)
    scenes, confidence, accuracy = bins.unbind(1)
    confusion = torch.zeros(int(true_counts.max()) + 1, count_probs.size(1), dtype=torch.long)
    confusion.index_put_((true_counts, mode), torch.tensor(1), accumulate=True)
    return CountScores(
        float(right.double().mean()),
        float((sampled_counts == true_counts).double().mean()),
        float(((mode - true_counts).abs() <= 1).double().mean()),
        by_distance,
        by_overlap,
        float((scenes * (accuracy - confidence).abs()).sum() / scenes.sum()),
        bins.tolist(),
        confusion.tolist(),
        (~right).nonzero()[:MAX_MISCOUNTED, 0].tolist(),
    )


def least_distances(boxes: Tensor, counts: Tensor) -> Tensor:
    """Pixels between the closest two centres of boxes in each scene: [N, M, 4], [N] to [N].

    NaN for a scene of fewer than two boxes; boxes beyond the count are ignored.
    """
    centres = (boxes[..., :2].double() + boxes[..., 2:].double()) / 2
    least = torch.full((len(boxes),), torch.nan, dtype=torch.float64)
    for scene in (counts > 1).nonzero()[:, 0].tolist():  # all at once might not fit in memory
        least[scene] = torch.pdist(centres[scene, : int(counts[scene])]).min()
    return least


def _accuracy_by_band(
    right: Tensor, values: Tensor, bounds: tuple[float, float]
) -> list[float | None]:
    """Accuracy of the scenes whose value is below, within and above the bounds (inclusive)."""
    low, high = bounds
    bands = values < low, (low <= values) & (values <= high), values > high
    return [float(right[band].double().mean()) if band.any() else None for band in bands]


def reliability(confidence: Tensor, right: Tensor) -> Tensor:
    """For each bin of confidence: number of scenes, mean confidence, accuracy; zeros if empty.

    Bin m of 1..K holds the confidences above (m - 1) / K and up to m / K, the first bin also 0.

    Args:
        confidence: Greatest probability of q(n), [N], in [0, 1].
        right: Whether the most probable count is right, [N].

    Returns:
        Float64 [NUM_BINS, 3].
    """
    bins = torch.bucketize(confidence.double(), torch.arange(1, NUM_BINS).double() / NUM_BINS)
    scenes, *sums = (
        torch.bincount(bins, values.double(), minlength=NUM_BINS)
        for values in (torch.ones_like(confidence), confidence, right)
    )
    return torch.stack([scenes, *(each / scenes.clamp(min=1) for each in sums)], 1)
