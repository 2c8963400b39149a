"""Frozen parameters and loaded stores, as users of Pyro know them from `pyro.module`."""

import copy
import gc
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from helpers import capture_only, small_air
from pyro.infer import SVI as PyroSVI
from pyro.infer import JitTraceGraph_ELBO, TraceGraph_ELBO
from torch import Tensor, nn

from air import AIR
from air.air import register_parameters
from air.inference import infer, sample_prior
from air.marginal import MarginalAIR
from air.training.compiled_svi import CompiledSVI
from air.training.svi import SVI, make_optimizer

NAME = "decode.mlp.seq.0.weight"
KINDS = ["pyro", "own", "two ranks", "captured", "jit"]
IMAGES = torch.randint(256, (20, 12, 12), dtype=torch.uint8)


def make_step(kind: str, program: Any, air: AIR) -> Callable[[], Any]:  # noqa: ANN401
    """A step of training by Pyro's SVI or ours."""
    elbo = JitTraceGraph_ELBO(ignore_jit_warnings=True) if kind == "jit" else TraceGraph_ELBO()
    svi: Any
    if kind == "pyro":
        svi = PyroSVI(program.model, program.guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    else:
        options: dict[str, Any] = {"all_reduce": lambda message: None} if "two" in kind else {}
        if kind == "captured":
            options = {"compiler": capture_only}
        our_kind = CompiledSVI if kind == "captured" else SVI
        optimizer = make_optimizer(air, 0.01, 0.01, clip_grad_norm=10.0)
        svi = our_kind(program.model, program.guide, optimizer, elbo, **options)

    def step() -> None:
        with pyro.validation_enabled(False):
            svi.step(IMAGES, batch_size=8)
        if kind == "captured":
            assert None not in svi._compiled.values(), "ran uncompiled"

    return step


def values(air: AIR) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in air.named_parameters()}


def moved(air: AIR, before: dict[str, Tensor]) -> set[str]:
    return {name for name, p in air.named_parameters() if not torch.equal(p, before[name])}


def trained_by(program: Any, air: AIR) -> set[str]:  # noqa: ANN401
    names = {name for name, _ in air.named_parameters()}
    return {n for n in names if not n.startswith("bl_")} if program is not air else names


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("marginal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "prefixes",
    [("decode.",), (NAME, "c_init"), ("embed.", "rnn.", "encode.", "predict."), ("bl_",)],
)
def test_frozen_parameters_stay_as_they_are_and_all_others_train(
    kind: str, prefixes: tuple[str, ...], marginal: bool
) -> None:
    if kind == "jit" and prefixes == ("bl_",) and not marginal:
        pytest.skip("torch.jit fails: tensor does not have a device")
    air = small_air(num_steps=1 if kind == "captured" else 2, embed_net=[6])
    program = MarginalAIR(air) if marginal else air
    frozen = {name for name, _ in air.named_parameters() if name.startswith(prefixes)}
    for name, parameter in air.named_parameters():
        parameter.requires_grad_(name not in frozen)
    before, step = values(air), make_step(kind, program, air)
    for _ in range(2):
        step()
    assert moved(air, before) == trained_by(program, air) - frozen
    assert {name for name, p in air.named_parameters() if not p.requires_grad} == frozen
    assert not frozen & set(pyro.get_param_store().keys())


@pytest.mark.parametrize(
    "kind", ["pyro", "own", "two ranks", pytest.param("captured", marks=pytest.mark.slow)]
)
def test_freezing_and_unfreezing_between_steps(kind: str) -> None:
    """Neither momentum, nor a gradient that was left, moves a parameter once it is frozen."""
    air = small_air(num_steps=1)
    everything = set(values(air))
    decoder = {name for name in everything if name.startswith("decode.")}
    step = make_step(kind, air, air)
    for trainable in (True, False, True, False):
        air.decode.requires_grad_(trainable)
        before = values(air)
        for _ in range(2):
            step()
        assert moved(air, before) == (everything if trainable else everything - decoder)


