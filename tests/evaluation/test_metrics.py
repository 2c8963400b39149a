"""ELBO, counts and boxes on held-out scenes, against Pyro and cases computed by hand."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import count_on, small_air
from pyro.infer import TraceGraph_ELBO, tracegraph_elbo
from torch import Tensor

from air import AIR
from air.evaluation import HeldOut, evaluate, importance_weighted_bound, sample_elbo
from air.evaluation.alarms import empty_canvas_elbo
from air.evaluation.boxes import tight_boxes
from air.evaluation.metrics import check_scenes
from air.inference import infer, mean_count_probs


class OnMps(Tensor):
    """A CPU tensor that stands in for an MPS tensor, together with all that is computed from it.

    As on MPS, no result has float64, until `cpu` returns an ordinary tensor.
    """

    @classmethod
    def __torch_function__(cls, func: Any, *arguments: Any) -> Any:  # noqa: ANN401
        result = super().__torch_function__(func, *arguments)
        if func is Tensor.cpu:
            return result.as_subclass(Tensor)
        if isinstance(result, OnMps) and result.dtype == torch.float64:
            raise TypeError("MPS has no float64")
        return result


@pytest.mark.parametrize(
    "measure",
    [
        empty_canvas_elbo,
        mean_count_probs,
        lambda air, images: evaluate(air, HeldOut(images, torch.ones(10)), iwae_samples=2),
    ],
)
def test_no_tensor_becomes_float64_on_mps(
    air: AIR, images: Tensor, measure: Callable[[AIR, Tensor], object]
) -> None:
    on_mps = images.as_subclass(OnMps)
    with pytest.raises(TypeError, match="MPS has no float64"):
        infer(air, on_mps).count_probs.double()
    assert measure(air, on_mps) == measure(air, images)


def test_held_out_scenes_are_checked(air: AIR) -> None:
    x, boxes = np.zeros((2, 12, 12), np.uint8), np.zeros((2, 3, 4))
    boxes[0, 1:] = np.nan  # beyond the count
    scenes = check_scenes(air, HeldOut(x, np.array([1, 3]), boxes))
    assert scenes.boxes is not None
    assert scenes.overlaps is None
    assert np.shares_memory(scenes.images.numpy(), x)
    for counts in ([2, 3], [1, 4]):
        with pytest.raises(ValueError, match="boxes: expected a finite box for every counted"):
            check_scenes(air, HeldOut(x, np.array(counts), boxes))


@pytest.mark.parametrize("background", ["none", "pca"])
@pytest.mark.parametrize(
    "options", [{}, {"guide_input": "difference"}, {"likelihood": "bernoulli"}]
)
def test_the_sampled_elbo_equals_pyros(
    background: str, options: dict[str, Any], images: Tensor
) -> None:
    air = small_air(background_model=background, **options)
    torch.manual_seed(4)
    ours = sample_elbo(air, images)
    torch.manual_seed(4)
    theirs = TraceGraph_ELBO().loss(air.model, air.guide, images)
    assert all(term.shape == (10,) for term in ours)
    assert ours.elbo.sum().item() == pytest.approx(-theirs, rel=1e-5)
    mean = evaluate(air, HeldOut(images), seed=4).kl_background
    if background == "pca":
        assert (ours.kl_background != 0).all()
        assert mean == pytest.approx(ours.kl_background.mean().item(), rel=1e-4)
    else:
        assert (ours.kl_background == 0).all()
        assert mean is None


def test_the_baselines_error_equals_the_error_in_pyros_regression(
    air: AIR, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pyro's own costs and baselines, recorded where Pyro compares them."""
    count_on(air, 0, 0.5)
    squares, decided = [], []

    def construct(node: str, site: Any, cost: Tensor) -> Any:  # noqa: ANN401
        step = int(node.removeprefix("z_pres_"))
        used = site["fn"].base_dist._mask.squeeze(-1) if step else torch.ones(10).bool()
        error = (cost - site["infer"]["baseline"]["baseline_value"]).squeeze()
        squares.append((error**2)[used].sum().item())
        decided.append(int(used.sum()))
        return original(node, site, cost)

    original = tracegraph_elbo._construct_baseline
    monkeypatch.setattr(tracegraph_elbo, "_construct_baseline", construct)
    images = torch.rand(10, 12, 12)
    torch.manual_seed(5)
    TraceGraph_ELBO().loss_and_grads(air.model, air.guide, images)
    monkeypatch.undo()
    found = evaluate(air, HeldOut(images), seed=5)
    assert found.baseline_error == pytest.approx((sum(squares) / sum(decided)) ** 0.5, rel=1e-4)
    assert evaluate(small_air(use_baselines=False), HeldOut(images)).baseline_error is None


def test_without_objects_the_elbo_is_the_likelihood_and_the_count_prior(images: Tensor) -> None:
    air = small_air()
    count_on(air, 0, -30.0)
    found = sample_elbo(air, images, lambda t: 0.25)
    pixels = torch.distributions.Normal(0.0, 0.3).log_prob(images).sum((1, 2))
    torch.testing.assert_close(found.log_likelihood, pixels)
    torch.testing.assert_close(found.kl_pres, torch.full((10,), -math.log(0.75)))
    assert (found.kl_where == 0).all()
    assert (found.kl_what == 0).all()


