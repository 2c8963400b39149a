"""Refinement: the ELBO of a hypothesis, which one wins, and what is found in planted scenes."""

from typing import Any

import pyro.distributions as dist
import pytest
import torch
from helpers import small_air
from pyro import poutine
from torch import Tensor, nn

from air import AIR, refinement
from air.inference import infer
from air.merging import paint_scenes, relative_residual
from air.priors import count_log_probs
from air.refinement import LEAST_PROB, TRUST, Hypotheses, SceneLatents, refine_scenes
from air.spatial_transformer import window_boxes


class Disc(nn.Module):
    """Paints the same disc for every code."""

    def __init__(self, side: int) -> None:
        super().__init__()
        centres = (2 * torch.arange(side) + 1) / side - 1
        radius = (centres**2 + centres[:, None] ** 2).sqrt()
        self.register_buffer("disc", torch.sigmoid(12 * (0.8 - radius)).flatten())

    def forward(self, code: Tensor) -> Tensor:
        return self.disc.expand(len(code), -1)


def windows(*places: tuple[float, float, float]) -> Tensor:
    """z_where of windows at (scale, x, y), x and y in [-1, 1], padded to three, [3, 3]."""
    where = [[s, -x * s, -y * s] for s, x, y in places] + [[3.0, 0.0, 0.0]] * (3 - len(places))
    return torch.tensor(where)


def latents(air: AIR, where: Tensor, count: int) -> SceneLatents:
    probs = (0.9 * torch.eye(4)[count] + 0.025)[None]  # not quite certain
    return SceneLatents(probs, where[None], torch.zeros(1, 3, 5), torch.full((1, 3, 3), 0.05))


ONE = windows((3, 0.2, -0.1))
TWO = windows((3, -0.3, 0), (3, 0.3, 0))


@pytest.mark.parametrize(
    ("truth", "count", "start", "inferred"),
    [
        (TWO, 2, windows((1.8, 0, 0)), 1),  # one window over both
        (TWO, 2, windows((3, -0.3, 0)), 1),  # one that is missed
        (ONE, 1, windows((3, 0.1, -0.1), (3, 0.4, -0.1)), 2),  # one counted as two
        (ONE, 1, windows((3, -0.5, 0.5)), 1),  # one where there is none
    ],
)
def test_planted_discs_are_found(truth: Tensor, count: int, start: Tensor, inferred: int) -> None:
    air = AIR(
        num_steps=3, x_size=20, window_size=8, z_what_size=5, rnn_hidden_size=11, encoder_net=[9],
        decoder_net=[8], predict_net=[6], use_baselines=False, decode=Disc(8),
    )  # fmt: skip
    image = paint_scenes(air, truth[None], torch.zeros(1, 3, 5), torch.tensor([count])).clamp(max=1)
    found = refine_scenes(air, image, latents(air, start, inferred))
    assert int(found.count_probs.argmax()) == count
    expected, boxes = (window_boxes(where[:count], 20) for where in (truth, found.where[0]))
    distances = (boxes[:, None] - expected).abs().amax(-1)  # of every pair, in pixels
    assert (distances.amin(0) < 1.5).all()


class Halves(Disc):
    """Paints the left half of a disc for codes below zero, the right for those above, and all."""

    def forward(self, code: Tensor) -> Tensor:
        side = torch.arange(self.disc.numel()) % int(self.disc.numel() ** 0.5) * 2
        left = side < self.disc.numel() ** 0.5
        sign = code[:, :1]
        return self.disc * torch.where(sign < 0, left, torch.where(sign > 0, ~left, True))


class Whole(nn.Module):
    """Sees a whole disc under every window."""

    def forward(self, window: Tensor) -> tuple[Tensor, Tensor]:
        return window.new_zeros(len(window), 5), window.new_ones(len(window), 5)