@pytest.mark.parametrize(
    "kind", ["pyro", "own", "two ranks", pytest.param("captured", marks=pytest.mark.slow)]
)
def test_parameters_frozen_from_the_start_train_once_unfrozen(kind: str) -> None:
    air = small_air(num_steps=1)
    air.decode.requires_grad_(False)
    air.bl_predict.requires_grad_(False)
    step = make_step(kind, air, air)
    step()
    air.requires_grad_(True)
    before = values(air)
    step()
    assert moved(air, before) == set(before)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_our_svi_traces_again_for_other_frozen_parameters() -> None:
    air = small_air(num_steps=1)
    air.decode.requires_grad_(False)
    step = make_step("jit", air, air)
    for trainable in (False, True, False):
        air.decode.requires_grad_(trainable)
        before = values(air)
        for _ in range(2):
            step()
        assert any(name.startswith("decode.") for name in moved(air, before)) == trainable


def test_a_program_is_captured_once_for_each_set_of_frozen_parameters() -> None:
    air = small_air(num_steps=1)
    optimizer = make_optimizer(air, 0.01, 0.01)
    svi = CompiledSVI(air.model, air.guide, optimizer, TraceGraph_ELBO(), capture_only)
    with pyro.validation_enabled(False):
        for trainable in (True, False, True, False, False):
            air.decode.requires_grad_(trainable)
            svi.step(IMAGES, batch_size=8)
            assert (air.decode.mlp.seq[0].weight.grad is not None) == trainable
    assert len(svi._compiled) == 2


def test_inference_and_samples_leave_frozen_parameters_frozen() -> None:
    air = small_air()
    air.decode.requires_grad_(False)
    infer(air, IMAGES)
    sample_prior(air, 2, seed=0)
    air.model(IMAGES)
    assert not any(p.requires_grad for p in air.decode.parameters())
    assert all(p.requires_grad for p in air.encode.parameters())


def test_the_optimiser_leaves_frozen_parameters_out() -> None:
    air = small_air()
    for module in (air.decode, air.bl_rnn):
        module.requires_grad_(False)
    groups = make_optimizer(air, 0.01, 0.01).param_groups
    held = [p for group in groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in air.parameters() if p.requires_grad}
    air.requires_grad_(False)
    optimizer = make_optimizer(air, 0.01, 0.01)
    assert [group["params"] for group in optimizer.param_groups] == [[], []]
    svi = SVI(air.model, air.guide, optimizer, TraceGraph_ELBO())
    with pytest.raises(ValueError, match=r"nothing to train: every parameter .* is frozen"):
        svi.step(IMAGES)
    pyro_svi = PyroSVI(air.model, air.guide, pyro.optim.Adam({"lr": 0.1}), TraceGraph_ELBO())
    before = values(air)
    pyro_svi.step(IMAGES)
    assert not moved(air, before)


@pytest.mark.parametrize("kind", ["pyro", "own", "captured"])
def test_a_frozen_net_of_ones_own_may_hold_integers(kind: str) -> None:
    decode = nn.Sequential(nn.Linear(5, 49), nn.Sigmoid()).requires_grad_(False)
    decode.register_parameter("table", nn.Parameter(torch.arange(3), requires_grad=False))
    air = small_air(num_steps=1, decode=decode)
    before, step = values(air), make_step(kind, air, air)
    step()
    changed = moved(air, before)
    assert "encode.mlp.seq.0.weight" in changed
    assert not any(name.startswith("decode.") for name in changed)


@pytest.mark.parametrize("kind", ["pyro", "own", "captured"])
def test_parameters_that_are_not_contiguous_train(kind: str) -> None:
    air = small_air(num_steps=1)
    weight = air.decode.mlp.seq[0].weight
    weight.data = weight.detach().t().contiguous().t()
    before, step = values(air), make_step(kind, air, air)
    for _ in range(3):
        step()
        assert NAME in moved(air, before)
        assert weight is air.decode.mlp.seq[0].weight
        before = values(air)


# A store that was loaded.


def save_and_clear(tmp_path: Path, way: str) -> Callable[[], None]:
    """Saves the store, empties it, and returns what restores it."""
    store = pyro.get_param_store()
    if way == "file":
        store.save(str(tmp_path / "store"))
        pyro.clear_param_store()
        return lambda: store.load(str(tmp_path / "store"))
    state = store.get_state() if way == "state" else copy.deepcopy(store.get_state())
    pyro.clear_param_store()
    return lambda: store.set_state(state)


