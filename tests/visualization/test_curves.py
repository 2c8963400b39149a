"""Curves have the right points, and their axes show the right span."""

import math

import numpy as np
import pytest
from helpers import EVALUATION, PROGRESS, RECORDS

from air.training.events import Evaluated
from air.visualization import curves
from air.visualization.curves import MAX_POINTS, PANELS, History


def test_every_curve_finds_its_value_in_what_training_tells() -> None:
    history = History([PROGRESS.record(), Evaluated(20, 3, EVALUATION, 480.0, None).record()])
    values = {c.key: history.points(c.key) for panel in PANELS for c in panel.curves}
    assert all(steps == [20] for steps, _ in values.values()), values
    expected = {
        "elbo": 601.2, "eval_elbo": 630.12, "accuracy_mode": 50.0, "accuracy_sample": 25.0,
        "z_pres_prior_p.0": 1e-4, "learning_rate": 1e-3, "steps_per_second": 20.0, "kl_what": 20.0,
        "grad_norm": 45.0, "baseline_error": 7.5, "empty_elbo": 480.0,
        "accuracy_by_distance.0": 50.0, "accuracy_by_distance.1": 75.0,
        "accuracy_by_distance.2": 100.0, "calibration_error": 12.5,
    }  # fmt: skip
    for key, value in expected.items():
        assert values[key][1] == [pytest.approx(value)], key
    assert history.latest["confusion"] == EVALUATION.confusion


def test_many_points_are_thinned_evenly_and_the_last_one_is_there() -> None:
    history = History()
    for step in range(1, 12_346):
        history.add({"step": step, "elbo": 2.0 * step})
        if step in (5, 999, 1000, 1001, 5000):
            steps, values = history.points("elbo")
            assert len(steps) == min(step, MAX_POINTS)
            assert steps[-1] == step
            assert values == [2.0 * s for s in steps]
    steps, _ = history.points("elbo")
    assert len(steps) == MAX_POINTS
    assert np.ptp(np.diff(steps)) <= 1
    assert (steps[0], steps[-1]) == (1, 12_345)


def test_a_copy_does_not_change_with_its_original() -> None:
    history = History(RECORDS)
    copied = history.copy()
    history.add({"step": 20, "elbo": 1.0, "confusion": [[1]]})
    history.add({"step": 21, "elbo": 2.0})
    assert copied.points("elbo") == History(RECORDS).points("elbo")
    assert copied.latest == History(RECORDS).latest


def test_a_step_that_comes_again_takes_the_place_of_the_first() -> None:
    history = History([{"step": 3, "eval_elbo": 1.0}, {"step": 3, "eval_elbo": 2.0}])
    assert history.points("eval_elbo") == ([3], [2.0])
    history.add({"step": 4, "eval_elbo": None})
    assert history.points("eval_elbo") == ([3], [2.0])


def test_a_value_that_is_not_finite_is_a_gap() -> None:
    records = [{"step": i, "elbo": v} for i, v in enumerate([1.0, math.nan, -math.inf, 2.0])]
    assert History(records).points("elbo") == ([0, 1, 2, 3], [1.0, None, None, 2.0])


def test_an_element_of_a_list_that_is_not_there_is_no_point() -> None:
    lists = [[0.5, None, 1.0], None, [], [0.25]]
    history = History({"step": i, "accuracy_by_distance": each} for i, each in enumerate(lists))
    assert history.points("accuracy_by_distance.0") == ([0, 3], [50.0, 25.0])
    assert history.points("accuracy_by_distance.1") == ([], [])
    assert history.points("accuracy_by_distance.2") == ([0], [100.0])
    assert [p.name for p in PANELS if history.has_points(p)] == ["distance"]


def panel(name: str) -> curves.Panel:
    return next(panel for panel in PANELS if panel.name == name)


def test_the_first_steps_do_not_flatten_the_rest() -> None:
    falling = [-1e6, *np.linspace(400, 640, 99)]
    scale, limits = panel("elbo").y_axis([falling, [460.0]])
    assert scale == "linear"
    assert limits is not None
    assert 300 < limits[0] < 420
    assert 640 < limits[1] < 660
    assert panel("elbo").y_axis([[None], []]) == ("linear", None)


def test_axes_begin_at_zero_or_are_logarithmic() -> None:
    assert panel("grad_norm").y_axis([[1.0, 100.0]]) == ("log", None)
    assert panel("grad_norm").y_axis([[40.0, 100.0]]) == ("linear", (0.0, pytest.approx(110.0)))
    assert panel("grad_norm").y_axis([[0.0, 100.0]])[0] == "linear"
    scale, limits = panel("kl").y_axis([[-0.5, 8.0], [None, 20.0]])
    assert (scale, limits) == ("linear", (pytest.approx(-0.55), pytest.approx(22.0)))
    assert panel("speed").y_axis([[0.0]]) == ("linear", (0.0, 1e-3))
