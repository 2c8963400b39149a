"""The exact expectation over the count, against the sum over all counts and against sampling."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pytest
import torch
from helpers import GivenNoise, loss_and_gradients, pixels_of, small_air
from pyro import poutine
from pyro.infer import TraceGraph_ELBO
from torch import Tensor

from air import AIR
from air.marginal import MarginalAIR, sample_paths
from air.priors import count_log_probs, geometric_presence


def log_joint_terms(air: AIR, images: Tensor, prior: list[float]) -> Any:  # noqa: ANN401
    """log p(x, z) - log q(z) and log q(n) of what the guide draws, by Pyro's traces, [B] each."""
    arguments: Any = {"data": images, "z_pres_prior_p": prior.__getitem__}
    guide: Any = poutine.trace(air.guide).get_trace(**arguments)
    model: Any = poutine.trace(poutine.replay(air.model, guide)).get_trace(**arguments)
    guide.compute_log_prob()
    model.compute_log_prob()
    sites = [site for site in guide.nodes.values() if site["type"] == "sample"]
    log_q_n = sum(s["log_prob"] for s in sites if s["name"].startswith("z_pres"))
    log_q = sum(s["log_prob"] for s in sites)
    log_p = sum(s["log_prob"] for s in model.nodes.values() if s["type"] == "sample")
    return log_p - log_q, log_q_n


@contextmanager
def noise_of(air: AIR, noise: dict[str, Tensor], count: int | None = None) -> Iterator[None]:
    """Within, the guide draws z_where and z_what from this noise, and this count."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(air, "guide", GivenNoise(noise, count)(air.guide))
        yield


def draw_noise(num_steps: int, n: int) -> dict[str, Tensor]:
    noise = {f"z_where_{t}": torch.randn(n, 3).double() for t in range(num_steps)}
    noise |= {f"z_what_{t}": torch.randn(n, 5).double() for t in range(num_steps)}
    return noise | {"z_background": torch.randn(n, 3).double()}


@pytest.mark.parametrize(
    ("num_steps", "options"),
    [
        *[(t, {}) for t in range(1, 6)],
        (3, {"guide_input": "difference"}),
        (3, {"guide_input": "glimpse"}),
        (2, {"likelihood": "bernoulli"}),
        (3, {"likelihood": "bernoulli", "guide_input": "difference", "channels": 3}),
        (2, {"background_model": "pca"}),
        (3, {"background_model": "pca", "channels": 3, "guide_input": "difference"}),
        (2, {"background_model": "pca", "likelihood": "bernoulli"}),
    ],
)
def test_value_and_gradients_equal_the_sum_over_all_counts(
    num_steps: int, options: dict[str, Any]
) -> None:
    air = small_air(num_steps=num_steps, z_background_size=3, **options).double()
    images = torch.rand(6, *pixels_of(air), dtype=torch.float64)
    prior, noise = geometric_presence(0.2, num_steps), draw_noise(num_steps, 6)
    with noise_of(air, noise):
        arguments: Any = {"z_pres_prior_p": prior.__getitem__}
        loss, ours = loss_and_gradients(MarginalAIR(air), images, **arguments)

    total = torch.zeros((), dtype=torch.float64)
    for count in range(num_steps + 1):
        with noise_of(air, noise, count):
            elbo, log_q_n = log_joint_terms(air, images, prior)
        total = total + (log_q_n.exp() * elbo).sum()
    (-total).backward()

    assert -loss == pytest.approx(total.item(), rel=1e-10)
    for name, p in air.named_parameters():
        if name.startswith("bl_"):
            assert name not in ours
        else:
            torch.testing.assert_close(ours[name], p.grad, msg=name, rtol=1e-7, atol=1e-8)


def test_the_loss_is_scaled_to_the_size_of_the_data_set() -> None:
    air = small_air().double()
    one = torch.rand(1, 12, 12, dtype=torch.float64)
    noise = {name: z[:1].expand_as(z) for name, z in draw_noise(3, 4).items()}
    program = MarginalAIR(air)
    with noise_of(air, noise):
        losses = [
            TraceGraph_ELBO().loss(program.model, program.guide, data, batch_size=4)
            for data in (one.repeat(4, 1, 1), one.repeat(40, 1, 1))
        ]
    assert losses[1] == pytest.approx(10 * losses[0])


@pytest.mark.parametrize(
    ("guide_input", "use_baselines"),
    [("image", True), ("image", False), ("difference", True), ("glimpse", True)],
)
def test_the_score_function_has_the_same_expected_gradient(
    guide_input: str, use_baselines: bool
) -> None:
    """Over all counts of one image, with the same noise in z_where and z_what."""
    air = small_air(guide_input=guide_input, use_baselines=use_baselines).double()
    image, noise = torch.rand(1, 12, 12, dtype=torch.float64), draw_noise(3, 1)
    prior = geometric_presence(0.2, 3)
    arguments: Any = {"z_pres_prior_p": prior.__getitem__}
    with noise_of(air, noise):
        _, exact = loss_and_gradients(MarginalAIR(air), image, **arguments)
    expected = {name: torch.zeros_like(gradient) for name, gradient in exact.items()}
    for count in range(4):
        with noise_of(air, noise, count):
            _, log_q = log_joint_terms(air, image, prior)
            _, found = loss_and_gradients(air, image, **arguments)
        for name, gradient in found.items():
            if not name.startswith("bl_"):
                expected[name] += log_q.exp().item() * gradient
    for name, gradient in exact.items():
        torch.testing.assert_close(expected[name], gradient, msg=name, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("logit", [-300.0, 300.0])
def test_a_guide_that_is_certain_has_finite_gradients(logit: float) -> None:
    air, images = small_air(), torch.rand(4, 12, 12)
    with torch.no_grad():
        air.predict.mlp.seq[-1].bias[0] = logit
    program = MarginalAIR(air)
    with pyro.validation_enabled():
        loss = TraceGraph_ELBO().loss_and_grads(program.model, program.guide, images)
    assert torch.tensor(loss).isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in air.parameters())


def test_an_air_without_masking_is_refused() -> None:
    air = small_air(use_masking=False)
    with pytest.raises(ValueError, match="needs masking"):
        MarginalAIR(air)
    with pytest.raises(ValueError, match="needs masking"):
        sample_paths(air, torch.rand(2, 12, 12))


def test_count_log_probs_are_finite_at_zero_and_one() -> None:
    p = count_log_probs(torch.tensor([0.5, 0.2])).exp()
    torch.testing.assert_close(p, torch.tensor([0.5, 0.4, 0.1]))
    edges = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]], requires_grad=True)
    logs = count_log_probs(edges)
    assert logs.isfinite().all()
    torch.testing.assert_close(logs.exp().sum(1), torch.ones(3))
    assert logs.argmax(1).tolist() == [0, 2, 1]
    (gradient,) = torch.autograd.grad(logs.sum(), edges)
    assert gradient.isfinite().all()
