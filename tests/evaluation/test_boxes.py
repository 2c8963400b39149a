"""Box scores against cases computed by hand."""

import math

import pytest
import torch
from torch import Tensor

from air.evaluation.boxes import pairwise_iou, score_boxes, tight_boxes

NAN = math.nan
A, B, C = [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0], [40.0, 0.0, 50.0, 10.0]
HALF_A = [0.0, 0.0, 10.0, 5.0]  # IoU 0.5 with A
FAR = [60.0, 60.0, 70.0, 70.0]


def tensors(*values: object) -> list[Tensor]:
    return [torch.tensor(value) for value in values]


def test_iou_equals_a_computation_by_hand() -> None:
    found = pairwise_iou(torch.tensor([A, HALF_A, B]), torch.tensor([A, [5.0, 0.0, 15.0, 10.0]]))
    torch.testing.assert_close(found, torch.tensor([[1.0, 1 / 3], [0.5, 0.2], [0.0, 0.0]]))
    assert pairwise_iou(torch.tensor([[5.0, 5.0, 5.0, 5.0]]), torch.tensor([A])).item() == 0


def test_tight_boxes_surround_the_bright_pixels() -> None:
    objects = torch.zeros(2, 2, 9, 9)
    objects[0, 0, 2:5, 3:8] = 0.5
    objects[0, 0, 8, 8] = 0.04  # too dark beside the rest of the object
    objects[0, 1, 0, 0] = 1e-3
    boxes = tight_boxes(objects)
    assert boxes[0].tolist() == [[3, 2, 8, 5], [0, 0, 1, 1]]
    assert (boxes[1, :, :2] == boxes[1, :, 2:]).all(), "black objects have empty boxes"


def test_perfect_boxes_score_one_in_any_order_and_nothing_scores_nan() -> None:
    scores = score_boxes(*tensors([[B, A]], [[0.9, 0.8]], [2], [[A, B]], [2]))
    assert scores == (1.0, 1.0, 1.0)
    scores = score_boxes(*tensors([[A]], [[0.1]], [0], [[[NAN] * 4]], [0]))
    assert all(math.isnan(score) for score in scores)


def test_a_missed_an_extra_and_a_poor_box_lower_the_scores() -> None:
    boxes = [[A, FAR], [B, FAR], [HALF_A, FAR]]
    probs = [[0.9, 0.1], [0.8, 0.7], [0.6, 0.2]]
    true = [[A, C], [B, [NAN] * 4], [A, [NAN] * 4]]
    scores = score_boxes(*tensors(boxes, probs, [1, 2, 1], true, [2, 1, 1]))
    assert scores.iou == pytest.approx((1 + 1 + 0.5) / 3)
    assert scores.f1 == pytest.approx(2 * 3 / (4 + 4))
    # by probability: hit 0.9, hit 0.8, miss 0.7, hit 0.6, then misses; four objects
    assert scores.ap == pytest.approx((1 + 1 + 3 / 4) / 4)


def test_an_object_counts_as_found_once() -> None:
    scores = score_boxes(*tensors([[A, A]], [[0.9, 0.8]], [2], [[A]], [1]))
    assert scores.f1 == pytest.approx(2 / 3)
    assert scores.ap == pytest.approx(1.0)  # the box that finds the object ranks first


def test_boxes_are_matched_by_the_largest_sum_of_ious() -> None:
    first, second = [0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 8.0]
    truth = [[0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 10.0, 20.0]]
    scores = score_boxes(*tensors([[second, first]], [[0.9, 0.8]], [2], [truth], [2]))
    assert scores.iou == pytest.approx((8 / 9 + 10 / 20) / 2)
