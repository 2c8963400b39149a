"""Refinement: the ELBO of a hypothesis, which one wins, planted scenes, and merging."""

import itertools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import by_grid_sample, pixels_of, small_air
from pyro import poutine
from torch import Tensor, nn

from air import AIR, refinement, window_to_image
from air.inference import infer
from air.looks import WholeImage
from air.priors import count_log_probs
from air.refinement import (
    LEAST_PROB,
    SHIFT,
    TRUST,
    ZOOM,
    Hypotheses,
    closest_windows,
    merge,
    refine_scene,
    relative_residual,
)
from air.scene import Scene, paint
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


def scenes_of(
    air: AIR, where: Tensor, probs: Tensor, what: Tensor | None = None, where_sd: float = 0.05
) -> Scene:
    """Scenes on black: z_where, [B, T, 3], q(n), [B, T + 1], and z_what, [B, T, 5] or zero."""
    codes = torch.zeros(*where.shape[:2], 5).to(where) if what is None else what
    sd, black = torch.full_like(where, where_sd), where.new_zeros(len(where), *pixels_of(air))
    return Scene(probs.log(), where, sd, codes, torch.ones_like(codes), black)


def latents(air: AIR, where: Tensor, count: int) -> Scene:
    return scenes_of(air, where[None], (0.9 * torch.eye(4)[count] + 0.025)[None])


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
    image = paint(air, latents(air, truth, count)).clamp(max=1)
    found = refine_scene(air, image, latents(air, start, inferred))
    assert found.counts.tolist() == [count]
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
    found = scenes_of(air, where, probs, what)
    images = paint(air, found).clamp(max=1)
    refined = refine_scene(air, images, found)
    assert refined.counts.tolist() == [1, 2, 2, 2] * 5
    unchanged = torch.arange(20) % 4 >= 2
    for before, after in zip(found, refined, strict=True):
        assert torch.equal(before[unchanged], after[unchanged])
    swapped = probs[:2].clone()
    swapped[0, [1, 2]], swapped[1, [2, 3]] = probs[0, [2, 1]], probs[1, [3, 2]]
    torch.testing.assert_close(refined.log_q[:2].exp(), swapped)
    torch.testing.assert_close(refined.where[0, 0], windows(disc)[0])
    torch.testing.assert_close(refined.where[1, :2], windows(disc, other)[:2])
    torch.testing.assert_close(paint(air, refined)[:2], images[:2])


