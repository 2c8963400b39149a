"""The likelihoods against torch.distributions, and their gradients."""

from typing import Any

import pytest
import torch
from torch.distributions import Bernoulli, Normal

from air.likelihoods import FLIP_PROB, make_likelihood


@pytest.mark.parametrize("shape", [(5, 9, 9), (5, 3, 9, 9)])
@pytest.mark.parametrize("name", ["normal", "bernoulli"])
def test_pixels_are_those_of_torchs_distributions(name: Any, shape: tuple[int, ...]) -> None:  # noqa: ANN401
    images, canvas = torch.rand(2, *shape, dtype=torch.float64)
    likelihood = make_likelihood(name, 0.3)
    prepared = likelihood.prepare(images)
    if name == "normal":
        assert torch.equal(prepared, images)
        pixels: Any = Normal(canvas, 0.3)
    else:
        assert torch.equal(prepared, (images >= 0.5).double())
        pixels = Bernoulli(canvas * (1 - FLIP_PROB) + (1 - canvas) * FLIP_PROB)
    expected = pixels.log_prob(prepared).flatten(1).sum(1)
    assert torch.allclose(likelihood.log_prob(prepared, canvas), expected)
    summed = likelihood.distribution(canvas).log_prob(prepared.flatten(1))
    assert torch.allclose(summed, expected)


@pytest.mark.parametrize("on", [0.0, 1.0])
def test_bernoulli_keeps_its_gradient_where_objects_overlap(on: float) -> None:
    likelihood = make_likelihood("bernoulli", 0.3)
    image = torch.full((1, 1, 1), on)
    objects = torch.full((3, 1, 1, 1), 0.999, requires_grad=True)  # a sum would be clamped at one
    canvas = likelihood.compose(objects, torch.ones(3, 1))
    assert canvas.item() <= 1
    (gradient,) = torch.autograd.grad(likelihood.log_prob(image, canvas).sum(), objects)
    assert gradient.isfinite().all()
    assert (gradient > 0).all() if on else (gradient < 0).all()


@pytest.mark.parametrize("canvas", [0.0, 1.0])
def test_the_cost_of_a_pixel_is_bounded(canvas: float) -> None:
    painted = torch.full((1, 1, 1), canvas, requires_grad=True)
    for bit in (0.0, 1.0):
        cost = make_likelihood("bernoulli", 0.3).log_prob(torch.full((1, 1, 1), bit), painted)
        (gradient,) = torch.autograd.grad(cost.sum(), painted)
        assert -6.91 < cost.item() < 0
        assert gradient.isfinite().all()
