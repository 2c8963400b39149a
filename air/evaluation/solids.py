"""How well solids are inferred: their kind, their place on the ground, and their angle."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from air.solids.model import TURNED, Solids
from air.solids.world import KINDS, SYMMETRY


class SolidsScores(NamedTuple):
    """Scores over a set of scenes; NaN if there is nothing to score.

    In each scene, inferred and true solids are matched so that the sum of distances is least. A
    median is over the matched solids; that of the angle, over those of the right kind that can be
    turned.
    """

    kind_accuracy: float  # share of the matched solids whose most probable kind is theirs
    place_error: float  # median distance, in units of the ground; the square has a side of 1.8
    size_error: float  # median difference, in typical sizes
    angle_error: float  # median, in degrees, modulo the solid's symmetry

    def __str__(self) -> str:
        """The scores as text."""
        if math.isnan(self.kind_accuracy):
            return "no solids to compare"
        return (
            f"kind {self.kind_accuracy:.1%} right; median errors: place {self.place_error:.3f}, "
            f"size {self.size_error:.3f}, angle {self.angle_error:.1f} degrees"
        )


def score_solids(
    solids: Solids, counts: Tensor, labels: Tensor, poses: Tensor, true_counts: Tensor
) -> SolidsScores:
    """Scores inferred solids against the true ones.

    Args:
        solids: Of all steps, [N, T, ...].
        counts: Inferred counts, [N]; only the first `counts` solids are scored.
        labels: Indices of true kinds, [N, M].
        poses: True (size, x, y, angle), [N, M, 4].
        true_counts: [N].
    """
    from scipy.optimize import linear_sum_assignment  # takes a second to import

    poses = poses.to(solids.place)
    right, places, sizes, angles = [], [], [], []
    kinds = solids.log_probs.argmax(-1)
    for n, (found, true) in enumerate(zip(counts.tolist(), true_counts.tolist(), strict=True)):
        distances = torch.cdist(solids.place[n, :found], poses[n, :true, 1:3])
        for i, j in zip(*linear_sum_assignment(distances.numpy()), strict=True):
            size, _, _, angle = poses[n, j].tolist()
            kind = KINDS[int(labels[n, j])]
            right.append(KINDS[int(kinds[n, i])] == kind)
            places.append(float(distances[i, j]))
            sizes.append(abs(float(solids.size[n, i]) - size))
            if right[-1] and (symmetry := SYMMETRY[kind]):
                turn = 360 / symmetry
                inferred = float(solids.angles[n, i, TURNED.index(kind)])
                difference = torch.rad2deg(torch.tensor(inferred - angle)).remainder(turn)
                angles.append(min(float(difference), turn - float(difference)))
    accuracy = float(torch.tensor(right).double().mean())  # NaN for none
    medians = (
        float(torch.tensor(errors).quantile(0.5)) if errors else float("nan")
        for errors in (places, sizes, angles)
    )
    return SolidsScores(accuracy, *medians)
