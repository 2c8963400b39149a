"""The optimisation step: rates, clipping, and agreement with Pyro's own."""

import pyro
import pytest
import torch
from conftest import small_air
from pyro.infer import TraceGraph_ELBO
from torch import Tensor

from air import AIR
from air.svi import SVI, make_optimizer


def gradients(air: AIR) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in air.named_parameters() if p.grad is not None}


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


def test_two_models_train_side_by_side(images: Tensor) -> None:
    airs = [small_air(), small_air()]
    svis = [SVI(a.model, a.guide, make_optimizer(a, 0.01, 0.1), TraceGraph_ELBO()) for a in airs]
    for _ in range(3):
        for air, svi in zip(airs, svis, strict=True):
            before = [p.detach().clone() for p in air.parameters()]
            svi.step(images)
            for old, (name, new) in zip(before, air.named_parameters(), strict=True):
                assert not torch.equal(old, new), name


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


def test_a_loss_that_is_not_finite_never_reaches_the_weights(air: AIR, images: Tensor) -> None:
    svi = SVI(air.model, air.guide, make_optimizer(air, 0.01, 0.1), loss=TraceGraph_ELBO())
    before = [p.detach().clone() for p in air.parameters()]
    air.likelihood_sd = 1e-30
    with pyro.validation_enabled(False), pytest.raises(FloatingPointError, match="the loss is"):
        svi.step(images)
    assert all(torch.equal(a, b) for a, b in zip(before, air.parameters(), strict=True))