@pytest.mark.slow
@pytest.mark.parametrize("is_new", [True, False])
def test_the_elbo_of_a_hypothesis_is_that_of_the_model(
    is_new: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By samples of log p(x, z) - log q(z) - log p(n); Pyro computes log p(x, z) from the model."""
    monkeypatch.setattr(refinement, "NUM_STEPS", 0)
    air = small_air().requires_grad_(False)
    images, probs = torch.rand(3, 12, 12), [0.3, 0.2, 0.6]
    counts, where = torch.tensor([0, 1, 3]), torch.randn(3, 3, 3) + 2
    scene = scenes_of(air, where, torch.eye(4)[counts], torch.randn(3, 3, 5), where_sd=0.2)
    new = torch.full((3, 3), is_new)
    hypotheses = Hypotheses(torch.arange(3), counts, where, new)
    with torch.no_grad():
        noise = torch.randn(2000, 3, 8)
        elbos, found, what = refinement._fit(air, images, scene, hypotheses, noise)
    assert torch.equal(found, where)
    what_sd = scene.what_sd
    if is_new:
        windows = [
            refinement.image_to_window(where[:, t], air.window_size, air.x_size, images)
            for t in range(3)
        ]
        codes = [air.encode(window) for window in windows]
        torch.testing.assert_close(what, torch.stack([mean for mean, _ in codes], 1))
        what_sd = torch.stack([sd for _, sd in codes], 1)
    else:
        assert torch.equal(what, scene.what)
    present = (torch.arange(3) < counts[:, None]).float()
    copies = 2000  # of every image, each with noise of its own
    images, mean_where, mean_what, sd_what, present, counts = (
        part.repeat_interleave(copies, 0)
        for part in (images, where, what, what_sd, present, counts)
    )
    z_where = mean_where + 0.2 * torch.randn_like(mean_where)
    z_what = mean_what + sd_what * torch.randn_like(mean_what)
    log_q = dist.Normal(mean_where, 0.2).log_prob(z_where).sum(-1)
    log_q = log_q + dist.Normal(mean_what, sd_what).log_prob(z_what).sum(-1)
    choices = {f"z_where_{t}": z_where[:, t] for t in range(3)}
    choices |= {f"z_what_{t}": z_what[:, t] for t in range(3)}
    choices |= {f"z_pres_{t}": present[:, t : t + 1] for t in range(3)}
    trace: Any = poutine.trace(poutine.condition(air.model, choices)).get_trace(
        images, z_pres_prior_p=probs.__getitem__
    )
    trace.compute_log_prob()
    log_p = sum(site["log_prob"] for site in trace.nodes.values() if "log_prob" in site)
    log_prior = count_log_probs(torch.tensor(probs))[counts]
    expected = (log_p - (log_q * present).sum(1) - log_prior).view(3, copies).t()
    error = (2 * expected.var(0) / 2000) ** 0.5 + 1e-3 * expected.mean(0).abs()
    assert ((elbos - expected.mean(0)).abs() < 5 * error).all()


def test_the_hypothesis_of_the_highest_score_wins(air: AIR) -> None:
    found = scenes_of(air, torch.zeros(3, 3, 3), torch.eye(4)[[1, 1, 2]])
    rows, counts = torch.tensor([0, 2, 0, 2, 0]), torch.tensor([1, 2, 2, 1, 2])
    where = torch.arange(5.0)[:, None, None].expand(5, 3, 3)
    scores = torch.tensor([3.0, 9.0, 2.0, -torch.inf, 4.0])
    hypotheses = Hypotheses(rows, counts, where, torch.ones(5, 3, dtype=torch.bool))
    refined = refinement._with_winners(
        found, hypotheses, scores, where, where[..., :1].expand(5, 3, 5)
    )
    of_first = torch.tensor([-torch.inf, 3.0, 4.0, -torch.inf]).softmax(0)
    expected = torch.stack((of_first, torch.eye(4)[1], torch.eye(4)[2]))
    torch.testing.assert_close(refined.log_q.exp(), expected)
    assert refined.where[:, 0, 0].tolist() == [4.0, 0.0, 1.0]
    assert refined.what[:, 0, 0].tolist() == [4.0, 0.0, 1.0]


def test_the_guides_counts_are_trusted(air: AIR, monkeypatch: pytest.MonkeyPatch) -> None:
    """The score of a hypothesis is its ELBO, here the same for all, and TRUST log q(n)."""
    probs = torch.tensor([[0.0, 0.7, 0.3, 0.0], [0.1, 0.2, 0.3, 0.4]])
    found = scenes_of(air, torch.ones(2, 3, 3), probs)

    def fit(
        air: AIR, images: Tensor, scene: Scene, hypotheses: Hypotheses, noise: Tensor
    ) -> tuple[Tensor, ...]:
        return torch.zeros(len(images)), hypotheses.where, scene.what

    monkeypatch.setattr(refinement, "_fit", fit)
    monkeypatch.setattr(refinement, "CLOSE", 0.0)
    refined = refine_scene(air, torch.ones(2, 12, 12), found).log_q.exp()
    # A hypothesis has one object more than the guide found, one fewer, or as many.
    trusted = probs.clamp(min=LEAST_PROB) ** TRUST
    expected = trusted * torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    torch.testing.assert_close(refined, expected / expected.sum(1, keepdim=True))


def test_scenes_that_are_explained_well_stay_as_they_are(air: AIR) -> None:
    found = latents(air, TWO, 2)
    image = paint(air, found)
    assert refine_scene(air, image, found) is found
    assert relative_residual(image, image).tolist() == [0.0]
    assert relative_residual(image, torch.zeros_like(image)).tolist() == pytest.approx([1.0])


OPTIONS = [
    {}, {"likelihood": "bernoulli"}, {"channels": 3}, {"guide_input": "difference"},
    {"num_steps": 1}, {"guide_input": "glimpse"}, {"background_model": "pca"},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_kind_of_model_is_refined(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Always with the same result, without a trace in the model or the random numbers."""
    monkeypatch.setattr(refinement, "NUM_STEPS", 5)
    air = small_air(**options)
    images = torch.rand(4, *pixels_of(air))
    state = torch.get_rng_state()
    first, second = (infer(air, images, refine=True) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(map(torch.equal, first, second))
    assert all(parameter.grad is None for parameter in air.parameters())
    assert not torch.equal(first.count_probs, infer(air, images).count_probs)
    torch.testing.assert_close(first.count_probs.sum(1), torch.ones(4))
    assert torch.equal(first.counts, first.count_probs.argmax(1))
    assert len(infer(air, images[:0], refine=True).counts) == 0


@pytest.mark.parametrize("guide_input", ["image", "difference", "glimpse"])
def test_the_guides_own_answer_is_a_hypothesis(
    guide_input: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So fitting starts from codes that explain the scene as well as the guide's."""
    air, images = small_air(guide_input=guide_input), torch.rand(6, 12, 12)
    starts: list[Tensor] = []

    def fit(*arguments: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
        with monkeypatch.context() as patch:
            patch.setattr(refinement, "NUM_STEPS", 0)
            found = original(*arguments)
        starts.extend((arguments[3].rows, arguments[3].counts, *found[1:]))
        return found

    original = refinement._fit
    monkeypatch.setattr(refinement, "_fit", fit)
    infer(air, images, refine=True)
    found = infer(air, images)
    rows, counts, where, what = starts
    for i in range(6):
        same = (rows == i) & (counts == found.counts[i])
        same = same & (where == found.z_where[i]).all(-1).all(-1)
        assert (what[same] == found.z_what[i]).all(-1).all(-1).any()


# Merging, against windows that are tried one by one.


def centre_and_side(where: Tensor, size: int) -> tuple[float, float, float]:
    """The centre of a window and its side in pixels, by the box that is drawn around it."""
    x0, y0, x1, y1 = window_boxes(where[None, None], size)[0, 0].tolist()
    return (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0


def test_the_closest_windows_are_those_of_a_search_pair_by_pair() -> None:
    torch.manual_seed(0)
    where = torch.randn(40, 4, 3)
    where[..., 0] = where[..., 0].abs() + 1
    counts = torch.arange(40) % 5
    scene = scenes_of(small_air(num_steps=4), where, torch.eye(5)[counts])
    distances, pairs = closest_windows(scene)
    for i, n in enumerate(counts.tolist()):
        boxes = [centre_and_side(where[i, t], 30) for t in range(n)]
        # One side is that of the window whose scale is the mean of both.
        found = {
            (s, t): math.dist(boxes[s][:2], boxes[t][:2]) * (1 / boxes[s][2] + 1 / boxes[t][2]) / 2
            for s, t in itertools.combinations(range(n), 2)
        }
        assert float(distances[i]) == pytest.approx(min(found.values(), default=math.inf), rel=1e-4)
        assert not found or tuple(pairs[i].tolist()) == min(found, key=found.__getitem__)


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_the_best_of_all_windows_is_kept(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every window is cut out by PyTorch's own sampler and painted by itself."""
    pyro.set_rng_seed(2)
    air = small_air(**options).double().requires_grad_(False)
    images = air.likelihood.prepare(torch.rand(6, *pixels_of(air), dtype=torch.float64))
    where, what = torch.randn(6, 3, 3).double() / 3, torch.randn(6, 3, 5).double()
    where[..., 0] += 2
    counts = torch.tensor([2, 3, 3, 2, 3, 3])
    scene = scenes_of(air, where, (torch.eye(4).double() + 0.1)[counts], what)
    near, pairs = closest_windows(scene)
    assert len({tuple(pair) for pair in pairs.tolist()}) > 1
    bounds = {name: getattr(refinement, name) for name in ("CLOSE", "ONE_OBJECT", "WORSE")}
    for name in bounds:
        monkeypatch.setattr(refinement, name, math.inf)
    merged = merge(air, images, scene)
    residuals = []  # of one and of both, where what the others leave counts as 1
    for i, (n, (first, second)) in enumerate(zip(counts.tolist(), pairs.tolist(), strict=True)):
        middle = sum(-where[i, t, 1:] / where[i, t, 0] for t in (first, second)) / 2
        scale = (where[i, first, 0] + where[i, second, 0]) / 2
        others = [(where[i, t], what[i, t]) for t in range(n) if t not in (first, second)]
        both = [(where[i, t], what[i, t]) for t in (first, second)]
        behind = canvas_of(air, others)
        left = (images[i] - behind).square().sum()
        tried = []
        for zoom, dx, dy in itertools.product((ZOOM, (1 + ZOOM) / 2, 1), *[(-SHIFT, 0, SHIFT)] * 2):
            centre, s = middle + torch.tensor([dx, dy]) / scale, zoom * scale
            window = torch.cat((s[None], -centre * s))
            seen = images[i] if isinstance(air.look, WholeImage) else images[i] - behind
            cut = by_grid_sample(seen[None], 1 / s[None, None], centre[None], 7)
            code = air.encode(cut.flatten(1))[0][0]
            canvas = canvas_of(air, [*others, (window, code)])
            tried.append((float((images[i] - canvas).square().sum()), window, code))
        error, window, code = min(tried, key=lambda each: each[0])
        of_both = (images[i] - canvas_of(air, [*others, *both])).square().sum()
        residuals.append([error / float(left), float(of_both / left)])
        expected = [(window, code) if t == first else (where[i, t], what[i, t]) for t in range(n)]
        expected[second] = expected[-1]
        for t, (w, z) in enumerate(expected[:-1]):
            torch.testing.assert_close(merged.where[i, t], w)
            torch.testing.assert_close(merged.what[i, t], z)
    assert torch.equal(merged.counts, counts - 1)

    one, two = torch.tensor(residuals).unbind(1)
    conditions = {"CLOSE": near, "ONE_OBJECT": one, "WORSE": one - two}
    for name, values in conditions.items():  # each bound alone decides, over half of the scenes
        middle = values.sort().values[2:4].mean()
        with monkeypatch.context() as patch:
            patch.setattr(refinement, name, float(middle))
            again = merge(air, images, scene)
        are_one = values < middle
        assert torch.equal(again.counts, counts - are_one.long())
        for mine, if_one, if_not in zip(again, merged, scene, strict=True):
            assert torch.equal(mine[are_one], if_one[are_one])
            assert torch.equal(mine[~are_one], if_not[~are_one])


def canvas_of(air: AIR, objects: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The canvas of one scene."""
    canvas = torch.zeros(1, *pixels_of(air), dtype=torch.float64)
    for where, what in objects:
        painted = window_to_image(where[None], 7, 12, air.decode(what[None]))
        canvas = air.likelihood.add(canvas, painted.view_as(canvas))
    return canvas[0]
