"""Parameters in Pyro's store and beside it, and models as plain functions."""

import copy
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pyro
import pyro.poutine as poutine
import pytest
import torch
from helpers import capture_only, make_svi, moved, small_air, values
from pyro.infer import SVI as PyroSVI
from pyro.infer import TraceGraph_ELBO
from torch import nn

from air import AIR
from air.inference import infer, sample_prior
from air.marginal import MarginalAIR
from air.support.handlers import closed, register_parameters

NAME = "decode.mlp.seq.0.weight"
KINDS = ["pyro", "own", pytest.param("captured", marks=pytest.mark.slow)]
IMAGES = torch.randint(256, (20, 12, 12), dtype=torch.uint8)


def make_step(kind: str, air: AIR, marginal: bool = False) -> Callable[[], Any]:
    """A step of training by Pyro's SVI or ours."""
    program = MarginalAIR(air) if marginal else air
    compiler = capture_only if kind == "captured" else None
    svi: Any = make_svi(program, clip=10.0, compiler=compiler)
    if kind == "pyro":
        adam = pyro.optim.Adam({"lr": 0.01})
        svi = PyroSVI(program.model, program.guide, adam, TraceGraph_ELBO())

    def step() -> None:
        with pyro.validation_enabled(False):
            svi.step(IMAGES, batch_size=8)
        assert None not in getattr(svi, "_compiled", {}).values(), "ran uncompiled"

    return step


@pytest.mark.parametrize(
    ("kind", "marginal", "prefixes"),
    [
        *product(
            ["pyro", "own"],
            [False, True],
            [("decode.",), (NAME, "c_init"), ("embed.", "rnn."), ("bl_",)],
        ),
        pytest.param("captured", True, ("decode.", "c_init"), marks=pytest.mark.slow),
    ],
)
def test_frozen_parameters_stay_as_they_are_and_all_others_train(
    kind: str, marginal: bool, prefixes: tuple[str, ...]
) -> None:
    air = small_air(num_steps=1 if kind == "captured" else 2, embed_net=[6])
    frozen = {name for name, _ in air.named_parameters() if name.startswith(prefixes)}
    for name, parameter in air.named_parameters():
        parameter.requires_grad_(name not in frozen)
    before, step = values(air), make_step(kind, air, marginal)
    for _ in range(2):
        step()
    infer(air, IMAGES)
    sample_prior(air, 2, seed=0)
    unused = ("bl_",) if marginal else ()
    trained = {name for name, _ in air.named_parameters() if not name.startswith(unused)}
    assert moved(air, before) == trained - frozen
    assert {name for name, p in air.named_parameters() if not p.requires_grad} == frozen
    everything = {name for name, _ in air.named_parameters()}
    registered = everything - frozen if kind == "pyro" else set()
    assert set(pyro.get_param_store().keys()) == registered


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_net_may_hold_integers_and_weights_may_be_transposed(kind: str) -> None:
    decode = nn.Sequential(nn.Linear(5, 49), nn.Sigmoid()).requires_grad_(False)
    decode.register_parameter("table", nn.Parameter(torch.arange(3), requires_grad=False))
    air = small_air(num_steps=1, decode=decode)
    weight = air.encode.mlp.seq[0].weight
    weight.data = weight.detach().t().contiguous().t()
    before, step = values(air), make_step(kind, air)
    for _ in range(3):
        step()
        changed = moved(air, before)
        assert "encode.mlp.seq.0.weight" in changed
        assert not any(name.startswith("decode.") for name in changed)
        assert weight is air.encode.mlp.seq[0].weight
        before = values(air)


# The store.


def load_store(air: AIR, folder: Path) -> None:
    """A store that was saved, as a user of Pyro would load it."""
    store = pyro.get_param_store()
    make_step("pyro", air)()
    store.save(str(folder / "store"))
    pyro.clear_param_store()
    store.load(str(folder / "store"))


@pytest.mark.parametrize("marginal", [False, True])
@pytest.mark.parametrize("names", ["of another model", "of a file"])
def test_pyros_svi_refuses_names_of_other_tensors(
    names: str, marginal: bool, tmp_path: Path
) -> None:
    """Otherwise Pyro would train those, and the model would stand still without a warning."""
    first, second = small_air(), small_air(decoder_net=[4])
    second.guide(IMAGES)  # trains nothing, and so names nothing
    assert not pyro.get_param_store().keys()
    if names == "of a file":
        load_store(first, tmp_path)
    else:
        make_step("pyro", first)()
    before, step = values(second), make_step("pyro", second, marginal)
    with pytest.raises(ValueError, match=r"under the name \w+, .*; call pyro\.clear_param_store\("):
        step()
    assert not moved(second, before)
    pyro.clear_param_store()
    step()
    assert {NAME, "h_init"} <= moved(second, before)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_our_svi_trains_models_side_by_side(kind: str) -> None:
    """And beside one that Pyro trains, and beside a copy."""
    one = small_air(num_steps=1)
    make_step("pyro", one)()
    stored = dict(pyro.get_param_store().named_parameters())
    airs = [one, small_air(num_steps=1), copy.deepcopy(one)]
    steps = [make_step(kind, air, marginal=kind == "captured") for air in airs]
    start = [values(air) for air in airs]
    for _ in range(2):
        for air, step in zip(airs, steps, strict=True):
            others = [(other, values(other)) for other in airs if other is not air]
            step()
            assert not any(moved(other, old) for other, old in others)
    for air, before in zip(airs, start, strict=True):
        names = {name for name, _ in air.named_parameters()}
        baseline = {name for name in names if name.startswith("bl_")}
        assert moved(air, before) == names - (baseline if kind == "captured" else set())
    assert dict(pyro.get_param_store().named_parameters()) == stored


def test_parameters_that_several_names_share_are_registered_once() -> None:
    layer = nn.Linear(3, 3)
    tied = nn.ModuleDict({"a": layer, "b": layer})
    with poutine.trace():
        register_parameters(tied)
        register_parameters(tied)
    assert set(pyro.get_param_store().keys()) == {"a.weight", "a.bias"}


# Models as functions.


def test_modes_return_after_an_error() -> None:
    air = small_air()
    air.encode.eval()
    modes = [module.training for module in air.modules()]
    with pytest.raises(RuntimeError), closed(air):
        raise RuntimeError
    assert [module.training for module in air.modules()] == modes