def test_two_halves_of_one_object_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside another object; real pairs stay, be they close or not; in several parts."""
    monkeypatch.setattr(refinement, "_fit", None)  # all scenes are explained well
    air = AIR(
        num_steps=3, x_size=20, window_size=8, z_what_size=5, rnn_hidden_size=11, encode=Whole(),
        decode=Halves(8), predict_net=[6], use_baselines=False,
    )  # fmt: skip
    disc, other = (3, 0.2, -0.1), (3, -0.6, 0.6)
    scenes = [
        (windows(disc, disc), [-1.0, 1.0, 0.0], 2),
        (windows(disc, other, disc), [1.0, 0.0, -1.0], 3),
        (windows((3, -0.24, 0), (3, 0.24, 0)), [0.0, 0.0, 0.0], 2),
        (windows((3, -0.4, 0), (3, 0.4, 0)), [0.0, 0.0, 0.0], 2),
    ] * 5
    where, counts = torch.stack([w for w, _, _ in scenes]), torch.tensor([n for _, _, n in scenes])
    what = torch.tensor([signs for _, signs, _ in scenes])[..., None].expand(-1, -1, 5)
    probs = (0.8 * torch.eye(4) + torch.tensor([0.02, 0.03, 0.05, 0.1]))[counts]
    images = paint_scenes(air, where, what, counts).clamp(max=1)
    found = SceneLatents(probs, where, what, torch.full((20, 3, 3), 0.05))
    refined = refine_scenes(air, images, found)
    assert refined.count_probs.argmax(1).tolist() == [1, 2, 2, 2] * 5
    unchanged = torch.arange(20) % 4 >= 2
    for before, after in zip(found, refined, strict=True):
        assert torch.equal(before[unchanged], after[unchanged])
    swapped = probs[:2].clone()
    swapped[0, [1, 2]], swapped[1, [2, 3]] = probs[0, [2, 1]], probs[1, [3, 2]]
    torch.testing.assert_close(refined.count_probs[:2], swapped)
    torch.testing.assert_close(refined.where[0, 0], windows(disc)[0])
    torch.testing.assert_close(refined.where[1, :2], windows(disc, other)[:2])
    canvas = paint_scenes(air, refined.where, refined.what, refined.count_probs.argmax(1))
    torch.testing.assert_close(canvas[:2], images[:2])


def test_the_elbo_of_a_hypothesis_is_that_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """By samples of log p(x, z) - log q(z) - log p(n); Pyro computes log p(x, z) from the model."""
    monkeypatch.setattr(refinement, "NUM_STEPS", 0)
    monkeypatch.setattr(refinement, "SAMPLES", 2000)
    air = small_air().requires_grad_(False)
    images, probs = torch.rand(3, 12, 12), [0.3, 0.2, 0.6]
    hypotheses = Hypotheses(torch.arange(3), torch.tensor([0, 1, 3]), torch.randn(3, 3, 3) + 2)
    sd = torch.tensor([0.1, 0.2, 0.3])
    with torch.no_grad():
        elbos, where, what = refinement._fit(air, images, hypotheses, sd)
    windows = [
        refinement.image_to_window(where[:, t], air.window_size, air.x_size, images)
        for t in range(3)
    ]
    what_sd = torch.stack([air.encode(window)[1] for window in windows], 1)
    present = (torch.arange(3) < hypotheses.counts[:, None]).float()
    samples = []
    for _ in range(2000):
        z = {
            "where": where + sd * torch.randn(3, 3, 3),
            "what": what + what_sd * torch.randn(3, 3, 5),
        }
        log_q = dist.Normal(where, sd).log_prob(z["where"]).sum(-1)
        log_q = log_q + dist.Normal(what, what_sd).log_prob(z["what"]).sum(-1)
        choices = {f"z_{name}_{t}": z[name][:, t] for name in z for t in range(3)}
        choices |= {f"z_pres_{t}": present[:, t : t + 1] for t in range(3)}
        trace: Any = poutine.trace(poutine.condition(air.model, choices)).get_trace(
            images, z_pres_prior_p=probs.__getitem__
        )
        trace.compute_log_prob()
        log_p = sum(site["log_prob"] for site in trace.nodes.values() if "log_prob" in site)
        samples.append(log_p - (log_q * present).sum(1))
    expected = torch.stack(samples) - count_log_probs(torch.tensor(probs))[hypotheses.counts]
    error = expected.std(0) / 2000**0.5 + 1e-3 * expected.mean(0).abs()
    assert ((elbos - expected.mean(0)).abs() < 5 * error).all()


def test_the_hypothesis_of_the_highest_score_wins() -> None:
    found = SceneLatents(
        torch.eye(4)[[1, 1, 2]], torch.zeros(3, 3, 3), torch.zeros(3, 3, 5), torch.ones(3, 3, 3)
    )
    scenes, counts = torch.tensor([0, 2, 0, 2, 0]), torch.tensor([1, 2, 2, 1, 2])
    where = torch.arange(5.0)[:, None, None].expand(5, 3, 3)
    scores = torch.tensor([3.0, 9.0, 2.0, -torch.inf, 4.0])
    hypotheses = Hypotheses(scenes, counts, where)
    refined = refinement._with_winners(
        found, hypotheses, scores, where, where[..., :1].expand(5, 3, 5)
    )
    of_first = torch.tensor([-torch.inf, 3.0, 4.0, -torch.inf]).softmax(0)
    expected = torch.stack((of_first, torch.eye(4)[1], torch.eye(4)[2]))
    torch.testing.assert_close(refined.count_probs, expected)
    assert refined.where[:, 0, 0].tolist() == [4.0, 0.0, 1.0]
    assert refined.what[:, 0, 0].tolist() == [4.0, 0.0, 1.0]


def test_the_guides_counts_are_trusted(air: AIR, monkeypatch: pytest.MonkeyPatch) -> None:
    """The score of a hypothesis is its ELBO, here the same for all, and TRUST log q(n)."""
    probs = torch.tensor([[0.0, 0.7, 0.3, 0.0], [0.1, 0.2, 0.3, 0.4]])
    found = SceneLatents(probs, torch.ones(2, 3, 3), torch.zeros(2, 3, 5), torch.ones(2, 3, 3))

    def fit(air: AIR, images: Tensor, k: Hypotheses, where_sd: Tensor) -> tuple[Tensor, ...]:
        return torch.zeros(len(images)), k.where, found.what[k.scenes]

    monkeypatch.setattr(refinement, "_fit", fit)
    refined = refine_scenes(air, torch.ones(2, 12, 12), found).count_probs
    # A hypothesis has one object more than the guide found, one fewer, or as many.
    trusted = probs.clamp(min=LEAST_PROB) ** TRUST
    expected = trusted * torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    torch.testing.assert_close(refined, expected / expected.sum(1, keepdim=True))


def test_scenes_that_are_explained_well_stay_as_they_are(air: AIR) -> None:
    found = latents(air, TWO, 2)
    image = paint_scenes(air, found.where, found.what, torch.tensor([2]))
    assert refine_scenes(air, image, found) is found
    assert relative_residual(image, image).tolist() == [0.0]
    assert relative_residual(image, torch.zeros_like(image)).tolist() == pytest.approx([1.0])


@pytest.mark.parametrize(
    "options",
    [
        {}, {"likelihood": "bernoulli"}, {"channels": 3}, {"guide_input": "difference"},
        {"num_steps": 1}, {"guide_input": "glimpse"},
    ],
)  # fmt: skip
def test_every_kind_of_model_is_refined(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Always with the same result, without a trace in the model or the random numbers."""
    monkeypatch.setattr(refinement, "NUM_STEPS", 5)
    air = small_air(**options)
    images = torch.rand(4, *([3] if air.channels > 1 else []), 12, 12)
    state = torch.get_rng_state()
    first, second = (infer(air, images, refine=True) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(map(torch.equal, first, second))
    assert all(parameter.grad is None for parameter in air.parameters())
    assert not torch.equal(first.count_probs, infer(air, images).count_probs)
    torch.testing.assert_close(first.count_probs.sum(1), torch.ones(4))
    assert torch.equal(first.counts, first.count_probs.argmax(1))
    assert len(infer(air, images[:0], refine=True).counts) == 0
