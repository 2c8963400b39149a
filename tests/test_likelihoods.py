"""The likelihoods: against torch.distributions by hand, and never without a gradient."""

import pytest
import torch
from torch.distributions import Bernoulli, Normal

from air import AIR
from air.likelihoods import FLIP_PROB, make_likelihood, to_intensities


@pytest.mark.parametrize("shape", [(5, 9, 9), (5, 3, 9, 9)])
def test_normal_by_hand(shape: tuple[int, ...]) -> None:
    images, canvas = torch.rand(2, *shape, dtype=torch.float64)
    pixels = make_likelihood("normal", 0.3)
    expected = Normal(canvas, 0.3).log_prob(images).flatten(1).sum(1)
    assert torch.allclose(pixels.log_prob(images, canvas), expected)
    told = pixels.distribution(canvas).log_prob(images).flatten(1).sum(1)
    assert torch.allclose(told, expected)
    assert torch.equal(pixels.prepare(images), images)


@pytest.mark.parametrize("shape", [(5, 9, 9), (5, 3, 9, 9)])
def test_bernoulli_by_hand(shape: tuple[int, ...]) -> None:
    images, canvas = torch.rand(2, *shape, dtype=torch.float64)
    pixels = make_likelihood("bernoulli", 0.3)
    bits = pixels.prepare(images)
    assert torch.equal(bits, (images >= 0.5).double())
    on = canvas * (1 - FLIP_PROB) + (1 - canvas) * FLIP_PROB
    expected = Bernoulli(on).log_prob(bits).flatten(1).sum(1)
    assert torch.allclose(pixels.log_prob(bits, canvas), expected)
    told = pixels.distribution(canvas).log_prob(bits).flatten(1).sum(1)
    assert torch.allclose(told, expected)


def test_objects_join_as_if_each_turned_pixels_on_by_itself() -> None:
    objects = torch.rand(4, 2, 5, 5, dtype=torch.float64)
    everything = torch.ones(4, 2, dtype=torch.float64)
    canvas = make_likelihood("bernoulli", 0.3).compose(objects, everything)
    assert torch.allclose(canvas, 1 - (1 - objects).prod(0))
    order = torch.tensor([2, 0, 3, 1])
    again = make_likelihood("bernoulli", 0.3).compose(objects[order], everything)
    assert torch.allclose(canvas, again)
    total = make_likelihood("normal", 0.3).compose(objects, everything)
    assert torch.allclose(total, objects.sum(0))


@pytest.mark.parametrize("likelihood", ["normal", "bernoulli"])
def test_absent_objects_leave_no_trace(likelihood: str) -> None:
    pixels = make_likelihood(likelihood, 0.3)  # type: ignore[arg-type]
    objects = torch.rand(3, 2, 5, 5)
    present = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    canvas = pixels.compose(objects, present)
    assert torch.equal(canvas[0], objects[0, 0])
    assert torch.allclose(canvas[1], pixels.add(objects[0, 1], objects[1, 1]))


@pytest.mark.parametrize("on", [0.0, 1.0])
def test_bernoulli_keeps_its_gradient_where_objects_overlap(on: float) -> None:
    pixels = make_likelihood("bernoulli", 0.3)
    image = torch.full((1, 1, 1), on)
    objects = torch.full((3, 1, 1, 1), 0.999, requires_grad=True)  # a sum would be clamped at one
    canvas = pixels.compose(objects, torch.ones(3, 1))
    assert canvas.item() <= 1
    (gradient,) = torch.autograd.grad(pixels.log_prob(image, canvas).sum(), objects)
    assert gradient.isfinite().all()
    assert (gradient > 0).all() if on else (gradient < 0).all()


@pytest.mark.parametrize("canvas", [0.0, 1.0])
def test_what_one_pixel_can_cost_is_bounded(canvas: float) -> None:
    painted = torch.full((1, 1, 1), canvas, requires_grad=True)
    for bit in (0.0, 1.0):
        cost = make_likelihood("bernoulli", 0.3).log_prob(torch.full((1, 1, 1), bit), painted)
        (gradient,) = torch.autograd.grad(cost.sum(), painted)
        assert -6.91 < cost.item() < 0
        assert gradient.isfinite().all()


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_another_form_are_refused(channels: int) -> None:
    form = (6, 6) if channels == 1 else (channels, 6, 6)
    data = torch.randint(256, (4, *form), dtype=torch.uint8)
    images = to_intensities(data, channels, 6, torch.zeros(1))
    assert torch.equal(images, data / 255)
    assert torch.equal(to_intensities(images.double()[:, None], channels, 6, images), images)
    for wrong in (data[..., :5], data[0], data[:, None, None]):
        with pytest.raises(ValueError, match=r"images must be \['B', .*6, 6\], got \["):
            to_intensities(wrong, channels, 6, images)


def test_bernoulli_needs_intensities() -> None:
    with pytest.raises(ValueError, match="likelihood bernoulli needs decoder_output_use_sigmoid"):
        AIR(likelihood="bernoulli", decoder_output_use_sigmoid=False)
    with pytest.raises(ValueError, match="guide_input must be image or difference, got 'both'"):
        AIR(guide_input="both")  # type: ignore[arg-type]


def test_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match="likelihood must be normal or bernoulli, got 'poisson'"):
        make_likelihood("poisson", 0.3)  # type: ignore[arg-type]
