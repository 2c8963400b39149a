"""Inference against enumeration of all z_pres, and samples of the prior."""

import copy
import itertools
import math
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from helpers import count_on, make_svi, small_air
from pyro import poutine
from pyro.infer import SVI, TraceGraph_ELBO
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from air import AIR, refinement
from air.evaluation.elbo import importance_weighted_bound, sample_elbo
from air.evaluation.metrics import HeldOut, evaluate
from air.inference import forked_rng, infer, mean_count_probs, sample_prior
from air.marginal import MarginalAIR
from air.visualization.snapshots import take_snapshot


def test_count_probabilities_equal_the_enumeration_of_all_z_pres(air: AIR, images: Tensor) -> None:
    found = infer(air, images)
    torch.testing.assert_close(found.count_probs.sum(1), torch.ones(10))
    assert torch.equal(found.counts, found.count_probs.argmax(1))
    total = torch.zeros(10, 4)
    for pattern in itertools.product([0.0, 1.0], repeat=3):
        choices = {f"z_pres_{t}": torch.full((10, 1), on) for t, on in enumerate(pattern)}
        # z_where and z_what of each step at their means, given the steps before
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


def test_inference_is_deterministic_and_uses_no_random_numbers(air: AIR, images: Tensor) -> None:
    state = torch.get_rng_state()
    first, second = infer(air, images), infer(air, images)
    assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert first.boxes.shape == (10, 3, 4)
    assert first.reconstructions.shape == images.shape


def test_reconstructions_contain_the_counted_objects(images: Tensor) -> None:
    air = small_air()
    count_on(air, 0, -9.0)
    assert (infer(air, images).reconstructions == 0).all()
    count_on(air, 0, 9.0)
    found = infer(air, images)
    assert (found.counts == 3).all()
    assert (found.reconstructions.sum((1, 2)) > 0).all()


