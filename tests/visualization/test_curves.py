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
    assert all(list(steps) == [20] for steps, _ in values.values()), values
    expected = {
        "elbo": 601.2, "eval_elbo": 630.12, "accuracy_mode": 50.0, "accuracy_sample": 25.0,
        "z_pres_prior_p.0": 1e-4, "learning_rate": 1e-3, "steps_per_second": 20.0, "kl_what": 20.0,
        "grad_norm": 45.0, "baseline_error": 7.5, "empty_elbo": 480.0,
        "accuracy_by_distance.0": 50.0, "accuracy_by_distance.1": 75.0,
        "accuracy_by_distance.2": 100.0, "calibration_error": 12.5,
    }  # fmt: skip
    for key, value in expected.items():
        assert list(values[key][1]) == [pytest.approx(value)], key
    assert history.latest["confusion"] == [[1, 0, 0], [1, 0, 1]]


@pytest.mark.parametrize("number", [5, MAX_POINTS, MAX_POINTS + 1, 12_345])
def test_many_points_are_thinned_evenly_and_both_ends_stay(number: int) -> None:
    history = History({"step": step, "elbo": 2.0 * step} for step in range(1, number + 1))
    steps, values = history.points("elbo")
    assert len(steps) == min(number, MAX_POINTS)
    assert (steps[0], steps[-1]) == (1, number)
    assert (values == 2 * steps).all()
    assert np.ptp(np.diff(steps)) <= 1


@pytest.mark.parametrize(
    ("values", "steps", "expected"),
    [
        ([(3, 1.0), (3, 2.0), (4, None)], [3], [2.0]),  # the later of two records counts
        ([(0, 1.0), (1, math.nan), (2, -math.inf)], [0, 1, 2], [1.0, math.nan, math.nan]),
        ([], [], []),
    ],
)
def test_curves_leave_out_none_and_have_gaps_for_what_is_not_finite(
    values: list[tuple[int, float | None]], steps: list[int], expected: list[float]
) -> None:
    found = History({"step": step, "elbo": value} for step, value in values).points("elbo")
    np.testing.assert_array_equal(found[0], steps)
    np.testing.assert_array_equal(found[1], expected)


def test_a_missing_element_of_a_list_is_no_point() -> None:
    lists = [[0.5, None, 1.0], None, [], [0.25]]
    history = History({"step": i, "accuracy_by_distance": each} for i, each in enumerate(lists))
    np.testing.assert_array_equal(history.points("accuracy_by_distance.0"), ([0, 3], [50.0, 25.0]))
    shown = {panel.name: [c.key for c in history.shown(panel)] for panel in PANELS}
    assert shown.pop("distance") == ["accuracy_by_distance.0", "accuracy_by_distance.2"]
    assert not any(shown.values())


def panel(name: str) -> curves.Panel:
    return next(panel for panel in PANELS if panel.name == name)


def test_the_first_steps_do_not_flatten_the_rest() -> None:
    falling = np.array([-1e6, *np.linspace(400, 640, 99)])
    scale, limits = panel("elbo").y_axis([falling, np.array([460.0, np.nan]), np.array([])])
    assert scale == "linear"
    assert 300 < limits[0] < 420
    assert 640 < limits[1] < 660


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("elbo", [math.nan], ("linear", None)),
        ("grad_norm", [1.0, 100.0], ("log", None)),
        ("grad_norm", [40.0, 100.0], ("linear", (0.0, 110.0))),
        ("grad_norm", [0.0, 100.0], ("linear", (0.0, 110.0))),
        ("kl", [-0.5, math.nan, 20.0], ("linear", (-0.55, 22.0))),
        ("speed", [0.0], ("linear", (0.0, 1e-3))),
    ],
)
def test_axes_begin_at_zero_or_are_logarithmic(
    name: str, values: list[float], expected: tuple[str, tuple[float, float] | None]
) -> None:
    scale, limits = panel(name).y_axis([np.array(values)])
    assert (scale, limits) == (expected[0], expected[1] and pytest.approx(expected[1]))
