"""z_pres is drawn as torch's Bernoulli draws it, and where a probability is NaN it is zero."""

import math

import pyro.distributions as dist
import torch

from air.support.distributions import Presence


def test_it_draws_what_a_bernoulli_draws_on_a_cpu() -> None:
    for probs in (torch.rand(500, 1), torch.rand(500, 1).double(), torch.tensor([[0.0], [1.0]])):
        drawn = []
        for kind in (Presence, dist.Bernoulli):
            torch.manual_seed(3)
            values = kind(probs).sample(), kind(probs).to_event(1).sample((2,)), torch.rand(3)
            drawn.append(values)
        for ours, theirs in zip(*drawn, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


def test_it_stays_itself_when_expanded_or_masked() -> None:
    expanded = Presence(torch.tensor([0.5])).expand([400, 1])
    assert isinstance(expanded, Presence)
    drawn = expanded.mask(torch.ones(400, 1, dtype=torch.bool)).to_event(1).sample()
    assert drawn.shape == (400, 1)
    assert 130 < drawn.sum() < 270  # a standard deviation is 10


def test_a_probability_that_is_nan_draws_zero() -> None:
    """On a GPU torch's own Bernoulli would end the process."""
    probs = torch.tensor([math.nan, 1.0])
    assert Presence(probs, validate_args=False).sample().tolist() == [0.0, 1.0]
