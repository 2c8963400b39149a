"""The optimisation step: rates, clipping, and agreement with Pyro's own."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pytest
import torch
from conftest import small_air
from pyro.infer import TraceGraph_ELBO
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from air import AIR
from air.marginal import MarginalAIR
from air.priors import AnnealedPresencePrior
from air.svi import SVI, CompiledSVI, inductor, make_optimizer


def gradients(air: AIR) -> dict[str, Tensor]:
    found = {name: p for name, p in air.named_parameters() if p.grad is not None}
    assert all(p.grad.stride() == p.stride() for p in found.values())  # fused Adam goes by memory
    assert len({p.grad.data_ptr() for p in found.values()}) == len(found)  # clipped in place
    return {name: p.grad.clone() for name, p in found.items()}


def test_each_group_gets_its_own_rate(air: AIR, images: Tensor) -> None:
    before = {name: p.detach().clone() for name, p in air.named_parameters()}
    svi = SVI(air.model, air.guide, make_optimizer(air, 0.01, 0.1), loss=TraceGraph_ELBO())
    svi.step(images, batch_size=4)
    for name, p in air.named_parameters():
        moved = (p - before[name]).abs().max().item()  # Adam's first step is the rate
        assert moved == pytest.approx(0.1 if name.startswith("bl_") else 0.01, rel=0.01), name


def test_steps_equal_those_of_pyros_svi(images: Tensor) -> None:
    ours, theirs = small_air(), small_air()
    theirs.load_state_dict(ours.state_dict())
    svi = SVI(ours.model, ours.guide, make_optimizer(ours, 0.01, 0.1), loss=TraceGraph_ELBO())
    adam = pyro.optim.Adam(lambda name: {"lr": 0.1 if "bl_" in name else 0.01})
    pyro_svi = pyro.infer.SVI(theirs.model, theirs.guide, adam, loss=TraceGraph_ELBO())
    for step in range(3):
        pyro.set_rng_seed(step)
        loss = svi.step(images, batch_size=4)
        pyro.set_rng_seed(step)
        assert loss == pytest.approx(pyro_svi.step(images, batch_size=4), rel=1e-5)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("captured", [False, True])
def test_two_models_train_side_by_side(captured: bool, images: Tensor) -> None:
    kind = partial(CompiledSVI, compiler=as_it_is) if captured else SVI
    airs = [small_air(), small_air()]
    svis = [kind(a.model, a.guide, make_optimizer(a, 0.01, 0.1), TraceGraph_ELBO()) for a in airs]
    with pyro.validation_enabled(False):
        for _ in range(3):
            for air, svi in zip(airs, svis, strict=True):
                before = [p.detach().clone() for p in air.parameters()]
                svi.step(images)
                for old, (name, new) in zip(before, air.named_parameters(), strict=True):
                    assert not torch.equal(old, new), name


@pytest.mark.parametrize("copies", [1, 50])
def test_the_gradients_norm_is_for_a_cost_per_image_before_clipping(copies: int) -> None:
    air, data = small_air(), torch.rand(4, 12, 12).repeat(copies, 1, 1)
    torch.manual_seed(2)
    TraceGraph_ELBO().loss_and_grads(air.model, air.guide, data, batch_size=4)
    norm = torch.cat(
        [p.grad.flatten() for name, p in air.named_parameters() if not name.startswith("bl_")]
    ).norm()
    air.zero_grad()
    for kind in (SVI, partial(CompiledSVI, compiler=as_it_is)):
        adam = make_optimizer(air, 1e-9, 1e-9, clip_grad_norm=0.01)
        svi = kind(air.model, air.guide, adam, TraceGraph_ELBO())
        torch.manual_seed(2)
        with pyro.validation_enabled(False):
            svi.step(data, batch_size=4)
        torch.testing.assert_close(svi.grad_norm, norm / len(data))


@pytest.mark.parametrize("copies", [1, 50])
def test_clipping_is_on_unit_scale(copies: int) -> None:
    """The bound is in nats per image: it means the same for a data set of any size."""
    air, images = small_air(), torch.rand(4, 12, 12)
    data = images.repeat(copies, 1, 1)
    bound = 0.5
    svi = SVI(air.model, air.guide, make_optimizer(air, 0.01, 0.1, bound), TraceGraph_ELBO())
    svi.step(data, batch_size=4)
    found = gradients(air)
    inference = torch.cat([g.flatten() for n, g in found.items() if not n.startswith("bl_")])
    baseline = torch.cat([g.flatten() for n, g in found.items() if n.startswith("bl_")])
    assert inference.norm().item() / len(data) == pytest.approx(bound, rel=1e-3)
    assert baseline.norm().item() / len(data) > 10 * bound


@pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")
def test_what_is_not_finite_never_reaches_the_weights(air: AIR, images: Tensor) -> None:
    """Neither loss nor gradient: the next good step is as if the bad ones had not been."""
    svi = SVI(air.model, air.guide, make_optimizer(air, 0.01, 0.1), loss=TraceGraph_ELBO())
    other = small_air()
    other.load_state_dict(air.state_dict())
    only = SVI(other.model, other.guide, make_optimizer(other, 0.01, 0.1), TraceGraph_ELBO())
    before = [p.detach().clone() for p in air.parameters()]
    with pyro.validation_enabled(False):
        air.pixels.sd = 1e-30
        assert not math.isfinite(svi.step(images))
        assert svi.skipped
        air.pixels.sd = 0.3
        hook = air.c_init.register_hook(lambda gradient: gradient * math.nan)
        assert math.isfinite(svi.step(images))
        assert svi.skipped
        hook.remove()
        assert all(torch.equal(a, b) for a, b in zip(before, air.parameters(), strict=True))
        losses = []
        for each in (svi, only):
            pyro.set_rng_seed(5)
            losses.append(each.step(images))
            assert not each.skipped
    assert losses[0] == losses[1]
    for (name, a), (_, b) in zip(air.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def as_it_is(graph: fx.GraphModule) -> Callable[..., Any]:
    return graph


def compare_with_eager(
    air: AIR,
    program: Any,  # noqa: ANN401
    data: Tensor,
    compiler: Callable[..., Any],
    rtol: float,
    **keywords: Any,  # noqa: ANN401
) -> None:
    """Loss and gradients of a few steps, from the same weights and noise, while weights change."""
    optimizer = make_optimizer(air, 0.01, 0.1)
    eager = SVI(program.model, program.guide, optimizer, TraceGraph_ELBO())
    compiled = CompiledSVI(program.model, program.guide, optimizer, TraceGraph_ELBO(), compiler)
    prior = AnnealedPresencePrior([0.5] * air.num_steps, "lin", 1e-3, 0, 10)
    for step in range(3):
        prior.set_step(step)
        losses, grads = [], []
        for svi in (eager, compiled):
            pyro.set_rng_seed(step)
            optimizer.zero_grad()
            arguments = {"z_pres_prior_p": prior, **keywords}
            losses.append(float(svi._loss_and_grads(data, (), arguments)))
            grads.append(gradients(air))
        assert losses[1] == pytest.approx(losses[0], rel=rtol)
        assert grads[0].keys() == grads[1].keys()
        for name, expected in grads[0].items():
            scale = expected.abs().max().item()
            torch.testing.assert_close(
                grads[1][name], expected, rtol=rtol, atol=10 * rtol * scale, msg=name
            )
        optimizer.step()
    assert len(compiled._compiled) == 1, "captured again"
    assert None not in compiled._compiled.values()


@pytest.mark.parametrize("estimator", ["score", "marginal"])
@pytest.mark.parametrize(
    ("num_steps", "batch_size", "options"),
    [
        (1, 3, {}), (3, None, {}), (5, 7, {}), (2, 3, {"guide_input": "difference"}),
        (2, 3, {"likelihood": "bernoulli"}),
    ],
)  # fmt: skip
def test_captured_gradients_equal_eager_ones(
    estimator: str, num_steps: int, batch_size: int | None, options: dict[str, Any]
) -> None:
    air = small_air(num_steps=num_steps, **options).double()
    program = MarginalAIR(air) if estimator == "marginal" else air
    data = torch.randint(256, (10, 12, 12), dtype=torch.uint8)
    with pyro.validation_enabled(False):
        compare_with_eager(air, program, data, as_it_is, 1e-10, batch_size=batch_size)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["score", "marginal"])
def test_compiled_gradients_equal_eager_ones(estimator: str) -> None:
    air = small_air(num_steps=1)
    program = MarginalAIR(air) if estimator == "marginal" else air
    with pyro.validation_enabled(False):
        compare_with_eager(air, program, torch.rand(10, 12, 12), inductor, 1e-4, batch_size=4)


def test_capturing_draws_no_random_numbers_and_random_numbers_advance(images: Tensor) -> None:
    """A rate of zero keeps the weights: losses differ by their noise alone."""
    runs = []
    for kind in (SVI, CompiledSVI):
        pyro.set_rng_seed(1)
        air = small_air()
        extra = {"compiler": as_it_is} if kind is CompiledSVI else {}
        optimizer = make_optimizer(air, 0.0, 0.0)
        svi = kind(air.model, air.guide, optimizer, TraceGraph_ELBO(), **extra)
        with pyro.validation_enabled(False):
            runs.append([svi.step(images, batch_size=4) for _ in range(4)])
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)
    assert len(set(runs[1])) == 4


def test_what_cannot_be_compiled_runs_uncompiled(
    air: AIR, images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(graph: fx.GraphModule) -> Callable[..., Any]:
        raise RuntimeError("no compiler\nand a long story")

    optimizer = make_optimizer(air, 0.01, 0.1)
    svi = CompiledSVI(air.model, air.guide, optimizer, TraceGraph_ELBO(), fails)
    with pyro.validation_enabled(False):
        assert len({svi.step(images) for _ in range(3)}) == 3
    assert caplog.messages == ["steps run uncompiled: RuntimeError: no compiler"]


@pytest.mark.parametrize("estimator", ["score", "marginal"])
def test_learning_curves_of_captured_and_eager_steps_agree(estimator: str) -> None:
    """At first to rounding; over 200 steps far better than the curves of two seeds.

    Where a gradient is zero but for its rounding, Adam makes a whole step of it.
    """

    def curve(kind: type[SVI], seed: int, **extra: Any) -> Tensor:  # noqa: ANN401
        pyro.set_rng_seed(0)
        air = small_air(num_steps=1).double()
        program = MarginalAIR(air) if estimator == "marginal" else air
        optimizer = make_optimizer(air, 1e-3, 1e-2, clip_grad_norm=100.0)
        svi = kind(program.model, program.guide, optimizer, TraceGraph_ELBO(), **extra)
        pyro.set_rng_seed(seed)
        with pyro.validation_enabled(False):
            return torch.tensor([svi.step(data, batch_size=8) for _ in range(200)])

    data = torch.randint(256, (40, 12, 12), dtype=torch.uint8)
    eager = curve(SVI, 1)
    captured = curve(CompiledSVI, 1, compiler=as_it_is)
    torch.testing.assert_close(captured[:5], eager[:5], rtol=1e-6, atol=0.0)
    assert (captured - eager).std() < 0.02 * (curve(SVI, 2) - eager).std()
    assert eager[-20:].mean() < eager[:20].mean()


class OffTheHost(TorchDispatchMode):
    """Refuses operations that read or make a tensor on the CPU; a GPU would wait for them."""

    def __torch_dispatch__(
        self,
        operation: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            assert not isinstance(leaf, Tensor) or leaf.device.type == "meta", operation
        return result


@pytest.mark.parametrize("estimator", ["score", "marginal"])
def test_the_program_stays_on_its_device(estimator: str) -> None:
    """Without a GPU: on torch's device without memory, where nothing can be read either."""
    air = small_air(use_baselines=estimator == "score").to("meta")
    program = MarginalAIR(air) if estimator == "marginal" else air
    data = torch.zeros(100, 12, 12, dtype=torch.uint8, device="meta")
    prior = AnnealedPresencePrior([0.5] * 3, "lin", 1e-3, 0, 10, device="meta")
    for presence in (None, prior):
        arguments = {"batch_size": 7, "z_pres_prior_p": presence}
        with pyro.validation_enabled(False), OffTheHost():
            prior.set_step(5)
            loss, surrogate_loss = TraceGraph_ELBO()._loss_and_surrogate_loss(
                program.model, program.guide, (data,), arguments
            )
            torch.autograd.grad(surrogate_loss, list(air.parameters()), allow_unused=True)
        assert loss.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("estimator", ["score", "marginal"])
