"""Objectives and estimators, against sums over all counts, traces of Pyro, and each other."""

import math
from itertools import product
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import loss_and_gradients, moved, pixels_of, small_air, values
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO
from torch import Tensor

from air import AIR
from air.evaluation.elbo import importance_weighted_bound, sample_elbo
from air.marginal import AllStepsActive, MarginalAIR, Objective, Paths, marginal, sample_paths
from air.priors import count_log_probs, geometric_presence
from air.training.objectives import OBJECTIVES, iwae, mvd, rloo, rws, vimco

PRIOR = geometric_presence(0.2, 3).__getitem__
Z = ("z_where", "z_what", "z_background", "z_tone")


def doubles(*size: int) -> Tensor:
    return torch.rand(*size, dtype=torch.float64)


def paths_by_traces(air: AIR, images: Tensor, number: int) -> Paths:
    """The paths that `sample_paths` draws from the same seed; each density is one of Pyro's traces.

    No gradient flows through z, which is given to every trace.
    """
    repeated = images.repeat_interleave(number, 0)
    with torch.no_grad():
        drawn: Any = poutine.trace(AllStepsActive()(air.guide)).get_trace(repeated)
    z = {k: v["value"] for k, v in drawn.nodes.items() if v["type"] == "sample" and k[:2] == "z_"}
    found = []
    for count in range(air.num_steps + 1):
        given = {f"z_pres_{t}": doubles(len(repeated), 1) * 0 + (t < count) for t in range(3)}
        arguments: Any = {"data": repeated, "z_pres_prior_p": PRIOR}
        guide: Any = poutine.trace(poutine.condition(air.guide, z | given)).get_trace(**arguments)
        model: Any = poutine.trace(poutine.condition(air.model, z | given)).get_trace(**arguments)
        guide.compute_log_prob()
        model.compute_log_prob()

        def total(trace: Any, *names: str) -> Any:  # noqa: ANN401
            sites = [v for v in trace.nodes.values() if v["type"] == "sample"]
            return sum(site["log_prob"] for site in sites if site["name"].startswith(names))

        found.append((total(model, "z_", "obs"), total(guide, *Z), total(guide, "z_pres")))
    parts = (torch.stack(part, 1) for part in zip(*found, strict=True))
    return Paths._make(part.view(len(images), number, -1) for part in parts)