@pytest.mark.parametrize("way", ["file", "copy of state", "state"])
@pytest.mark.parametrize("marginal", [False, True])
def test_a_loaded_store_and_optimiser_continue_the_training(
    way: str, marginal: bool, tmp_path: Path
) -> None:
    """The restored model takes the very step that the saved model would have taken."""

    def make() -> tuple[AIR, Any, Any]:
        air = small_air()
        program = MarginalAIR(air) if marginal else air
        adam = pyro.optim.Adam({"lr": 0.01})
        return air, adam, PyroSVI(program.model, program.guide, adam, TraceGraph_ELBO())

    def steps(svi: Any, numbers: range) -> None:  # noqa: ANN401
        for number in numbers:
            torch.manual_seed(number)
            svi.step(IMAGES, batch_size=8)

    whole, _, svi = make()
    start = whole.state_dict()
    start = {name: value.clone() for name, value in start.items()}
    steps(svi, range(3))
    pyro.clear_param_store()

    stopped, adam, svi = make()
    stopped.load_state_dict(start)
    steps(svi, range(2))
    saved, names = values(stopped), set(pyro.get_param_store().keys())
    adam.save(str(tmp_path / "adam"))
    load = save_and_clear(tmp_path, way)

    restored, adam, svi = make()
    load()
    adam.load(str(tmp_path / "adam"))
    infer(restored, IMAGES)
    assert not moved(restored, saved)
    assert set(pyro.get_param_store().keys()) == names
    steps(svi, range(2, 3))
    assert not moved(restored, values(whole))


@pytest.mark.parametrize(
    "use",
    [
        lambda air: infer(air, IMAGES),
        lambda air: air.prior(2),
        lambda air: sample_prior(air, 2, seed=0),
        lambda air: MarginalAIR(air).guide(IMAGES),
        lambda air: make_step("captured", air, air)(),
        lambda air: make_step("own", air, air)(),
    ],
)
def test_every_use_of_the_model_restores_the_values(use: Callable[[AIR], Any]) -> None:
    air, value = small_air(num_steps=1), torch.full((8, 5), 7.0)
    air.decode.requires_grad_(False)
    pyro.param(NAME, value)
    use(air)
    weight = air.decode.mlp.seq[0].weight
    assert torch.equal(weight, value)
    assert not weight.requires_grad
    assert pyro.get_param_store()[NAME] is weight  # so that a saved store holds the whole model


def test_a_captured_step_restores_once() -> None:
    air, value = small_air(num_steps=1), torch.full((8, 5), 0.1)
    pyro.param(NAME, value.clone())
    step = make_step("captured", air, air)
    for count in range(1, 4):
        step()
        distance = (air.decode.mlp.seq[0].weight - value).abs().max().item()
        assert 0.005 * count < distance < 0.011 * count


def test_a_value_set_between_steps_is_taken() -> None:
    air = small_air()
    step = make_step("pyro", air, air)
    step()
    pyro.get_param_store()[NAME] = torch.full((8, 5), 3.0)
    step()
    assert (air.decode.mlp.seq[0].weight - 3.0).abs().max() < 0.02


@pytest.mark.parametrize("also_own_name", [False, True])
def test_names_of_pyros_example_are_restored_and_removed(
    also_own_name: bool, tmp_path: Path
) -> None:
    old, new = small_air(), small_air()
    pyro.module("decode", old.decode)
    pyro.param("h_init", old.h_init)
    store = pyro.get_param_store()
    store.save(str(tmp_path / "store"))
    pyro.clear_param_store()
    store.load(str(tmp_path / "store"))
    if also_own_name:
        pyro.param(NAME, torch.full((8, 5), 2.0))
    infer(new, IMAGES)
    expected = values(old) | ({NAME: torch.full((8, 5), 2.0)} if also_own_name else {})
    for name, value in values(new).items():
        if name.startswith(("decode.", "h_init")):
            assert torch.equal(value, expected[name]), name
    assert set(store.keys()) == set(expected)
    store.get_state()


def test_a_name_given_by_pyro_module_too_stays() -> None:
    air = small_air()

    def model(data: Tensor) -> None:
        pyro.module("decode", air.decode)
        air.model(data)

    svi = PyroSVI(model, air.guide, pyro.optim.Adam({"lr": 0.01}), TraceGraph_ELBO())
    for _ in range(2):
        before = values(air)
        svi.step(IMAGES)
        assert moved(air, before) == set(before)
    store = pyro.get_param_store()
    assert store["decode$$$mlp.seq.0.weight"] is store[NAME] is air.decode.mlp.seq[0].weight


def test_constrained_and_double_values_are_restored() -> None:
    air = small_air()
    positive = torch.distributions.constraints.positive
    pyro.param(NAME, torch.full((8, 5), 2.0).double(), constraint=positive)
    air.prior(1)
    torch.testing.assert_close(air.decode.mlp.seq[0].weight, torch.full((8, 5), 2.0))
    assert pyro.get_param_store()[NAME] is air.decode.mlp.seq[0].weight


