"""Measures of counts, against loops over scenes and cases computed by hand."""

import json
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from helpers import count_on, small_air
from torch import Tensor

from air import AIR
from air.evaluation import HeldOut, evaluate
from air.evaluation.counting import MAX_MISCOUNTED, least_distances, reliability, score_counts
from air.inference import infer


def boxes_at(*centres: tuple[float, float], slots: int = 3) -> Tensor:
    """Boxes of 4 x 6 pixels around these centres, then NaN: [slots, 4]."""
    boxes = torch.full((slots, 4), torch.nan)
    for i, (x, y) in enumerate(centres):
        boxes[i] = torch.tensor([x - 2, y - 3, x + 2, y + 3])
    return boxes


def accuracy_in(right: list[bool]) -> float | None:
    return sum(right) / len(right) if right else None


def test_the_least_distance_is_that_of_the_closest_two_centres() -> None:
    scenes = [
        boxes_at(),
        boxes_at((5, 5)),
        boxes_at((5, 5), (8, 9)),
        boxes_at((5, 5), (35, 5), (35, 17)),
        boxes_at((5, 5), (30, 5), (6, 5)),  # of which the third is not counted
    ]
    found = least_distances(torch.stack(scenes), torch.tensor([0, 1, 2, 3, 2])).tolist()
    assert found[2:] == [5.0, 12.0, 25.0]
    assert all(map(math.isnan, found[:2]))
    assert least_distances(torch.zeros(2, 0, 4), torch.tensor([0, 0])).isnan().all()


