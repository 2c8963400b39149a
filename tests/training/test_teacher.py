"""Sums of scenes, and the term that teaches their counts, against other computations."""

import math
from typing import Any

import pyro
import pytest
import torch
from helpers import loss_and_gradients, make_svi, pixels_of, small_air
from pyro import poutine
from pyro.infer import TraceGraph_ELBO
from torch import Tensor

from air import AIR, refinement
from air.inference import infer
from air.marginal import MarginalAIR
from air.refinement import closest_windows, merge, relative_residual
from air.scene import infer_scene, paint
from air.training import teacher
from air.training.known_objects import KnownObjects
from air.training.teacher import BATCH_PER_MERGED, DECAY, Teacher, infer_objects

WEIGHT = 7.0


def of_counts(where: Tensor, counts: list[int], valid: list[bool] | None = None) -> KnownObjects:
    """So many objects at the first of these windows, [B, T, 3]."""
    present = (torch.arange(where.shape[1]) < torch.tensor(counts)[:, None]).to(where)
    return KnownObjects(present, where, torch.tensor(valid or [True] * len(counts)))


def log_q_by_hand(air: AIR, images: Tensor, known: KnownObjects) -> Tensor:
    """log q(n | x, z), [B], with z_where as given and z_what drawn, by Pyro's own handlers."""
    steps = range(air.num_steps)
    values = {f"z_where_{t}": known.where[:, t] for t in steps}
    values |= {f"z_pres_{t}": known.present[:, t, None] for t in steps}
    trace: Any = poutine.trace(poutine.condition(air.guide, values)).get_trace(images)
    trace.compute_log_prob(lambda name, site: name.startswith("z_pres"))
    return sum(trace.nodes[f"z_pres_{t}"]["log_prob"] for t in steps)


@pytest.mark.parametrize(
    "options", [{}, {"guide_input": "difference"}, {"embed_channels": [2], "channels": 3}], ids=str
)
def test_the_gradient_is_that_of_log_q_and_the_loss_is_unchanged(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pyro.set_rng_seed(3)
    air = small_air(use_baselines=False, **options).double()
    images, others = torch.rand(2, 8, *pixels_of(air), dtype=torch.float64)
    same = torch.randn(4, 1, 3, dtype=torch.float64).expand(-1, air.num_steps, -1)  # in any order
    known = of_counts(same + torch.tensor([3.0, 0, 0]), [2, 1, 3, 2], [True, False, True, True])
    made = others[:4], known
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
        term.weight = weight
        return loss_and_gradients(MarginalAIR(air, count_term=spy), images, num_images=80)

    (plain, without), (taught, with_term) = loss_and_grads(0.0), loss_and_grads(WEIGHT)
    assert taught == pytest.approx(plain, rel=1e-12)

    torch.set_rng_state(found["state"])
    of_made = log_q_by_hand(air, *made)[known.sure].sum()
    pyro.set_rng_seed(5)
    air.zero_grad()
    program = MarginalAIR(air, count_term=lambda images, log_q, size: found.update(log_q=log_q))
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


@pytest.mark.parametrize(
    "options", [{}, {"guide_input": "difference"}, {"likelihood": "bernoulli"}]
)
def test_counts_are_those_of_inference(options: dict[str, Any]) -> None:
    pyro.set_rng_seed(1)
    air = small_air(**options)
    images = air.likelihood.prepare(torch.rand(20, 12, 12))
    state = torch.get_rng_state()
    known, _ = infer_objects(air, images)
    assert torch.equal(torch.get_rng_state(), state), "random numbers were drawn"
    found = infer(air, images)
    assert torch.equal(known.counts, found.counts)
    residual = relative_residual(images, found.reconstructions)
    assert torch.equal(known.sure, residual < teacher.BADLY_EXPLAINED)


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
    known, _ = infer_objects(air, images)
    assert torch.equal(known.counts, expected)
    assert torch.equal(known.sure, residual < bound)


def test_the_teacher_leaves_pyros_store_to_the_model() -> None:
    air = small_air()
    term = Teacher(air, WEIGHT)
    program = MarginalAIR(air, count_term=term)
    term.follow(decay=0)
    TraceGraph_ELBO().loss_and_grads(program.model, program.guide, torch.rand(4, 12, 12))
    stored = dict(pyro.get_param_store().named_parameters())
    assert {name: id(p) for name, p in stored.items()} == {
        name: id(p) for name, p in air.named_parameters()
    }


def test_models_with_teachers_train_side_by_side() -> None:
    for _ in range(2):
        air = small_air(use_baselines=False)
        program = MarginalAIR(air, count_term=Teacher(air, WEIGHT))
        make_svi(program).step(torch.rand(4, 12, 12))
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