def test_one_tensor_under_two_names_is_restored() -> None:
    air, value = small_air(), torch.full((8, 5), 2.0)
    pyro.param(NAME, value)
    pyro.param("decode$$$mlp.seq.0.weight", value)
    air.prior(1)
    assert torch.equal(air.decode.mlp.seq[0].weight, value)
    assert "decode$$$mlp.seq.0.weight" not in pyro.get_param_store()


def test_a_value_of_another_shape_is_refused_and_nothing_is_changed() -> None:
    air = small_air()
    before = values(air)
    pyro.param("h_init", torch.ones(1, 11))
    pyro.param(NAME, torch.ones(8, 6))
    message = rf"{NAME} of shape \[8, 6\], but the model's is of shape \[8, 5\]; load .*or call"
    with pytest.raises(ValueError, match=message):
        infer(air, IMAGES)
    assert not moved(air, before)


# Several models in one process.


@pytest.mark.parametrize("alive", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"decoder_net": [4]}])
def test_a_second_model_has_weights_of_its_own(alive: bool, sizes: dict[str, Any]) -> None:
    first = small_air()
    make_step("pyro", first, first)()
    if not alive:
        del first
    second = small_air(**sizes)
    second.encode.requires_grad_(False)
    before = values(second)
    infer(second, IMAGES)
    assert not moved(second, before)
    assert all(
        tensor is dict(second.named_parameters())[name]
        for name, tensor in pyro.get_param_store().items()
    )
    make_step("pyro", second, second)()
    assert moved(second, before) == {name for name in before if not name.startswith("encode.")}


def test_a_copy_and_a_new_net_have_weights_of_their_own() -> None:
    air = small_air()
    make_step("pyro", air, air)()
    for other in (copy.deepcopy(air), air):
        other.decode = small_air().decode
        before = values(other)
        infer(other, IMAGES)
        assert not moved(other, before)


def test_stores_of_several_models_in_scopes(caplog: pytest.LogCaptureFixture) -> None:
    """The state of one model never overwrites another that was in use before."""
    one, other = small_air(), small_air()
    store = pyro.get_param_store()
    scopes: list[Any] = []
    for air in (one, other):
        with store.scope() as scope:
            make_step("pyro", air, air)()
            scopes.append(scope)
    trained = values(one), values(other)
    with store.scope(scopes[0]):
        infer(one, IMAGES)
        infer(other, IMAGES)
    assert not moved(one, trained[0])
    assert not moved(other, trained[1])
    assert not caplog.records
    with caplog.at_level(logging.WARNING), store.scope(scopes[1]):
        new = small_air()
        infer(new, IMAGES)
    assert not moved(new, trained[1])
    assert len(caplog.records) == 1
    assert "takes the weights of another" in caplog.text


def test_registering_keeps_no_model_alive() -> None:
    air = small_air()
    infer(air, IMAGES)
    weight = weakref.ref(air.h_init)
    pyro.clear_param_store()
    del air
    gc.collect()
    assert weight() is None


def test_parameters_that_several_names_share_are_registered_once() -> None:
    layer = nn.Linear(3, 3)
    tied = nn.ModuleDict({"a": layer, "b": layer})
    register_parameters(tied)
    register_parameters(tied)
    assert set(pyro.get_param_store().keys()) == {"a.weight", "a.bias"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("marginal", [False, True])
def test_a_cuda_graph_is_recorded_for_each_set_of_frozen_parameters(marginal: bool) -> None:
    air, data = small_air().cuda(), IMAGES.cuda()
    program = MarginalAIR(air) if marginal else air
    optimizer = make_optimizer(air, 0.01, 0.01)
    elbo = TraceGraph_ELBO()
    svi = CompiledSVI(program.model, program.guide, optimizer, elbo, capture_only)
    everything = trained_by(program, air)
    for trainable in (True, False, True, False):
        air.decode.requires_grad_(trainable)
        frozen = set() if trainable else {n for n in everything if n.startswith("decode.")}
        for _ in range(6):  # the recording replaces the step after three
            before = values(air)
            with pyro.validation_enabled(False):
                svi.step(data, batch_size=8)
            assert moved(air, before) == everything - frozen
    assert len(svi._recorded) == 2