def test_a_cuda_graph_takes_the_steps_that_uncompiled_ones_take(estimator: str) -> None:
    """Rates and prior change in place between replays, and random numbers advance."""
    losses, finals = [], []
    data = torch.randint(256, (40, 12, 12), dtype=torch.uint8, device="cuda")
    for kind in (SVI, CompiledSVI):
        pyro.set_rng_seed(1)
        air = small_air(num_steps=2).cuda()
        program = MarginalAIR(air) if estimator == "marginal" else air
        optimizer = make_optimizer(air, 1e-3, 1e-2, clip_grad_norm=100.0)
        prior = AnnealedPresencePrior([0.5, 0.5], "lin", 1e-3, 0, 10, "cuda")
        svi = kind(program.model, program.guide, optimizer, TraceGraph_ELBO())
        with pyro.validation_enabled(False):
            taken = []
            for step in range(10):
                prior.set_step(step)
                optimizer.param_groups[0]["lr"].fill_(1e-3 / (step + 1))
                taken.append(svi.step(data, batch_size=8, z_pres_prior_p=prior))
                assert not svi.skipped
        losses.append(taken)
        finals.append([p.detach().clone() for p in air.parameters()])
    assert len(svi._recorded) == 1, "no CUDA graph was recorded"
    assert len(set(losses[1])) == 10
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    for eager, replayed in zip(*finals, strict=True):
        torch.testing.assert_close(replayed, eager, rtol=1e-2, atol=1e-4)
