"""Each kind of failure raises its own alarm, and nothing else does."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import small_air
from pyro import poutine
from torch import Tensor
from torch.distributions import Normal

from air import AIR
from air.evaluation.alarms import collapse_alarm, empty_canvas_elbo, first_not_finite
from air.evaluation.metrics import Evaluation


def evaluation(elbo: float, histogram: list[int]) -> Evaluation:
    return Evaluation(elbo, 0.0, elbo, 0.0, 0.0, 0.0, None, histogram)


def test_the_elbo_of_empty_canvases_equals_a_computation_by_hand() -> None:
    air, images = small_air(likelihood_sd=0.2).double(), torch.rand(7, 12, 12).double()
    by_hand = Normal(torch.zeros_like(images), 0.2).log_prob(images).sum((1, 2)).mean()
    assert empty_canvas_elbo(air, images) == pytest.approx(by_hand.item())
    data = torch.randint(256, (2500, 12, 12), dtype=torch.uint8)
    assert empty_canvas_elbo(air, data) == pytest.approx(empty_canvas_elbo(air, data / 255), 1e-5)
    assert empty_canvas_elbo(AIR(), torch.zeros(1, 50, 50)) == pytest.approx(712.59, abs=0.01)


@pytest.mark.parametrize(
    ("elbo", "histogram", "words"),
    [
        (461.0, [500, 300, 200, 0], "no better than the ELBO of canvases without objects"),
        (600.0, [990, 10, 0, 0], "no object in 990 of 1000 scenes"),
        (640.0, [330, 2, 3, 665], "all 3 steps on 665 of the 670 scenes"),
        (630.0, [330, 330, 340, 0], None),
        (630.0, [330, 330, 300, 40], None),
        (630.0, [500, 500], None),
    ],
)
def test_each_kind_of_collapse_raises_its_own_alarm_and_a_good_model_none(
    elbo: float, histogram: list[int], words: str | None
) -> None:
    message = collapse_alarm(evaluation(elbo, histogram), 460.2)
    if words is None:
        assert message is None
    else:
        assert words in message
        assert "--seed" in message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("the images", lambda air, images: images[3].fill_(torch.nan)),
        ("the weight h_init", lambda air, images: air.h_init.data.fill_(torch.inf)),
        ("the gradient of c_init", lambda air, images: air.c_init.grad.fill_(torch.nan)),
        ("a sample", lambda air, images: None),
    ],
)
def test_the_first_place_that_is_not_finite_is_named(
    images: Tensor, name: str, damage: Callable[[AIR, Tensor], object]
) -> None:
    air = small_air()
    air.c_init.grad = torch.zeros_like(air.c_init)
    damage(air, images)
    assert first_not_finite(air, images, None) == name


def test_images_of_bytes_are_not_searched() -> None:
    images, searched = torch.randint(256, (700, 12, 12), dtype=torch.uint8), []

    def isfinite(tensor: Tensor) -> Tensor:
        searched.append(len(tensor) if tensor.dim() == 3 else 0)
        return torch.isfinite(tensor)

    with mock.patch.object(Tensor, "isfinite", isfinite):
        assert first_not_finite(small_air(), images, None) == "a sample"
    assert max(searched) == 0


def test_without_objects_the_background_is_left() -> None:
    air, images = small_air(background_model="pca", channels=3), torch.rand(7, 3, 12, 12)
    trace: Any = poutine.trace(air.guide).get_trace(images)
    q = trace.nodes["z_background"]["fn"].base_dist
    elbos = []
    for z in q.sample((1000,)):
        likelihood = Normal(air.background.paint(z), 0.3).log_prob(images).sum()
        elbos.append(likelihood + (Normal(0.0, 1.0).log_prob(z) - q.log_prob(z)).sum())
    expected = torch.stack(elbos).mean().item() / 7
    assert empty_canvas_elbo(air, images) == pytest.approx(expected, abs=0.3)