@contextmanager
def double_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class NetWithMoments(nn.Module):
    """Has a running mean, and drops inputs at random, both of which evaluation must not do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm1d(144), nn.Dropout(0.5), nn.Linear(144, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


FUNCTIONS_OF_IMAGES = [
    infer, partial(infer, refine=True), sample_elbo, mean_count_probs,
    lambda air, images: evaluate(air, HeldOut(images)),
    lambda air, images: importance_weighted_bound(air, images, 2),
    lambda air, images: sample_prior(air, len(images), seed=0),
    lambda air, images: take_snapshot(air, HeldOut(images), 0, seed=0),
]  # fmt: skip


@pytest.mark.parametrize("use", FUNCTIONS_OF_IMAGES)
@pytest.mark.parametrize(
    "surround",
    [
        lambda: pyro.plate("data", 4),
        lambda: pyro.plate("z_where_0", 3, dim=-2),
        lambda: poutine.scale(scale=0.1),
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        torch.inference_mode,
        double_by_default,
    ],
    ids=["plate", "vectorised", "scale", "autocast", "inference mode", "double"],
)
def test_functions_of_images_give_the_same_whatever_surrounds_them(
    use: Callable[[AIR, Tensor], Any],
    surround: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(refinement, "NUM_STEPS", 5)
    air, images = small_air(), torch.rand(4, 12, 12)
    torch.manual_seed(0)
    expected = use(air, images)
    torch.manual_seed(0)
    with surround():
        found = use(air, images)
    for mine, right in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        if isinstance(right, Tensor):
            assert torch.equal(mine, right)
        else:
            np.testing.assert_equal(mine, right)


@pytest.mark.parametrize("use", FUNCTIONS_OF_IMAGES)
def test_functions_of_images_are_closed(use: Callable[[AIR, Tensor], object]) -> None:
    """They leave the nets, Pyro's store and Pyro's handlers outside as they are."""
    decode = nn.Sequential(nn.Linear(5, 49), nn.BatchNorm1d(49), nn.Sigmoid())
    air = small_air(embed=NetWithMoments(), decode=decode, use_baselines=False)
    images = torch.rand(8, 12, 12)
    air.encode.eval()  # a mode of its own, which stays
    modes = [net.training for net in air.modules()]
    before = copy.deepcopy(air.state_dict())
    with poutine.trace() as outside:
        use(air, images)
    assert not outside.trace.nodes.keys() - {"_INPUT", "_RETURN"}
    assert not pyro.get_param_store().keys()
    assert modes == [net.training for net in air.modules()]
    for name, value in air.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_an_image_is_inferred_alone_as_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refinement, "NUM_STEPS", 5)
    air, images = small_air(embed=NetWithMoments(), use_baselines=False), torch.rand(8, 12, 12)
    for refine in (False, True):
        together, alone = infer(air, images, refine), infer(air, images[3:4], refine)
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one[3:4], other, rtol=1e-3, atol=1e-3)


def test_samples_of_the_prior_have_all_counts_and_do_not_change_the_generator(air: AIR) -> None:
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


def test_the_mean_of_q_is_a_prior_under_which_every_count_is_possible(air: AIR) -> None:
    images = torch.rand(1203, 12, 12)  # more than a batch
    expected = infer(air, images).count_probs.mean(0)
    assert mean_count_probs(air, images) == pytest.approx(expected.tolist(), abs=1e-5)
    count_on(air, 0, -99.0)
    found = mean_count_probs(air, images)
    assert sum(found) == pytest.approx(1)
    assert min(found) > 0


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_seed_for_a_block_leaves_the_generator_of_the_device_as_it_was(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator()  # stands in for the generator of the device
    module = torch.get_device_module(kind)
    monkeypatch.setattr(module, "get_rng_state", lambda device: generator.get_state())
    monkeypatch.setattr(module, "set_rng_state", lambda state, device: generator.set_state(state))
    state = generator.get_state()
    with forked_rng(1, torch.device(kind)):
        torch.rand(3, generator=generator)
        assert not torch.equal(state, generator.get_state())
    assert torch.equal(state, generator.get_state())


def test_a_model_in_use_is_copied_and_pickled() -> None:
    air, images = small_air(), torch.rand(4, 12, 12)
    svi = SVI(air.model, air.guide, pyro.optim.Adam({"lr": 1e-3}), TraceGraph_ELBO())
    svi.step(images)
    for other in (pickle.loads(pickle.dumps(air)), copy.deepcopy(air)):
        assert all(map(torch.equal, infer(other, images), infer(air, images)))
    svi.step(images)  # goes on


def test_threads_take_turns() -> None:
    air, images = small_air(), torch.rand(3, 12, 12)
    expected = infer(air, images).count_probs
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: infer(air, images).count_probs, range(40)))
    assert all(torch.equal(each, expected) for each in found)

    state, (_, _, drawn) = torch.get_rng_state(), sample_prior(air, 3, seed=1)
    with ThreadPoolExecutor(4) as pool:
        samples = list(pool.map(lambda _: sample_prior(air, 3, seed=1)[2], range(40)))
    assert all(torch.equal(each, drawn) for each in samples)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_display_can_infer_while_another_thread_trains() -> None:
    air, images = small_air(), torch.rand(3, 12, 12)
    svi = make_svi(MarginalAIR(air), (0.0, 0.0))
    expected = infer(air, images).count_probs
    with ThreadPoolExecutor(2) as pool:
        display = pool.submit(lambda: [infer(air, images).count_probs for _ in range(20)])
        losses = [svi.step(images) for _ in range(20)]
        assert all(torch.equal(each, expected) for each in display.result())
    assert all(map(math.isfinite, losses))


def test_a_single_image_has_a_baseline_error_of_its_own() -> None:
    """As among others; the baseline of one image has no dimension."""
    air, images = small_air(), torch.rand(5, 12, 12)
    for n in (1, 4):
        parts = torch.split(images, n)
        torch.manual_seed(0)
        squares = torch.cat([sample_elbo(air, part).baseline_squares for part in parts])
        assert squares.shape == (5,)
