"""Settings of training: values that do not fit each other are refused."""

import math
from dataclasses import replace
from typing import Any

import pytest
from helpers import SETTINGS, trainer

from air.support.fields import SettingError
from air.training.events import Progress


def test_raw_prior_is_the_probability_at_each_step() -> None:
    raw = trainer(replace(SETTINGS, z_pres_prior=0.3, z_pres_prior_raw=True, anneal_prior="none"))
    assert raw.prior.now == pytest.approx([0.3] * 3)


def test_a_count_prior_must_fit_the_model() -> None:
    constant = replace(SETTINGS, anneal_prior="none")
    given = trainer(replace(constant, count_prior=[1, 2, 3, 4]))
    assert given.prior.now == [0.9, pytest.approx(7 / 9), pytest.approx(4 / 7)]
    with pytest.raises(SettingError, match=r"count_prior: expected 4 numbers.*got 3"):
        trainer(replace(constant, count_prior=[1, 2, 3]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learn_count_prior_from": 5}, "learn_count_prior_from: expected at least 10"),
        ({"batch_size": 0}, "batch_size: expected a whole number of at least 1"),
        ({"added_scenes": 1.0, "estimator": "score"}, "added_scenes: expected 0 with --estimator"),
        ({"objective": "rws", "estimator": "score"}, "estimator: expected marginal with --objec"),
        ({"estimator": "vimco"}, "expected marginal or rloo or mvd or score with --objective elbo"),
        ({"objective": "iwae", "estimator": "vimco"}, "particles: expected 2 or more with vimco"),
        ({"estimator": "score", "particles": 2}, "particles: expected 1 with score, got 2"),
        ({"particles": 0}, "particles: expected a whole number of at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        replace(SETTINGS, **options)
    replace(SETTINGS, learn_count_prior_from=10)  # when it was annealed


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"objective": "rws", "particles": 2}, {"estimator": "rloo", "added_scenes": 10.0}]
)
def test_every_objective_trains_by_the_trainer(options: dict[str, Any]) -> None:
    added = {"added_scenes_from": 2} if "added_scenes" in options else {}
    made = trainer(replace(SETTINGS, **options, **added))
    events = list(made.train())
    assert made.finished
    assert all(math.isfinite(event.elbo) for event in events if isinstance(event, Progress))
