"""Training of a model of which a part is frozen: the loop, its state, and its checkpoints."""

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import SETTINGS, capture_only, small_air, trainer, weights

from air.air import AIR
from air.evaluation import HeldOut
from air.training.settings import Estimator
from air.training.trainer import Trainer

FOUR_STEPS = replace(SETTINGS, num_steps=4, progress_every=0, eval_every=0, save_every=0)
PARTS = [("decode.",), ("bl_",), ("embed.", "rnn.", "encode.", "predict."), ("c_init",)]


def freeze(air: AIR, prefixes: tuple[str, ...]) -> None:
    for name, parameter in air.named_parameters():
        parameter.requires_grad_(not name.startswith(prefixes))


def frozen_trainer(prefixes: tuple[str, ...], seed: int = 0, **changes: Any) -> Trainer:  # noqa: ANN401
    """A trainer whose model is frozen before the optimiser is made."""
    made = trainer(replace(FOUR_STEPS, **changes), seed)
    freeze(made.air, prefixes)
    settings = made.settings
    return Trainer(made.air, made.images, made.held_out, settings, compiler=capture_only)


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """A state that went through a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return dict(torch.load(file, weights_only=True))


def stop_at(running: Trainer, step: int) -> None:
    take_step = running._take_step

    def step_and_stop() -> None:
        take_step()
        running.stop_requested = running.step == step

    running._take_step = step_and_stop  # type: ignore[method-assign]
    list(running.train())


@pytest.mark.parametrize("estimator", ["score", "marginal"])
@pytest.mark.parametrize("prefixes", PARTS)
def test_resumed_is_as_if_never_stopped(prefixes: tuple[str, ...], estimator: Estimator) -> None:
    whole = frozen_trainer(prefixes, estimator=estimator)
    before = {name: p.detach().clone() for name, p in whole.air.named_parameters()}
    list(whole.train())
    moved = {name for name, p in whole.air.named_parameters() if not torch.equal(p, before[name])}
    unused = ("bl_",) if estimator == "marginal" else ()
    assert moved == {name for name in before if not name.startswith(prefixes + unused)}
    stopped = frozen_trainer(prefixes, estimator=estimator)
    stop_at(stopped, 2)
    state = saved(stopped.state_dict())
    resumed = frozen_trainer(prefixes, seed=7, estimator=estimator)
    resumed.load_state_dict(state)
    assert resumed.state_dict()["optimizer"]["state"].keys() == state["optimizer"]["state"].keys()
    list(resumed.train())
    for expected, found in zip(weights(whole), weights(resumed), strict=True):
        assert torch.equal(expected, found)


def test_a_part_can_be_frozen_and_unfrozen_on_the_way() -> None:
    """The state goes by the parameters' names, for their order in the optimiser differs then."""

    def train(resume_at: int | None) -> list[torch.Tensor]:
        running = frozen_trainer(("decode.",))
        for step in range(1, 5):
            freeze(running.air, {2: ("no",), 3: ("encode.",)}.get(step, ("decode.",)))
            running._take_step()
            if step == resume_at:
                state = saved(running.state_dict())
                air, images = small_air(), running.images
                freeze(air, tuple(state["frozen"]) or ("no",))
                running = Trainer(air, images, running.held_out, running.settings)
                running.load_state_dict(state)
        return weights(running)

    whole = train(None)
    for resume_at in (1, 2, 3):
        for expected, found in zip(whole, train(resume_at), strict=True):
            assert torch.equal(expected, found)


def test_a_state_with_other_frozen_parameters_is_refused() -> None:
    done = frozen_trainer(("decode.",))
    list(done.train())
    state = saved(done.state_dict())
    message = r"must be frozen .* expected decode\.mlp\.seq\.0\.weight, .* and 1 more, got none"
    with pytest.raises(ValueError, match=message):
        trainer(FOUR_STEPS).load_state_dict(state)
    with pytest.raises(ValueError, match="expected none, got c_init"):
        frozen_trainer(("c_init",)).load_state_dict(trainer(FOUR_STEPS).state_dict())


def test_a_state_of_an_earlier_program_is_taken() -> None:
    stopped = trainer(FOUR_STEPS)
    stop_at(stopped, 2)
    state = saved(stopped.state_dict())
    del state["frozen"], state["optimized"]
    resumed = trainer(FOUR_STEPS, seed=7)
    resumed.load_state_dict(state)
    list(resumed.train())
    whole = trainer(FOUR_STEPS)
    list(whole.train())
    for expected, found in zip(weights(whole), weights(resumed), strict=True):
        assert torch.equal(expected, found)
    for group in state["optimizer"]["param_groups"]:
        group["params"] = group["params"][:-1]
    with pytest.raises(ValueError, match="state is of another number of parameters"):
        trainer(FOUR_STEPS).load_state_dict(state)


def test_a_model_that_is_wholly_frozen_is_evaluated_but_not_trained() -> None:
    air = small_air().requires_grad_(False)
    images = torch.rand(5, 12, 12)
    with pytest.raises(ValueError, match=r"nothing to train: .* unfreeze some"):
        Trainer(air, images, HeldOut(images), FOUR_STEPS)
    evaluating = Trainer(air, images, HeldOut(images), replace(FOUR_STEPS, num_steps=0))
    list(evaluating.train())
    evaluating.load_state_dict(saved(evaluating.state_dict()))
    freeze(air, ("decode.", "encode.", "rnn.", "predict.", "h_", "c_", "z_"))
    Trainer(air, images, HeldOut(images), replace(FOUR_STEPS, estimator="score"))
    with pytest.raises(ValueError, match=r"that --estimator marginal trains is frozen"):
        Trainer(air, images, HeldOut(images), replace(FOUR_STEPS, estimator="marginal"))
