"""Scores of inferred boxes against true boxes: matched IoU, F1 and average precision.

Boxes are (x0, y0, x1, y1) in pixels, x to the right and y downwards, x1 and y1 exclusive.
"""

from typing import NamedTuple

import torch
from torch import Tensor

IOU_THRESHOLD = 0.5  # least IoU at which an inferred box finds a true box
VISIBLE_FRACTION = 0.1  # of the greatest change of a pixel, below which a pixel is invisible


def tight_boxes(changes: Tensor) -> Tensor:
    """The box around the visible pixels of each object, [..., H, H] to [..., 4].

    A window has a margin around its object, so these boxes and not the windows are compared with
    the true boxes. An object that changes no pixel has an empty box.

    Args:
        changes: The change of each pixel by an object, [..., H, H]; on black, its intensity.
    """
    peak = changes.amax((-2, -1), keepdim=True)
    visible = (changes > VISIBLE_FRACTION * peak) & (peak > 0)
    corners = []
    for used in (visible.any(-2), visible.any(-1)):  # columns, then rows, [..., H]
        first = used.int().argmax(-1)
        end = used.size(-1) - used.flip(-1).int().argmax(-1)
        corners.append((first * used.any(-1), end * used.any(-1)))
    (x0, x1), (y0, y1) = corners
    return torch.stack((x0, y0, x1, y1), -1).to(changes.dtype)


def pairwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of every box with every other: [P, 4], [M, 4] to [P, M]."""
    low = torch.maximum(boxes[:, None, :2], others[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = [(b[:, 2:] - b[:, :2]).clamp(min=0).prod(-1) for b in (boxes, others)]
    union = areas[0][:, None] + areas[1][None] - shared
    return shared / union.clamp(min=1e-9)


class BoxScores(NamedTuple):
    """Scores over a set of scenes, in [0, 1]; NaN if there is nothing to score.

    In each scene, inferred and true boxes are matched so that the sum of IoUs is largest.
    """

    iou: float  # mean IoU of matched boxes
    f1: float  # F1 of detection: a match with an IoU of at least 0.5 is a true positive
    ap: float  # average precision at IoU 0.5: area under the precision-recall curve


def score_boxes(
    boxes: Tensor, probs: Tensor, counts: Tensor, true_boxes: Tensor, true_counts: Tensor
) -> BoxScores:
    """Scores inferred boxes against true ones.

    Args:
        boxes: Inferred boxes of all steps, [N, T, 4].
        probs: q(n >= t), the probability of each inferred box, [N, T].
        counts: Inferred counts, [N]. IoU and F1 use the first `counts` boxes, AP uses all boxes.
        true_boxes: [N, M, 4]; boxes beyond the true count are ignored.
        true_counts: [N].
    """
    from scipy.optimize import linear_sum_assignment  # takes a second to import

    matched: list[float] = []
    ranked: list[tuple[float, bool]] = []  # probability of a box; whether it finds an object
    for scene in range(len(boxes)):
        truth = true_boxes[scene, : int(true_counts[scene])]
        ious = pairwise_iou(boxes[scene], truth)
        used = ious[: int(counts[scene])].numpy()
        matched += used[linear_sum_assignment(used, maximize=True)].tolist()
        ranked += _rank(ious, probs[scene])
    total, inferred = int(true_counts.sum()), int(counts.sum())
    found = sum(iou >= IOU_THRESHOLD for iou in matched)
    return BoxScores(
        sum(matched) / len(matched) if matched else float("nan"),
        2 * found / (total + inferred) if total + inferred else float("nan"),
        _average_precision(ranked, total),
    )


def _rank(ious: Tensor, probs: Tensor) -> list[tuple[float, bool]]:
    """Matches each box of a scene, the most probable first, to the best object still unmatched."""
    free, hits = ious.clone(), []
    for box in probs.argsort(descending=True, stable=True).tolist():
        best = int(free[box].argmax()) if free.size(1) else 0
        hit = bool(free.size(1)) and float(free[box, best]) >= IOU_THRESHOLD
        if hit:
            free[:, best] = -1
        hits.append((float(probs[box]), hit))
    return hits


def _average_precision(ranked: list[tuple[float, bool]], total: int) -> float:
    """Area under the precision envelope as a function of recall."""
    if not total:
        return float("nan")
    hits = torch.tensor([hit for _, hit in sorted(ranked, key=lambda r: -r[0])]).double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    envelope = precision.flip(0).cummax(0).values.flip(0)
    return float((envelope * hits).sum() / total)
