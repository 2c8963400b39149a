"""The events of training: lines for metrics.jsonl, and text to read."""

import math
from dataclasses import replace
from typing import Any

import pytest
from helpers import EVALUATION, PROGRESS

from air.evaluation import Evaluation
from air.evaluation.boxes import BoxScores
from air.training.events import Evaluated

COUNTS = EVALUATION.counts


def text(result: Evaluation) -> list[str]:
    return str(Evaluated(7, 3, result, 480.0, None)).splitlines()


def test_progress_as_a_record_and_as_text() -> None:
    assert {"step", "elbo", "skipped", "grad_norm", "seconds"} <= set(PROGRESS.record())
    assert str(PROGRESS) == "ELBO 601.2 nats, 1280 images/s"
    assert "3 steps skipped" in str(replace(PROGRESS, skipped=3))


def test_one_scene_has_no_standard_error() -> None:
    assert "±" in text(EVALUATION)[0]
    one = text(EVALUATION._replace(elbo_se=math.nan))[0]
    assert "±" not in one
    assert f"ELBO {EVALUATION.elbo:.1f} nats" in one


def test_a_record_has_every_measure_whether_the_scenes_allow_it_or_not() -> None:
    boxes = BoxScores(0.75, 0.5, 0.25)
    record = Evaluated(7, 3, EVALUATION._replace(boxes=boxes), 480.0, "alarm").record()
    assert record == {
        "step": 7, "eval_elbo": 630.12, "eval_elbo_se": 0.5, "eval_scenes": 3, "empty_elbo": 480.0,
        "alarm": "alarm", "log_likelihood": 660.0, "kl_pres": 1.0, "kl_where": 9.0, "kl_what": 20.0,
        "kl_background": 2.0, "baseline_error": 7.5, "bound": None, "bound_se": None,
        "count_histogram": [2, 0, 1], "confusion": [[1, 0, 0], [1, 0, 1]], "miscounted": [1],
        "accuracy_mode": 0.5, "accuracy_sample": 0.25, "accuracy_within_one": 0.75,
        "accuracy_by_distance": [0.5, 0.75, 1.0], "accuracy_by_overlap": [1.0, 0.5, None],
        "calibration_error": 0.125, "reliability": [*[[0.0] * 3] * 9, [3.0, 0.96, 0.5]],
        "box_iou": 0.75, "box_f1": 0.5, "box_ap": 0.25,
    }  # fmt: skip
    blind = Evaluated(7, 3, EVALUATION._replace(counts=None), 480.0, None).record()
    assert blind.keys() == record.keys()
    unknown = {"alarm", "bound", "bound_se", "box_iou", "box_f1", "box_ap", "confusion",
               "miscounted", "calibration_error", "reliability"}  # fmt: skip
    assert {name for name, value in blind.items() if value is None} == unknown | {
        name for name in record if name.startswith("accuracy")
    }


def test_an_evaluation_as_text() -> None:
    first, header, *rows, last = text(EVALUATION)
    assert "3 held-out scenes: ELBO 630.1 ± 0.5 nats, count accuracy 50.0% by mode" in first
    assert header.split() == ["true", "\\", "inferred", "0", "1", "2"]
    assert [row.split() for row in rows] == [
        ["0", "1", "0", "0", "100.0%", "right"], ["1", "1", "0", "1", "0.0%", "right"]
    ]  # fmt: skip
    accuracies = "below 11 px 50.0%, 11 to 17 px 75.0%, above 17 px 100.0%"
    assert last == f"  count accuracy by distance of centres: {accuracies}"
    blind = EVALUATION._replace(counts=None)
    assert "by inferred count [2, 0, 1]" in "".join(text(blind))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"accuracy_by_distance": [None, 0.75, None]}, [" centres: 11 to 17 px 75.0%"]),
        ({"accuracy_by_distance": None}, []),
        ({"accuracy_by_distance": [None] * 3}, []),
        (
            {"confusion": [[1, 0], [0, 0], [0, 1], [0, 2]], "accuracy_by_distance": None},
            ["3      0      2", "count off by at most one: 75.0%"],
        ),
    ],
)
def test_text_leaves_out_what_is_unknown(changed: dict[str, Any], expected: list[str]) -> None:
    found = text(EVALUATION._replace(counts=COUNTS._replace(**changed)))
    rows = len(changed.get("confusion", COUNTS.confusion))
    assert len(found) == 2 + rows + len(expected) - (rows > 3)
    for line, ending in zip(found[-len(expected) :], expected, strict=False):
        assert line.endswith(ending)
    assert all("right" not in line for line in found[4 : 2 + rows])  # no such scenes, or no column
