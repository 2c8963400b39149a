"""The optimisation step: rates, clipping, and agreement with Pyro's own."""

import math
from functools import partial

import pyro
import pytest
import torch
from helpers import gradients, small_air
from pyro.infer import TraceGraph_ELBO
from torch import Tensor

from air import AIR
from air.training.compiled_svi import CompiledSVI
from air.training.svi import SVI, make_optimizer


def test_each_group_gets_its_own_rate(air: AIR, images: Tensor) -> None:
    before = {name: p.detach().clone() for name, p in air.named_parameters()}
    svi = SVI(air.model, air.guide, make_optimizer(air, 0.01, 0.1), loss=TraceGraph_ELBO())
    svi.step(images, batch_size=4)
    for name, p in air.named_parameters():
        moved = (p - before[name]).abs().max().item()  # Adam's first step is the rate
        assert moved == pytest.approx(0.1 if name.startswith("bl_") else 0.01, rel=0.01), name


def test_steps_equal_those_of_pyros_svi(images: Tensor) -> None:
    ours, theirs = small_air(), small_air()
    theirs.load_state_dict(ours.state_dict())
    svi = SVI(ours.model, ours.guide, make_optimizer(ours, 0.01, 0.1), loss=TraceGraph_ELBO())
    adam = pyro.optim.Adam(lambda name: {"lr": 0.1 if "bl_" in name else 0.01})
    pyro_svi = pyro.infer.SVI(theirs.model, theirs.guide, adam, loss=TraceGraph_ELBO())
    for step in range(3):
        pyro.set_rng_seed(step)
        loss = svi.step(images, batch_size=4)
        pyro.set_rng_seed(step)
        assert loss == pytest.approx(pyro_svi.step(images, batch_size=4), rel=1e-5)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("captured", [False, True])
def test_two_models_train_side_by_side(captured: bool, images: Tensor) -> None:
    kind = partial(CompiledSVI, compiler=lambda graph: graph) if captured else SVI
    airs = [small_air(), small_air()]
    svis = [kind(a.model, a.guide, make_optimizer(a, 0.01, 0.1), TraceGraph_ELBO()) for a in airs]
    with pyro.validation_enabled(False):
        for _ in range(3):
            for air, svi in zip(airs, svis, strict=True):
                before = [p.detach().clone() for p in air.parameters()]
                svi.step(images)
                for old, (name, new) in zip(before, air.named_parameters(), strict=True):
                    assert not torch.equal(old, new), name


@pytest.mark.parametrize("copies", [1, 50])
def test_the_gradients_norm_is_for_a_cost_per_image_before_clipping(copies: int) -> None:
    air, data = small_air(), torch.rand(4, 12, 12).repeat(copies, 1, 1)
    torch.manual_seed(2)
    TraceGraph_ELBO().loss_and_grads(air.model, air.guide, data, batch_size=4)
    norm = torch.cat(
        [p.grad.flatten() for name, p in air.named_parameters() if not name.startswith("bl_")]
    ).norm()
    air.zero_grad()
    for kind in (SVI, partial(CompiledSVI, compiler=lambda graph: graph)):
        adam = make_optimizer(air, 1e-9, 1e-9, clip_grad_norm=0.01)
        svi = kind(air.model, air.guide, adam, TraceGraph_ELBO())
        torch.manual_seed(2)
        with pyro.validation_enabled(False):
            svi.step(data, batch_size=4)
        torch.testing.assert_close(svi.grad_norm, norm / len(data))


@pytest.mark.parametrize("copies", [1, 50])
def test_clipping_is_on_unit_scale(copies: int) -> None:
    """The bound is in nats per image: it means the same for a data set of any size."""
    air, images = small_air(), torch.rand(4, 12, 12)
    data = images.repeat(copies, 1, 1)
    bound = 0.5
    svi = SVI(air.model, air.guide, make_optimizer(air, 0.01, 0.1, bound), TraceGraph_ELBO())
    svi.step(data, batch_size=4)
    found = gradients(air)
    inference = torch.cat([g.flatten() for n, g in found.items() if not n.startswith("bl_")])
    baseline = torch.cat([g.flatten() for n, g in found.items() if n.startswith("bl_")])
    assert inference.norm().item() / len(data) == pytest.approx(bound, rel=1e-3)
    assert baseline.norm().item() / len(data) > 10 * bound


@pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")
def test_what_is_not_finite_never_reaches_the_weights(air: AIR, images: Tensor) -> None:
    """Neither loss nor gradient: the next good step is as if the bad ones had not been."""
    svi = SVI(air.model, air.guide, make_optimizer(air, 0.01, 0.1), loss=TraceGraph_ELBO())
    other = small_air()
    other.load_state_dict(air.state_dict())
    only = SVI(other.model, other.guide, make_optimizer(other, 0.01, 0.1), TraceGraph_ELBO())
    before = [p.detach().clone() for p in air.parameters()]
    with pyro.validation_enabled(False):
        air.likelihood.fixed_sd = 1e-30
        assert not math.isfinite(svi.step(images))
        assert svi.skipped
        air.likelihood.fixed_sd = 0.3
        hook = air.c_init.register_hook(lambda gradient: gradient * math.nan)
        assert math.isfinite(svi.step(images))
        assert svi.skipped
        hook.remove()
        assert all(torch.equal(a, b) for a, b in zip(before, air.parameters(), strict=True))
        losses = []
        for each in (svi, only):
            pyro.set_rng_seed(5)
            losses.append(each.step(images))
            assert not each.skipped
    assert losses[0] == losses[1]
    for (name, a), (_, b) in zip(air.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name
