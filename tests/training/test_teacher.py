"""Sums of scenes, and the term that teaches their counts, against other computations."""

import math
from typing import Any

import pyro
import pytest
import torch
from helpers import gradients, small_air
from pyro import poutine
from pyro.infer import TraceGraph_ELBO
from torch import Tensor

from air import AIR, refinement
from air.inference import infer
from air.marginal import MarginalAIR
from air.refinement import BADLY_EXPLAINED, closest_windows, merge, relative_residual
from air.scene import infer_scene, paint
from air.training import teacher
from air.training.svi import SVI, make_optimizer
from air.training.teacher import (
    BATCH_PER_MERGED,
    BATCH_PER_SUM,
    DECAY,
    Counted,
    Sums,
    Teacher,
    infer_counts,
    make_sums,
)

WEIGHT = 7.0


def dots(*places: tuple[int, int], size: int = 12) -> Tensor:
    """A scene with a bright pixel at each place, [H, H]."""
    scene = torch.zeros(size, size)
    for y, x in places:
        scene[y, x] += 0.8
    return scene


def make(air: AIR, images: Tensor, counts: list[int], unexplained: tuple[int, ...] = ()) -> Sums:
    explained = torch.ones(len(images), dtype=torch.bool)
    explained[[*unexplained]] = False
    return make_sums(air, images, Counted(torch.tensor(counts), explained, images))


@pytest.mark.parametrize("likelihood", ["normal", "bernoulli"])
def test_made_scenes_are_sums_of_two_scenes_and_of_their_counts(likelihood: str) -> None:
    torch.manual_seed(0)
    air = small_air(num_steps=4, likelihood=likelihood)
    counts = torch.randint(0, 4, (40,)).tolist()
    images = torch.stack([dots(*torch.randint(12, (n, 2)).tolist()) for n in counts]).clamp(max=0.8)
    images = air.likelihood.prepare(images)
    unexplained = tuple(range(0, 40, 5))
    made = make(air, images, counts, unexplained)
    assert len(made.images) == 40 // BATCH_PER_SUM
    assert made.valid.all()
    for image, count in zip(made.images, made.counts.tolist(), strict=True):
        pairs = [
            (i, j)
            for i in range(40)
            for j in range(40)
            if i != j and torch.equal(air.likelihood.add(images[i], images[j]), image)
        ]
        assert pairs
        assert any(
            counts[i] + counts[j] == count and counts[i] * counts[j] > 0
            for i, j in pairs
            if i not in unexplained and j not in unexplained
        )
        assert count <= 3
        assert image.max() <= 1