def test_accuracies_by_distance_and_overlap_equal_loops_over_scenes() -> None:
    rng = np.random.default_rng(0)
    true, inferred = rng.integers(0, 4, (2, 400))
    corners = rng.integers(0, 30, (400, 3, 2))
    boxes = np.concatenate((corners, corners + rng.integers(4, 12, (400, 3, 2))), 2)
    overlaps = rng.choice([0, 1, 3, 4, 5, 100], 400)
    near: list[list[bool]] = [[], [], []]
    shared: list[list[bool]] = [[], [], []]
    for n in range(400):
        if true[n] < 2:
            continue
        centres = [((x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in boxes[n, : true[n]]]
        least = min(math.dist(a, b) for a, b in combinations(centres, 2))
        near[0 if least < 11 else 1 if least <= 17 else 2].append(true[n] == inferred[n])
        shared[0 if overlaps[n] == 0 else 1 if overlaps[n] <= 4 else 2].append(
            true[n] == inferred[n]
        )
    found = score_counts(
        torch.eye(4)[inferred], torch.from_numpy(inferred),
        *map(torch.from_numpy, (true, boxes, overlaps)),
    )  # fmt: skip
    assert found.accuracy_by_distance == [pytest.approx(accuracy_in(band)) for band in near]
    assert found.accuracy_by_overlap == [pytest.approx(accuracy_in(band)) for band in shared]
    near_by = [abs(int(a) - int(b)) <= 1 for a, b in zip(true, inferred, strict=True)]
    assert found.accuracy_within_one == pytest.approx(sum(near_by) / 400)


def test_the_bounds_belong_to_the_band_in_the_middle() -> None:
    apart = [10.5, 11.0, 17.0, 17.5]
    boxes = torch.stack([boxes_at((5, 5), (5 + d, 5)) for d in apart])
    true, overlaps = torch.full((4,), 2), torch.tensor([0, 1, 4, 5])
    for right in range(4):
        inferred = torch.full((4,), 1)
        inferred[right] = 2
        found = score_counts(torch.eye(4)[inferred], inferred, true, boxes, overlaps)
        expected = [[1.0, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 1.0]][right]
        assert found.accuracy_by_distance == found.accuracy_by_overlap == expected


def test_bands_without_scenes_have_no_accuracy() -> None:
    boxes = torch.stack([boxes_at((5, 5)), boxes_at(), boxes_at((5, 5), (45, 5), (25, 5))])
    true, overlaps = torch.tensor([1, 0, 3]), torch.tensor([0, 0, 4])
    found = score_counts(torch.eye(4)[true], true, true, boxes, overlaps)
    assert found.accuracy_by_distance == [None, None, 1.0]
    assert found.accuracy_by_overlap == [None, 1.0, None]
    without = score_counts(torch.eye(4)[true], true, true)
    assert without.accuracy_by_distance is without.accuracy_by_overlap is None
    assert (without.accuracy_mode, without.calibration_error) == (1.0, 0.0)


def test_calibration_and_confusion_equal_loops() -> None:
    rng = np.random.default_rng(1)
    probs = rng.dirichlet([0.4] * 4, 500)
    true = rng.integers(0, 5, 500)  # of which 4 cannot be inferred
    confidence, right = probs.max(1), probs.argmax(1) == true
    expected, table = 0.0, []
    for m in range(10):
        inside = [
            i for i, c in enumerate(confidence) if m / 10 < c <= (m + 1) / 10 or (m == 0 and c == 0)
        ]
        if not inside:
            table.append([0.0, 0.0, 0.0])
            continue
        mean, accuracy = np.mean(confidence[inside]), np.mean(right[inside])
        table.append([len(inside), mean, accuracy])
        expected += len(inside) / 500 * abs(accuracy - mean)
    found = score_counts(torch.from_numpy(probs), torch.zeros(500), torch.from_numpy(true))
    assert found.calibration_error == pytest.approx(expected)
    np.testing.assert_allclose(found.reliability, table)
    confusion = np.zeros((5, 4), int)
    np.add.at(confusion, (true, probs.argmax(1)), 1)
    assert found.confusion == confusion.tolist()
    assert json.loads(json.dumps(found.reliability, allow_nan=False)) == found.reliability


def test_confidences_of_zero_and_one_are_in_the_first_and_the_last_bin() -> None:
    confidence = torch.tensor([0.0, 1.0, 1.0, 0.1, 0.95], dtype=torch.float64)
    right = torch.tensor([False, True, False, True, True])
    bins = reliability(confidence, right)
    assert bins[0].tolist() == pytest.approx([2, 0.05, 0.5])
    assert bins[9].tolist() == pytest.approx([3, 2.95 / 3, 2 / 3])
    assert not bins[1:9].any()


def test_an_evaluation_has_the_measures_that_its_scenes_allow(images: Tensor) -> None:
    air = small_air()
    count_on(air, 0, 9.0)  # it infers three objects in every scene
    true = torch.tensor([0, 1, 2, 2, 3, 3, 3, 1, 3, 2])
    overlaps = torch.tensor([0, 0, 0, 3, 0, 0, 30, 0, 0, 1])
    boxes = torch.stack([boxes_at((5, 5), (5 + n, 5), (30, 5)) for n in range(10)])
    found = evaluate(air, HeldOut(images, true, boxes, overlaps), batch_size=4)
    counts = found.counts
    assert found.boxes is not None
    assert counts.accuracy_by_overlap == [pytest.approx(3 / 4), 0.0, 1.0]
    assert counts.accuracy_by_distance == [pytest.approx(4 / 7), None, None]
    assert counts.miscounted == [0, 1, 2, 3, 7, 9]
    confidence = infer(air, images).count_probs.amax(1).double().mean().item()
    assert counts.calibration_error == pytest.approx(confidence - 0.4)
    assert counts.reliability[9] == pytest.approx([10, confidence, 0.4])
    without_places = evaluate(air, HeldOut(images, true))
    assert without_places.boxes is None
    unknown = {"accuracy_by_distance": None, "accuracy_by_overlap": None}
    assert without_places.counts == counts._replace(**unknown)
    blind = evaluate(air, HeldOut(images, None, boxes, overlaps))
    assert blind.counts is blind.boxes is None
    many = evaluate(air, HeldOut(images.repeat(5, 1, 1), torch.zeros(50)))
    assert many.counts.miscounted == list(range(MAX_MISCOUNTED))


def test_with_refinement_q_is_that_of_the_refined_latents(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    air, true = small_air(), torch.full((10,), 2)
    refined = torch.tensor([0.0, 0.0, 1.0, 0.0]).repeat(10, 1)

    def infer_two(air: AIR, images: Tensor, refine: bool) -> object:
        found = infer(air, images)
        return found._replace(count_probs=refined) if refine else found

    monkeypatch.setattr("air.evaluation.metrics.infer", infer_two)
    guide, best = (evaluate(air, HeldOut(images, true), refine=r).counts for r in (False, True))
    assert (best.calibration_error, best.reliability[9]) == (0.0, [10.0, 1.0, 1.0])
    assert guide.reliability != best.reliability
