"""How to train: what does not fit is refused."""

from dataclasses import replace

import pytest
from helpers import SETTINGS, Second, trainer

from air.training.ranks import Ranks
from air.training.settings import share_of


def test_raw_prior_is_the_probability_at_each_step() -> None:
    raw = trainer(replace(SETTINGS, z_pres_prior=0.3, z_pres_prior_raw=True, anneal_prior="none"))
    assert raw.prior.probs.tolist() == pytest.approx([0.3] * 3)


def test_a_count_prior_must_fit() -> None:
    plain = replace(SETTINGS, anneal_prior="none")
    given = trainer(replace(plain, count_prior=[1, 2, 3, 4]))
    assert given.prior.now == [0.9, pytest.approx(7 / 9), pytest.approx(4 / 7)]
    with pytest.raises(ValueError, match=r"--count-prior: expected 4 numbers.*got 3"):
        trainer(replace(plain, count_prior=[1, 2, 3]))
    with pytest.raises(ValueError, match="--learn-count-prior-from must be at least 10"):
        trainer(replace(SETTINGS, learn_count_prior_from=5))


def test_a_batch_is_shared_evenly() -> None:
    eight, five = (replace(SETTINGS, batch_size=size) for size in (8, 5))
    assert share_of(eight, 5, Ranks()) == 8
    assert share_of(eight, 5, Second()) == 4
    assert share_of(replace(eight, num_steps=0), 0, Second()) == 4
    with pytest.raises(ValueError, match="multiple of their number, 2, got 5"):
        share_of(five, 5, Second())
    with pytest.raises(ValueError, match="fewer scenes to train on than processes"):
        share_of(eight, 0, Second())