class AIRWithTone(AIR):
    """An AIR of one's own, whose objects have a further latent."""

    def sample_object(self, t: int, z_pres: Tensor) -> tuple[Tensor, Tensor]:
        tone = dist.Normal(torch.zeros_like(z_pres), 1.0)
        pyro.sample(f"z_tone_{t}", self._masked(tone, z_pres))
        return super().sample_object(t, z_pres)

    def _guide_step(self, t: int, *args: Any) -> Any:  # noqa: ANN401
        state = super()._guide_step(t, *args)
        tone = dist.Normal(state.z_where[:, :1].tanh(), 0.5)
        pyro.sample(f"z_tone_{t}", self._masked(tone, state.z_pres))
        return state


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (AIR, {}),
        (AIR, {"guide_input": "glimpse", "channels": 3}),
        (AIR, {"background_model": "pca"}),
        (AIRWithTone, {}),
    ],
    ids=["black", "glimpse", "background", "further latents"],
)
def test_a_path_has_the_densities_of_model_and_guide(
    kind: type[AIR], options: dict[str, Any]
) -> None:
    air = small_air(**options).double()
    air.__class__, images = kind, doubles(4, *pixels_of(air))
    torch.manual_seed(5)
    ours = sample_paths(air, images, PRIOR, num_paths=2)
    torch.manual_seed(5)
    for mine, theirs in zip(ours, paths_by_traces(air, images, 2), strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.manual_seed(5)
    loss = Trace_ELBO().loss(air.model, air.guide, images, z_pres_prior_p=PRIOR)
    torch.manual_seed(5)
    assert -loss == pytest.approx(float(sample_elbo(air, images, PRIOR).elbo.sum()))


def test_reweighted_wake_sleep_follows_weighted_paths_of_each_image() -> None:
    air, images, number = small_air().double(), doubles(5, 12, 12), 3
    torch.manual_seed(2)
    loss, ours = loss_and_gradients(MarginalAIR(air, rws, number), images, z_pres_prior_p=PRIOR)

    torch.manual_seed(2)
    log_p, log_q_z, log_q = paths_by_traces(air, images, number)
    total, bound = torch.zeros(()).double(), 0.0
    for b in range(len(images)):  # plain sums over all hypotheses of an image
        hypotheses = [*product(range(number), range(4))]
        weights = [(log_p - log_q_z)[b, k, n].exp().item() for k, n in hypotheses]
        bound += math.log(sum(weights) / number)
        for (k, n), weight in zip(hypotheses, weights, strict=True):
            fit = log_p[b, k, n] + log_q_z[b, k, n] + log_q[b, k, n]
            total = total + weight / sum(weights) * fit
    (-total).backward()
    assert -loss == pytest.approx(bound)
    for name, gradient in ours.items():
        parameter = air.get_parameter(name)
        torch.testing.assert_close(gradient, parameter.grad, msg=name)


# On tensors: random weights of all counts, and presence probabilities as parameters.


def random_paths(b: int, k: int, t: int) -> tuple[Paths, Tensor, Tensor]:
    """The same K random paths for each of B images; log_p and the logits of presence are leaves."""
    torch.manual_seed(1)
    log_p = (3 * torch.randn(1, k, t + 1).double()).repeat(b, 1, 1).requires_grad_()
    logits = torch.randn(1, k, t).double().repeat(b, 1, 1).requires_grad_()
    paths = Paths(log_p, torch.randn(1, k, t + 1).double().expand(b, -1, -1),
                  count_log_probs(logits.sigmoid()))  # fmt: skip
    return paths, log_p, logits


def exact_elbo(paths: Paths) -> Tensor:
    """The mean over paths and counts of log w - log q."""
    f = paths.log_p - paths.log_q_z - paths.log_q
    return (paths.log_q.exp() * f).sum((1, 2)) / f.shape[1]


def exact_vimco(paths: Paths) -> Tensor:
    """The mean over all draws of one count for each path."""
    f, k = paths.log_p - paths.log_q_z - paths.log_q, paths.log_q.shape[1]
    total = f.new_zeros(len(f))
    for drawn in product(range(f.shape[2]), repeat=k):
        chosen = torch.stack([f[:, i, n] for i, n in enumerate(drawn)], 1)
        prob = torch.stack([paths.log_q[:, i, n] for i, n in enumerate(drawn)], 1).sum(1).exp()
        total = total + prob * chosen.exp().mean(1).log()
    return total


@pytest.mark.parametrize(
    ("objective", "exact", "k"),
    [(rloo, exact_elbo, 1), (rloo, exact_elbo, 2), (mvd, exact_elbo, 1), (mvd, exact_elbo, 2),
     (marginal, exact_elbo, 2), (vimco, exact_vimco, 2), (vimco, exact_vimco, 3)],
)  # fmt: skip
def test_estimators_are_unbiased(objective: Objective, exact: Any, k: int) -> None:  # noqa: ANN401
    """In value and gradient, by z-tests over many draws."""
    draws = 40_000
    paths, log_p, logits = random_paths(draws, k, 3)
    value, surrogate = objective(paths)
    ours = value, *torch.autograd.grad(surrogate.sum(), (log_p, logits))
    paths, log_p, logits = random_paths(1, k, 3)
    expected = exact(paths)
    theirs = expected, *torch.autograd.grad(expected.sum(), (log_p, logits))
    for mine, right in zip(ours, theirs, strict=True):
        error = mine.mean(0) - right[0]
        sd = mine.std(0) / math.sqrt(draws)
        assert (error.abs() <= 5 * sd + 1e-9).all(), (error, sd)


def test_bounds_rise_with_the_number_of_paths_and_begin_above_the_elbo() -> None:
    paths, _, _ = random_paths(1, 5, 3)

    def bound(*chosen: int) -> Tensor:
        return iwae(Paths._make(part[:, chosen] for part in paths))[0]

    assert all(bound(k) >= marginal(Paths._make(p[:, [k]] for p in paths))[0] for k in range(5))
    for number in range(2, 6):  # L_K is at least the mean of what is left without one path
        all_of_them = range(number)
        without = [bound(*(k for k in all_of_them if k != left)) for left in all_of_them]
        assert bound(*all_of_them) >= torch.stack(without).mean()


def test_with_importance_weights_the_count_follows_the_elbo_and_all_else_the_bound() -> None:
    paths, log_p, logits = random_paths(1, 2, 3)
    value, surrogate = iwae(paths)
    ours = torch.autograd.grad(surrogate.sum(), (log_p, logits))
    paths, log_p, logits = random_paths(1, 2, 3)
    bound = (log_p - paths.log_q_z).exp().sum().div(2).log()
    assert value.item() == pytest.approx(bound.item())
    torch.testing.assert_close(ours[0], *torch.autograd.grad(bound, log_p))
    torch.testing.assert_close(ours[1], *torch.autograd.grad(exact_elbo(paths).sum(), logits))


def test_the_bound_of_the_evaluation_sums_over_the_count() -> None:
    air, images = small_air().double(), doubles(40, 12, 12)
    with torch.no_grad():
        air.predict.mlp.seq[-1].bias[0] = 0.5  # an uncertain count
    torch.manual_seed(0)
    ours = importance_weighted_bound(air, images, 3, PRIOR)
    torch.manual_seed(0)
    each = [sample_paths(air, images, PRIOR).log_weights for _ in range(3)]
    torch.testing.assert_close(ours, torch.cat(each, 1).exp().sum((1, 2)).div(3).log())


@pytest.mark.parametrize("kind", ["masked", "unmasked", "count summed out"])
def test_pyros_renyi_elbo_weighs_the_particles_of_each_image(kind: str) -> None:
    air, images = small_air(use_masking=kind != "unmasked").double(), doubles(6, 12, 12)
    program = MarginalAIR(air) if kind == "count summed out" else air

    def particle() -> Tensor:
        if program is air:
            return sample_elbo(air, images, PRIOR).elbo
        return marginal(sample_paths(air, images, PRIOR))[0].detach()

    elbo = RenyiELBO(num_particles=2)
    torch.manual_seed(4)
    loss = elbo.loss(program.model, program.guide, images, z_pres_prior_p=PRIOR)
    torch.manual_seed(4)
    each = torch.stack([particle() for _ in range(2)])
    assert -loss == pytest.approx(float((each.logsumexp(0) - math.log(2)).sum()))


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=lambda each: each.__name__)
def test_pyros_own_svi_trains_by_every_objective(objective: Objective) -> None:
    pyro.clear_param_store()
    air, images = small_air(), torch.rand(8, 12, 12)
    before = values(air)
    program = MarginalAIR(air, objective, 2)
    adam = pyro.optim.Adam({"lr": 1e-3})
    svi = pyro.infer.SVI(program.model, program.guide, adam, loss=TraceGraph_ELBO())
    assert math.isfinite(svi.step(images, batch_size=4))
    names = {name for name, _ in air.named_parameters()}
    assert moved(air, before) == {name for name in names if not name.startswith("bl_")}


def test_what_is_no_objective_of_paths_is_refused() -> None:
    air, images = small_air(), torch.rand(2, 12, 12)
    for number, message in (
        (0, "at least 1, got 0"),
        (1.5, "whole number"),
        (True, "whole number"),
    ):
        with pytest.raises(ValueError, match=f"num_paths: .*{message}"):
            MarginalAIR(air, iwae, number)  # type: ignore[arg-type]
    wrong: Any = lambda paths: marginal(paths)[0]  # noqa: E731
    for objective, message in (
        (wrong, r"objective: expected a tuple of two tensors, \[2\] each"),
        (lambda paths: tuple(part.sum() for part in marginal(paths)), r"got \[\[\], \[\]\]"),
        (vimco, "num_paths: expected 2 or more with vimco"),
    ):
        program = MarginalAIR(air, objective)
        with pytest.raises(ValueError, match=message):
            TraceGraph_ELBO().loss(program.model, program.guide, images)