def test_the_bound_agrees_with_exact_integration() -> None:
    """With at most one object, a nearly fixed place and a code of one dimension, log p(x) is an
    integral over one number.
    """
    air = small_air(
        num_steps=1, z_what_size=1, decoder_net=[], scale_prior_sd=1e-4, pos_prior_sd=1e-4
    ).double()
    with torch.no_grad():
        air.decode.mlp.seq[0].weight.normal_()
        air.encode.mlp.seq[-1].weight.zero_()  # so that q(z_what) covers the posterior
        air.encode.mlp.seq[-1].bias.fill_(0.5)
        air.predict.mlp.seq[-1].weight.zero_()  # so that q(z_where) equals the prior
        air.predict.mlp.seq[-1].bias.copy_(torch.tensor([0.0] * 4 + [math.log(math.e - 1)] * 3))
        place = air.z_where_loc_prior.expand(601, 3)
        codes = torch.linspace(-6, 6, 601).double()
        (painted,) = air.paint([place], [codes[:, None]])
        images = (painted[260:361:20] + 0.3 * torch.randn(6, 12, 12)).detach()
        images[0] = 0.3 * torch.randn(12, 12)
        images.clamp_(0, 1)

    def log_likelihood(canvas: Tensor) -> Tensor:  # for each pair of image and canvas
        pixels = torch.distributions.Normal(canvas, 0.3)
        return pixels.log_prob(images[:, None]).sum((2, 3))

    log_prior = torch.distributions.Normal(0.0, 1.0).log_prob(codes)
    integral = (log_likelihood(painted) + log_prior).logsumexp(1) + math.log(0.02)  # the spacing
    empty = log_likelihood(torch.zeros(1, 12, 12))[:, 0]
    exact = torch.logaddexp(empty + math.log(0.6), integral + math.log(0.4)).detach()

    # The mean of K weights is an unbiased estimate of p(x) for every K; its log is the bound.
    prior, again = [0.4], images.repeat(200, 1, 1)
    bounds = importance_weighted_bound(air, again, 20, prior.__getitem__).reshape(200, 6)
    ratio = (bounds - exact).exp()
    se = ratio.std(0) / 200**0.5
    assert (se < 0.15).all()
    assert ((ratio.mean(0) - 1).abs() < 4.5 * se).all()
    elbo = sample_elbo(air, again, prior.__getitem__).elbo.reshape(200, 6).mean(0)
    assert (elbo < bounds.mean(0)).all()


def test_the_bound_equals_the_log_of_the_mean_of_all_weights(air: AIR, images: Tensor) -> None:
    """Without masking, the count is drawn; `test_objectives` has the sum over counts."""
    drawing = small_air(use_masking=False)
    torch.manual_seed(6)
    weights = torch.stack([sample_elbo(drawing, images).elbo for _ in range(7)])
    torch.manual_seed(6)
    bound = importance_weighted_bound(drawing, images, 7)
    torch.testing.assert_close(bound, weights.logsumexp(0) - math.log(7))
    found = evaluate(air, HeldOut(images), batch_size=4, iwae_samples=7)
    assert found.bound > found.elbo
    first = evaluate(air, HeldOut(images), batch_size=4, iwae_samples=7, iwae_scenes=5)
    same = evaluate(air, HeldOut(images[:5]), batch_size=4, iwae_samples=7)
    assert first.elbo == found.elbo
    assert first.bound == pytest.approx(same.bound, abs=2.0)
    assert first.bound != found.bound


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_every_scene_counts_once_in_any_batch_size(air: AIR, batch_size: int) -> None:
    images, counts = torch.rand(10, 12, 12), torch.randint(6, (10,))
    found = evaluate(air, HeldOut(images, counts), batch_size=batch_size)
    mode = infer(air, images).counts
    assert found.count_histogram == torch.bincount(mode, minlength=4).tolist()
    assert found.counts.accuracy_mode == pytest.approx((mode == counts).float().mean().item())
    assert sum(map(sum, found.counts.confusion)) == 10


def test_the_elbo_is_a_mean_over_images_and_evaluation_has_no_side_effects(
    air: AIR, images: Tensor
) -> None:
    state = torch.get_rng_state()
    found = evaluate(air, HeldOut(images), batch_size=10, seed=7)
    assert torch.equal(state, torch.get_rng_state())
    assert found == evaluate(air, HeldOut(images), batch_size=10, seed=7)
    assert all(p.grad is None for p in air.parameters())
    torch.manual_seed(7)
    elbo = sample_elbo(air, images).elbo
    assert found.elbo == pytest.approx(elbo.mean().item(), rel=1e-5)
    assert found.elbo_se == pytest.approx(elbo.std().item() / math.sqrt(10), rel=1e-4)


def test_one_scene_has_no_standard_error_and_no_scenes_are_refused(air: AIR) -> None:
    assert math.isnan(evaluate(air, HeldOut(torch.rand(1, 12, 12), torch.tensor([1]))).elbo_se)
    with pytest.raises(ValueError, match="no scenes"):
        evaluate(air, HeldOut(torch.rand(0, 12, 12)))


def test_box_scores_are_of_the_boxes_around_painted_objects(images: Tensor) -> None:
    air = small_air()
    count_on(air, 0, 9.0)
    boxes = tight_boxes(infer(air, images).objects)
    scenes = HeldOut(images, torch.full((10,), 3), boxes)
    assert evaluate(air, scenes).boxes == (1.0, 1.0, 1.0)
    assert evaluate(air, scenes._replace(boxes=boxes + 30)).boxes == (0.0, 0.0, 0.0)
