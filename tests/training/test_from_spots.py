"""The first phase has the objective that it names, on the objects that a threshold sees."""

from typing import Any

import numpy as np
import pyro
import pyro.poutine as poutine
import pytest
import torch
from helpers import small_air, squares
from pyro.infer import TraceGraph_ELBO
from torch import Tensor

from air import AIR
from air.data.spots import fit_finder
from air.spatial_transformer import window_boxes
from air.training.from_spots import MARGIN, FromSpots

SIDE = 24


def scenes(channels: int = 1) -> Tensor:
    x = squares(40, (SIDE, SIDE), 5, 2, channels)
    return torch.from_numpy(x if channels > 1 else x[:, 0])


def program(guide: str = "image", background: str = "none", channels: int = 1) -> FromSpots:
    air = small_air(
        num_steps=3, x_size=SIDE, guide_input=guide, background_model=background, channels=channels
    )
    x = scenes(channels)
    return FromSpots(air, fit_finder(x.numpy()), x, x.numpy())


def test_windows_lie_around_the_spots() -> None:
    spots, x = program(), scenes()
    _, in_double, _ = FromSpots(spots.air.double(), spots.find, x, x.numpy()).known_objects
    assert in_double.where.dtype == torch.double
    _, known, hidden = spots.known_objects
    assert hidden[x > 0].all()
    assert hidden.sum() <= known.present.sum() * 7**2  # of 5 x 5 pixels, and those that touch them
    found = spots.find(x.numpy())
    boxes = window_boxes(known.where, SIDE).numpy()
    for i, each in enumerate(found):
        n = len(each)
        assert known.present[i].tolist() == [1.0] * n + [0.0] * (3 - n)
        order = each.boxes[each.boxes[:, 0].argsort()]
        np.testing.assert_allclose(
            boxes[i, :n, :2] + boxes[i, :n, 2:], order[:, :2] + order[:, 2:], atol=1e-3
        )
        np.testing.assert_allclose(boxes[i, :n, 2] - boxes[i, :n, 0], 5 * MARGIN, rtol=1e-4)


def test_spots_may_be_looked_for_in_larger_images() -> None:
    spots, x = program(), scenes()
    large = x.repeat_interleave(3, 1).repeat_interleave(3, 2).numpy()
    _, expected, _ = spots.known_objects
    _, known, hidden = FromSpots(spots.air, fit_finder(large), x, large).known_objects
    assert all(torch.equal(a, b) for a, b in zip(known, expected, strict=True))
    assert hidden[x > 0].all()


@pytest.mark.parametrize("guide", ["image", "difference", "glimpse"])
@pytest.mark.parametrize("background", ["none", "pca"])
def test_the_objective_is_the_one_that_is_named(guide: str, background: str) -> None:
    spots, x = program(guide, background), scenes()
    air = spots.air
    pyro.set_rng_seed(3)
    guide_trace = poutine.trace(spots.guide).get_trace(x, batch_size=6)
    trace = poutine.trace(poutine.replay(spots.model, guide_trace)).get_trace(x, batch_size=6)
    ours = float((trace.log_prob_sum() - guide_trace.log_prob_sum()).detach())
    # The same by Pyro alone: model and guide conditioned on every latent of those traces.
    images, known, values = spots._batch
    drawn = {
        name: node["value"]
        for name, node in guide_trace.nodes.items()
        if name.startswith(("z_what", "z_background"))
    }
    latents: Any = values | drawn
    of_guide = poutine.trace(poutine.condition(air.guide, latents)).get_trace(images)
    of_model = poutine.trace(poutine.condition(air.model, latents)).get_trace(images)
    of_guide.compute_log_prob()
    of_model.compute_log_prob()

    def total(which: Any, *names: str) -> float:  # noqa: ANN401
        nodes = [n for name, n in which.nodes.items() if name.startswith(names)]
        return sum(
            float((n["log_prob"] * known.sure).sum().detach()) for n in nodes if "log_prob" in n
        )

    q = total(of_guide, "z_pres", "z_where") - total(of_guide, "z_what", "z_background")
    expected = (total(of_model, "z_", "obs") + q) * len(x) / 6
    assert ours == pytest.approx(expected, rel=1e-4)


def test_unsure_images_teach_nothing() -> None:
    spots, x = program(), scenes()
    _, known, hidden = spots.known_objects
    unsure = known._replace(sure=torch.zeros(len(x), dtype=torch.bool))
    spots.known_objects = x, unsure, hidden
    loss = TraceGraph_ELBO().loss(spots.model, spots.guide, x, batch_size=8)
    assert loss == 0


@pytest.mark.slow
def test_a_guide_learns_where_the_spots_are() -> None:
    pyro.set_rng_seed(0)
    spots, x = program(), scenes()
    air: AIR = spots.air
    adam = torch.optim.Adam(air.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        adam.zero_grad()
        loss = TraceGraph_ELBO().loss_and_grads(spots.model, spots.guide, x, batch_size=20)
        adam.step()
        losses.append(loss / len(x))
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 20
