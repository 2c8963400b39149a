"""The optimisation step: rates, clipping, and agreement with Pyro's own."""

import math

import pyro
import pytest
import torch
from helpers import capture_only, gradients, make_svi, small_air
from pyro.infer import TraceGraph_ELBO
from torch import Tensor

from air import AIR
from air.marginal import MarginalAIR


def test_steps_equal_those_of_pyros_svi(images: Tensor) -> None:
    ours, theirs = small_air(), small_air()
    theirs.load_state_dict(ours.state_dict())
    svi = make_svi(ours, (0.01, 0.1))
    adam = pyro.optim.Adam(lambda name: {"lr": 0.1 if "bl_" in name else 0.01})
    pyro_svi = pyro.infer.SVI(theirs.model, theirs.guide, adam, loss=TraceGraph_ELBO())
    for step in range(3):
        pyro.set_rng_seed(step)
        loss = svi.step(images, batch_size=4)
        pyro.set_rng_seed(step)
        assert loss == pytest.approx(pyro_svi.step(images, batch_size=4), rel=1e-5)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize(
    ("copies", "captured"),
    [(1, False), (50, False), pytest.param(50, True, marks=pytest.mark.slow)],
)
def test_norm_and_clipping_are_in_nats_per_image(copies: int, captured: bool) -> None:
    """They mean the same for a data set of any size. The baseline is not clipped."""
    air, data = small_air(num_steps=1), torch.rand(4, 12, 12).repeat(copies, 1, 1)
    svis = []
    for bound in (None, 0.5):
        svis.append(make_svi(air, (1e-9, 1e-9), bound, capture_only if captured else None))
    found = []
    for svi in svis:
        torch.manual_seed(2)
        with pyro.validation_enabled(False):
            svi.step(data, batch_size=4)
        by_part: list[list[Tensor]] = [[], []]
        for name, gradient in gradients(air).items():
            by_part[name.startswith("bl_")].append(gradient.flatten())
        norms = [torch.cat(part).norm() / len(data) for part in by_part]
        found.append((norms[0], norms[1], svi.grad_norm))
    (before, baseline, told), (clipped, same_baseline, told_again) = found
    assert before > 0.5
    for one, other in [(told, before), (told_again, before), (same_baseline, baseline)]:
        torch.testing.assert_close(one, other)
    assert clipped.item() == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("kept", [[], ["bl_"]])
def test_nothing_to_train_is_said(kept: list[str], images: Tensor) -> None:
    """The marginal estimator does not use the baseline."""
    air = small_air()
    for name, parameter in air.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(kept)))
    svi = make_svi(MarginalAIR(air))
    with pytest.raises(ValueError, match=r"nothing to train: .* unfreeze some"):
        svi.step(images)


@pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")
def test_what_is_not_finite_never_reaches_the_weights(air: AIR, images: Tensor) -> None:
    """Neither loss nor gradient: the next good step is as if the bad ones had not been."""
    other = small_air()
    other.load_state_dict(air.state_dict())
    svi, only = make_svi(air), make_svi(other)
    before = [p.detach().clone() for p in air.parameters()]
    with pyro.validation_enabled(False):
        air.likelihood.sd = 1e-30
        assert not math.isfinite(svi.step(images))
        assert svi.skipped
        air.likelihood.sd = 0.3
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
