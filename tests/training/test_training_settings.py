"""Settings of training: values that do not fit each other are refused."""

from dataclasses import replace

import pytest
from helpers import SETTINGS, trainer

from air.support.fields import SettingError
from air.training.training_settings import TrainingSettings


def test_raw_prior_is_the_probability_at_each_step() -> None:
    raw = trainer(replace(SETTINGS, z_pres_prior=0.3, z_pres_prior_raw=True, anneal_prior="none"))
    assert raw.prior.now == pytest.approx([0.3] * 3)


def test_a_count_prior_must_fit_the_model() -> None:
    constant = replace(SETTINGS, anneal_prior="none")
    given = trainer(replace(constant, count_prior=[1, 2, 3, 4]))
    assert given.prior.now == [0.9, pytest.approx(7 / 9), pytest.approx(4 / 7)]
    with pytest.raises(SettingError, match=r"count_prior: expected 4 numbers.*got 3"):
        trainer(replace(constant, count_prior=[1, 2, 3]))


def test_a_prior_is_learnt_only_after_it_was_annealed() -> None:
    replace(SETTINGS, learn_count_prior_from=10)
    with pytest.raises(SettingError, match="learn_count_prior_from: expected at least 10"):
        replace(SETTINGS, learn_count_prior_from=5)


def test_python_is_checked_as_the_command_line_is() -> None:
    with pytest.raises(SettingError, match="batch_size: expected a whole number of at least 1"):
        TrainingSettings(batch_size=0)
    with pytest.raises(SettingError, match="added_scenes: expected 0 with --estimator score"):
        TrainingSettings(added_scenes=1.0, estimator="score")
