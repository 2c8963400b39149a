"""Curves have the right points, and their axes show the right span."""

import math

import numpy as np
import pytest
from helpers import EVALUATION, PROGRESS

from air.training.events import Evaluated
from air.visualization import curves
from air.visualization.curves import MAX_POINTS, PANELS, History


def test_every_curve_finds_its_value_in_the_events_of_training() -> None:
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
    assert history.latest["confusion"] == [[1, 0, 0], [1, 0, 1]]


@pytest.mark.parametrize("number", [5, MAX_POINTS - 1, MAX_POINTS, MAX_POINTS + 1, 12_345])
def test_many_points_are_thinned_evenly_and_both_ends_stay(number: int) -> None:
    history = History({"step": step, "elbo": 2.0 * step} for step in range(1, number + 1))
    steps, values = history.points("elbo")
    assert len(steps) == min(number, MAX_POINTS)
    assert (steps[0], steps[-1]) == (1, number)
    assert values == [2.0 * step for step in steps]
    assert np.ptp(np.diff(steps)) <= 1


def test_the_later_of_two_records_of_a_step_counts() -> None:
    values = [(3, 1.0), (3, 2.0), (4, None)]
    history = History({"step": step, "eval_elbo": value} for step, value in values)
    assert history.points("eval_elbo") == ([3], [2.0])
    assert history.latest["eval_elbo"] == 2.0


def test_a_value_that_is_not_finite_is_a_gap() -> None:
    records = [{"step": i, "elbo": v} for i, v in enumerate([1.0, math.nan, -math.inf, 2.0])]
    assert History(records).points("elbo") == ([0, 1, 2, 3], [1.0, None, None, 2.0])


def test_a_missing_element_of_a_list_is_no_point() -> None:
    lists = [[0.5, None, 1.0], None, [], [0.25]]
    history = History({"step": i, "accuracy_by_distance": each} for i, each in enumerate(lists))
    assert history.points("accuracy_by_distance.0") == ([0, 3], [50.0, 25.0])
    assert history.points("accuracy_by_distance.1") == ([], [])
    shown = {panel.name: [c.key for c in history.shown(panel)] for panel in PANELS}
    assert shown.pop("distance") == ["accuracy_by_distance.0", "accuracy_by_distance.2"]
    assert not any(shown.values())


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
