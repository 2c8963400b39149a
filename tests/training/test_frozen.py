"""Training of a model of which a part is frozen: the loop, its state, and its checkpoints."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import SETTINGS, capture_only, moved, run_until, saved, trainer, values, weights

from air.air import AIR
from air.training.trainer import Trainer
from air.training.training_settings import Estimator

FOUR_STEPS = replace(SETTINGS, num_steps=4, progress_every=0, eval_every=0, save_every=0)


def freeze(air: AIR, *prefixes: str) -> None:
    for name, parameter in air.named_parameters():
        parameter.requires_grad_(not name.startswith(prefixes))


def frozen_trainer(*prefixes: str, seed: int = 0, **changes: Any) -> Trainer:  # noqa: ANN401
    """A trainer whose model is frozen before the optimiser is made."""
    made = trainer(replace(FOUR_STEPS, **changes), seed)
    freeze(made.air, *prefixes)
    return Trainer(made.air, made.images, made.held_out, made.settings, compiler=capture_only)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "prefixes"),
    [
        ("score", ("decode.", "c_init")),
        ("score", ("bl_",)),
        ("marginal", ("embed.", "rnn.", "encode.", "predict.")),
    ],
)
def test_resumed_is_as_if_never_stopped(prefixes: tuple[str, ...], estimator: Estimator) -> None:
    uninterrupted = frozen_trainer(*prefixes, estimator=estimator)
    before = values(uninterrupted.air)
    list(uninterrupted.train())
    unused = ("bl_",) if estimator == "marginal" else ()
    names = [name for name, _ in uninterrupted.air.named_parameters()]
    trained = {name for name in names if not name.startswith(prefixes + unused)}
    assert moved(uninterrupted.air, before) == trained
    stopped = frozen_trainer(*prefixes, estimator=estimator)
    run_until(stopped, 2)
    state = saved(stopped)
    resumed = frozen_trainer(*prefixes, seed=7, estimator=estimator)
    resumed.load_state_dict(state)
    list(resumed.train())
    for expected, found in zip(weights(uninterrupted), weights(resumed), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ("bl_c", "no", "as in the saved run, bl_c_init, got none"),
        ("no", "c_init", "as in the saved run, none, got c_init"),
        ("c_init", "h_init", "as in the saved run, c_init, got h_init"),
    ],
)
def test_a_state_with_other_frozen_parameters_is_refused(
    before: str, now: str, message: str
) -> None:
    """Those count that were frozen when the optimiser was made."""
    state = frozen_trainer(before)
    freeze(state.air)
    with pytest.raises(ValueError, match=message):
        frozen_trainer(now).load_state_dict(state.state_dict())


def test_a_model_with_all_parameters_frozen_is_evaluated() -> None:
    evaluating = frozen_trainer("", num_steps=0)
    list(evaluating.train())
    evaluating.load_state_dict(saved(evaluating))
