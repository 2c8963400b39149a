"""The geometry, against torch's grid_sample and pictures that can be checked by eye."""

import pytest
import torch
from helpers import by_grid_sample
from torch import Tensor

from air import image_to_window, window_boxes, window_to_image
from air.spatial_transformer import MIN_SCALE, positive_scale

WINDOW, IMAGE = 7, 20


def some_z_where(n: int) -> Tensor:
    scale = torch.rand(n, 1, dtype=torch.float64) * 4 + 0.3
    return torch.cat((scale, torch.randn(n, 2, dtype=torch.float64)), 1)


def test_window_to_image_equals_grid_sample_with_its_gradients() -> None:
    z = some_z_where(50).requires_grad_()
    windows = torch.rand(50, WINDOW, WINDOW, dtype=torch.float64, requires_grad=True)
    ours = window_to_image(z, WINDOW, IMAGE, windows)
    theirs = by_grid_sample(windows, z[:, :1], z[:, 1:], IMAGE)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), (z, windows)),
        torch.autograd.grad((theirs * weight).sum(), (z, windows)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_image_to_window_equals_grid_sample_with_its_gradients() -> None:
    z = some_z_where(50).requires_grad_()
    images = torch.rand(50, IMAGE, IMAGE, dtype=torch.float64)
    ours = image_to_window(z, WINDOW, IMAGE, images)
    theirs = by_grid_sample(images, 1 / z[:, :1], -z[:, 1:] / z[:, :1], WINDOW).flatten(1)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    (a,) = torch.autograd.grad((ours * weight).sum(), z)
    (b,) = torch.autograd.grad((theirs * weight).sum(), z)
    torch.testing.assert_close(a, b)


def test_flat_and_square_windows_give_the_same_image() -> None:
    z, windows = some_z_where(3), torch.rand(3, WINDOW, WINDOW, dtype=torch.float64)
    flat = window_to_image(z, WINDOW, IMAGE, windows.flatten(1))
    torch.testing.assert_close(flat, window_to_image(z, WINDOW, IMAGE, windows))


def test_boxes_enclose_what_is_painted() -> None:
    z = some_z_where(200)
    painted = window_to_image(z, WINDOW, IMAGE, torch.ones(200, WINDOW, WINDOW).double())
    boxes = window_boxes(z, IMAGE)
    centres = torch.arange(IMAGE) + 0.5
    for image, (x0, y0, x1, y1) in zip(painted, boxes, strict=True):
        inside_x, inside_y = (centres > x0) & (centres < x1), (centres > y0) & (centres < y1)
        inside = inside_y[:, None] & inside_x
        # bilinear blending reaches half a window pixel past the outline
        reach = (x1 - x0) / WINDOW / 2
        near_x = (centres > x0 - reach) & (centres < x1 + reach)
        near_y = (centres > y0 - reach) & (centres < y1 + reach)
        assert (image[inside] >= 0.2499).all()  # at a corner, a half in each direction
        assert (image[~(near_y[:, None] & near_x)] == 0).all()


def test_boxes_equal_a_computation_by_hand() -> None:
    boxes = window_boxes(torch.tensor([[[3.0, 0.0, 0.0], [3.0, 2.0, -2.0]]]), 30)
    torch.testing.assert_close(
        boxes, torch.tensor([[[10.0, 10.0, 20.0, 20.0], [0.0, 20.0, 10.0, 30.0]]])
    )


def test_positive_scale_is_positive_smooth_and_the_identity_above_its_minimum() -> None:
    scale = torch.linspace(-5, 5, 10_001, dtype=torch.float64, requires_grad=True)
    mapped = positive_scale(scale)
    (slope,) = torch.autograd.grad(mapped.sum(), scale)
    above = scale >= MIN_SCALE
    assert (mapped > 0).all()
    assert torch.equal(mapped[above], scale[above])
    assert (slope > 0).all()
    assert (slope.diff().abs() < 0.02).all(), "the slope must not jump"


@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-30, -1e-6, MIN_SCALE, -3.0, -1e6, 1e6, 1e15])
def test_every_scale_gives_finite_outputs_and_gradients(scale: float) -> None:
    z = torch.tensor([[scale, 0.5, -2.0]], requires_grad=True)
    picture = torch.rand(1, IMAGE, IMAGE)
    outputs = [
        window_to_image(z, WINDOW, IMAGE, torch.rand(1, WINDOW, WINDOW)),
        image_to_window(z, WINDOW, IMAGE, picture),
        window_boxes(z, IMAGE),
    ]
    for output in outputs:
        (gradient,) = torch.autograd.grad(output.sum(), z)
        assert output.isfinite().all()
        assert gradient.isfinite().all()