def test_scenes_that_cannot_be_added_are_not_valid() -> None:
    air = small_air()
    apart = torch.stack([dots((1, i)) for i in range(8)])
    assert make(air, apart, [1, 1, 1, 1, 2, 2, 2, 2]).valid.any()
    assert not make(air, apart, [1] * 8).valid.any(), "no scene of the batch has two objects"
    assert not make(air, apart, [0, 2] * 4).valid.any(), "too many objects, or an empty scene"
    many = torch.stack([dots((i // 12, i % 12)) for i in range(60)])
    assert not make(air, many, [1] * 58 + [2] * 2).valid.any(), "hardly any scene has two objects"
    same = dots((3, 3)).expand(8, 12, 12)
    assert not make(air, same, [1, 1, 1, 1, 1, 1, 1, 2]).valid.any(), "intensities above one"
    assert not make(air, apart, [1, 1, 1, 1, 2, 2, 2, 2], tuple(range(8))).valid.any()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_small_batches_make_a_scene_or_none(n: int) -> None:
    images = torch.stack([dots((1, i)) for i in range(n)])
    for likelihood in ("normal", "bernoulli"):
        air = small_air(likelihood=likelihood)
        made = make(air, air.likelihood.prepare(images), [*[1] * (n - 1), 2])
        assert made.images.shape == (1, 12, 12)
        assert made.valid.any() == (n == 3)
        assert not made.valid.any() or (made.images > 0.4).sum() == 2, "added to itself"
        assert not make(air, images, [1] * n).valid.any()


def log_q_by_hand(air: AIR, images: Tensor, counts: Tensor) -> Tensor:
    """log q(n = counts | x, z), [B], with z drawn and then held fast, by Pyro's own handlers."""
    with AllOn():
        drawn: Any = poutine.trace(air.guide).get_trace(images)
    values = {
        name: site["value"].detach()
        for name, site in drawn.nodes.items()
        if name.startswith(("z_where", "z_what"))
    }
    values |= {f"z_pres_{t}": (counts > t)[:, None].to(images) for t in range(air.num_steps)}
    trace: Any = poutine.trace(poutine.condition(air.guide, values)).get_trace(images)
    trace.compute_log_prob(lambda name, site: name.startswith("z_pres"))
    return sum(trace.nodes[f"z_pres_{t}"]["log_prob"] for t in range(air.num_steps))


class AllOn(poutine.messenger.Messenger):
    """Every z_pres is one."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"].startswith("z_pres"):
            msg["value"], msg["done"] = torch.ones_like(msg["fn"].mean), True


@pytest.mark.parametrize(
    "options",
    [{}, {"guide_input": "difference"}, {"embed_channels": [2], "channels": 3}],
    ids=str,
)
def test_the_gradient_is_that_of_log_q_and_the_loss_is_unchanged(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pyro.set_rng_seed(3)
    air = small_air(use_baselines=False, **options).double()
    shape = (12, 12) if air.channels == 1 else (air.channels, 12, 12)
    images, others = torch.rand(2, 8, *shape, dtype=torch.float64)
    valid = torch.tensor([True, False, True, True])
    made = Sums(others[:4], torch.tensor([2, 1, 3, 2]), valid)
    monkeypatch.setattr("air.training.teacher.make_sums", lambda *_: made)
    term = Teacher(air, WEIGHT)
    with torch.no_grad():  # so that the teacher infers other counts than the model
        term.air.predict.mlp.seq[-1].bias[0] += 3
    found: dict[str, Any] = {}

    def spy(images: Tensor, log_q: Tensor, size: int) -> None:
        found.update(log_q=log_q, size=size, state=torch.get_rng_state())
        term(images, log_q, size)

    def loss_and_grads(weight: float) -> tuple[float, dict[str, Tensor]]:
        pyro.set_rng_seed(5)
        air.zero_grad()
        term.weight = weight
        program = MarginalAIR(air, spy)
        loss = TraceGraph_ELBO().loss_and_grads(program.model, program.guide, images, num_images=80)
        return loss, gradients(air)

    (plain, without), (taught, with_term) = loss_and_grads(0.0), loss_and_grads(WEIGHT)
    assert taught == pytest.approx(plain, rel=1e-12)

    torch.set_rng_state(found["state"])
    of_made = log_q_by_hand(air, made.images, made.counts)[valid].sum()
    pyro.set_rng_seed(5)
    air.zero_grad()
    program = MarginalAIR(air, lambda images, log_q, size: found.update(log_q=log_q))
    trace: Any = poutine.trace(program.guide).get_trace(images, num_images=80)
    poutine.trace(poutine.replay(program.model, trace)).get_trace(images, num_images=80)
    counts = infer(term.air, images).counts
    assert (counts != found["log_q"].argmax(1)).any()
    of_batch = found["log_q"].gather(1, counts[:, None]).sum()
    ((of_batch + of_made) / (8 + 3)).backward()
    assert found["size"] == 80
    changed = []
    for name, parameter in air.named_parameters():
        if name in with_term:
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            expected = without[name] - WEIGHT * 80 * own
            torch.testing.assert_close(with_term[name], expected, msg=name)
            changed += [name] if own.any() else []
    assert {name.split(".")[0] for name in changed} >= {"rnn", "predict"}


@pytest.mark.slow
def test_teaching_raises_the_probability_of_the_sums() -> None:
    pyro.set_rng_seed(0)
    air = small_air(use_baselines=False)
    made = Sums(torch.rand(4, 12, 12), torch.full((4,), 2), torch.ones(4, dtype=torch.bool))
    optimizer = make_optimizer(air, 0.01, 0.01)
    term = Teacher(air, 100)
    program = MarginalAIR(air, term)
    svi = SVI(program.model, program.guide, optimizer, TraceGraph_ELBO())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("air.training.teacher.make_sums", lambda *_: made)
        before = log_q_by_hand(air, made.images, made.counts).mean()
        for _ in range(30):
            svi.step(torch.zeros(4, 12, 12))
    assert log_q_by_hand(air, made.images, made.counts).mean() > before + 0.3


@pytest.mark.parametrize(
    "options", [{}, {"guide_input": "difference"}, {"likelihood": "bernoulli"}]
)
def test_counts_are_those_of_inference(options: dict[str, Any]) -> None:
    pyro.set_rng_seed(1)
    air = small_air(**options)
    images = air.likelihood.prepare(torch.rand(20, 12, 12))
    state = torch.get_rng_state()
    counts, explained, _ = infer_counts(air, images)
    assert torch.equal(torch.get_rng_state(), state), "random numbers were drawn"
    found = infer(air, images)
    assert torch.equal(counts, found.counts)
    residual = relative_residual(images, found.reconstructions)
    assert torch.equal(explained, residual < BADLY_EXPLAINED)


def test_two_objects_that_are_one_count_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With bounds that some of the closest two objects meet, and some do not."""
    pyro.set_rng_seed(1)
    air, images = small_air().requires_grad_(False), torch.rand(5 * BATCH_PER_MERGED, 12, 12)
    air.predict.mlp.seq[-1].bias[0] += 3  # all steps are used
    found = infer(air, images)
    scene = infer_scene(air, images)
    near, _ = closest_windows(scene)
    closest = near.argsort()[:5]
    monkeypatch.setattr(refinement, "ONE_OBJECT", math.inf)
    monkeypatch.setattr(refinement, "WORSE", math.inf)
    monkeypatch.setattr(refinement, "CLOSE", float(near[closest].median()) + 1e-6)
    merged = merge(air, images, scene)
    one = closest[(merged.counts < scene.counts)[closest]]
    assert len(one) == 3
    expected, residual = found.counts.clone(), relative_residual(images, found.reconstructions)
    expected[one] -= 1
    before, after = residual[one], relative_residual(images, paint(air, merged))[one]
    residual[one] = after
    bound = float((before + after)[0] / 2)  # between both for one of the scenes
    monkeypatch.setattr(teacher, "BADLY_EXPLAINED", bound)
    assert ((before < bound) != (after < bound)).any()
    counts, explained, _ = infer_counts(air, images)
    assert torch.equal(counts, expected)
    assert torch.equal(explained, residual < bound)


def test_the_teacher_leaves_pyros_store_to_the_model() -> None:
    air = small_air()
    term = Teacher(air, WEIGHT)
    program = MarginalAIR(air, term)
    term.follow(decay=0)
    TraceGraph_ELBO().loss_and_grads(program.model, program.guide, torch.rand(4, 12, 12))
    stored = dict(pyro.get_param_store().named_parameters())
    assert {name: id(p) for name, p in stored.items()} == {
        name: id(p) for name, p in air.named_parameters()
    }


def test_models_with_teachers_train_side_by_side() -> None:
    for _ in range(2):
        air = small_air(use_baselines=False)
        program = MarginalAIR(air, Teacher(air, WEIGHT))
        svi = SVI(program.model, program.guide, make_optimizer(air, 0.01, 0.01), TraceGraph_ELBO())
        svi.step(torch.rand(4, 12, 12))
        assert not pyro.get_param_store().keys()


def test_the_teacher_is_a_running_mean_of_the_weights() -> None:
    air = small_air()
    term = Teacher(air, WEIGHT)
    means = {name: p.detach().clone() for name, p in air.named_parameters()}
    for _ in range(3):
        with torch.no_grad():
            for name, parameter in air.named_parameters():
                parameter += torch.randn_like(parameter)
                means[name] = DECAY * means[name] + (1 - DECAY) * parameter
        term.follow()
    for name, parameter in term.air.named_parameters():
        if not name.startswith("bl_"):
            torch.testing.assert_close(parameter.detach(), means[name], msg=name)
    term.follow(decay=0)
    for name, parameter in term.air.named_parameters():
        assert name.startswith("bl_") or torch.equal(parameter, dict(air.named_parameters())[name])
