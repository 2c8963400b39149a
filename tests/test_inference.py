"""What is found in pictures, against enumeration, and what the prior draws."""

import itertools
from typing import Any

import pytest
import torch
from helpers import count_on, small_air
from pyro import poutine
from torch import Tensor

from air import AIR
from air.inference import infer, mean_count_probs, sample_prior


def test_count_probabilities_equal_enumeration(air: AIR, images: Tensor) -> None:
    found = infer(air, images)
    torch.testing.assert_close(found.count_probs.sum(1), torch.ones(10))
    assert torch.equal(found.counts, found.count_probs.argmax(1))
    total = torch.zeros(10, 4)
    for pattern in itertools.product([0.0, 1.0], repeat=3):
        choices = {f"z_pres_{t}": torch.full((10, 1), on) for t, on in enumerate(pattern)}
        # each other choice at its mean, one after another, by conditioning on what came out
        for t in range(3):
            for kind in ("z_where", "z_what"):
                trace: Any = poutine.trace(poutine.condition(air.guide, choices)).get_trace(images)
                choices[f"{kind}_{t}"] = trace.nodes[f"{kind}_{t}"]["fn"].mean.detach()
        trace = poutine.trace(poutine.condition(air.guide, choices)).get_trace(images)
        log_q = sum(
            trace.nodes[f"z_pres_{t}"]["fn"].log_prob(choices[f"z_pres_{t}"]) for t in range(3)
        )
        if sorted(pattern, reverse=True) == list(pattern):
            total[:, int(sum(pattern))] += torch.as_tensor(log_q).exp().detach()
    torch.testing.assert_close(total, found.count_probs, rtol=1e-4, atol=1e-6)


def test_inference_draws_nothing(air: AIR, images: Tensor) -> None:
    state = torch.get_rng_state()
    first, second = infer(air, images), infer(air, images)
    assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert first.boxes.shape == (10, 3, 4)
    assert first.reconstructions.shape == images.shape


def test_reconstructions_hold_the_counted_objects(images: Tensor) -> None:
    air = small_air()
    count_on(air, 0, -9.0)
    assert (infer(air, images).reconstructions == 0).all()
    count_on(air, 0, 9.0)
    found = infer(air, images)
    assert (found.counts == 3).all()
    assert (found.reconstructions.sum((1, 2)) > 0).all()


def test_samples_of_the_prior_have_all_counts_and_leave_the_generator_alone(air: AIR) -> None:
    state = torch.get_rng_state()
    canvas, boxes, counts = sample_prior(air, 400, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert (canvas.shape, boxes.shape) == ((400, 12, 12), (400, 3, 4))
    shares = torch.bincount(counts, minlength=4) / 400
    assert ((shares - 0.25).abs() < 5 * (0.25 * 0.75 / 400) ** 0.5).all()
    assert torch.equal(canvas.flatten(1).any(1), counts > 0)
    assert all(map(torch.equal, (canvas, boxes, counts), sample_prior(air, 400, seed=1)))
    _, _, counts = sample_prior(air, 400, 1, [0.5, 1e-9, 0.5, 1e-9])
    assert set(counts.tolist()) == {0, 2}


def test_the_mean_of_q_is_a_prior_with_nothing_impossible(air: AIR) -> None:
    images = torch.rand(1203, 12, 12)  # more than a batch
    expected = infer(air, images).count_probs.mean(0)
    assert mean_count_probs(air, images) == pytest.approx(expected.tolist(), abs=1e-5)
    count_on(air, 0, -99.0)
    found = mean_count_probs(air, images)
    assert sum(found) == pytest.approx(1)
    assert min(found) > 0
