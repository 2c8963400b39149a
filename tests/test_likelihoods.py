"""The likelihoods against torch.distributions, and their gradients."""

import pytest
import torch
from helpers import small_air
from torch.distributions import Bernoulli, Normal

from air import AIR
from air.likelihoods import FLIP_PROB, make_likelihood


@pytest.mark.parametrize("shape", [(5, 9, 9), (5, 3, 9, 9)])
def test_normal_equals_torchs_distribution(shape: tuple[int, ...]) -> None:
    images, canvas = torch.rand(2, *shape, dtype=torch.float64)
    likelihood = make_likelihood("normal", 0.3)
    expected = Normal(canvas, 0.3).log_prob(images).flatten(1).sum(1)
    assert torch.allclose(likelihood.log_prob(images, canvas), expected)
    summed = likelihood.distribution(canvas).log_prob(images.flatten(1))
    assert torch.allclose(summed, expected)
    assert torch.equal(likelihood.prepare(images), images)


@pytest.mark.parametrize("shape", [(5, 9, 9), (5, 3, 9, 9)])
def test_bernoulli_equals_torchs_distribution(shape: tuple[int, ...]) -> None:
    images, canvas = torch.rand(2, *shape, dtype=torch.float64)
    likelihood = make_likelihood("bernoulli", 0.3)
    bits = likelihood.prepare(images)
    assert torch.equal(bits, (images >= 0.5).double())
    on = canvas * (1 - FLIP_PROB) + (1 - canvas) * FLIP_PROB
    expected = Bernoulli(on).log_prob(bits).flatten(1).sum(1)
    assert torch.allclose(likelihood.log_prob(bits, canvas), expected)
    summed = likelihood.distribution(canvas).log_prob(bits.flatten(1))
    assert torch.allclose(summed, expected)


def test_bernoulli_objects_turn_pixels_on_independently_and_normal_objects_add_up() -> None:
    objects = torch.rand(4, 2, 5, 5, dtype=torch.float64)
    everything = torch.ones(4, 2, dtype=torch.float64)
    canvas = make_likelihood("bernoulli", 0.3).compose(objects, everything)
    assert torch.allclose(canvas, 1 - (1 - objects).prod(0))
    order = torch.tensor([2, 0, 3, 1])
    again = make_likelihood("bernoulli", 0.3).compose(objects[order], everything)
    assert torch.allclose(canvas, again)
    total = make_likelihood("normal", 0.3).compose(objects, everything)
    assert torch.allclose(total, objects.sum(0))


@pytest.mark.parametrize("name", ["normal", "bernoulli"])
def test_absent_objects_do_not_change_the_canvas(name: str) -> None:
    likelihood = make_likelihood(name, 0.3)  # type: ignore[arg-type]
    objects = torch.rand(3, 2, 5, 5)
    present = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    canvas = likelihood.compose(objects, present)
    assert torch.equal(canvas[0], objects[0, 0])
    assert torch.allclose(canvas[1], likelihood.add(objects[0, 1], objects[1, 1]))


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


@pytest.mark.parametrize("channels", [1, 3])
def test_bytes_become_intensities_and_images_of_another_shape_are_refused(channels: int) -> None:
    shape = (12, 12) if channels == 1 else (channels, 12, 12)
    air, data = small_air(channels=channels), torch.randint(256, (4, *shape), dtype=torch.uint8)
    images = air.to_images(data)
    assert torch.equal(images, data / 255)
    assert torch.equal(air.to_images(images.double()[:, None]), images)
    for wrong in (data[..., :5], data[0], data[:, None, None]):
        with pytest.raises(ValueError, match=r"images must be \['B', .*12, 12\], got \["):
            air.to_images(wrong)


def test_bernoulli_needs_intensities() -> None:
    with pytest.raises(ValueError, match="likelihood: bernoulli needs decoder_output_use_sigmoid"):
        AIR(likelihood="bernoulli", decoder_output_use_sigmoid=False)
