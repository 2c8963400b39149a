"""The captured and compiled step: the numbers of the eager one, on its device."""

import gc
import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import pyro
import pytest
import torch
from helpers import SETTINGS, as_rank, capture_only, gradients, make_svi, pixels_of, small_air
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from air import AIR
from air.evaluation.elbo import sample_elbo
from air.evaluation.metrics import HeldOut
from air.inference import infer
from air.marginal import MarginalAIR, Objective
from air.priors import CountPrior
from air.support.subsampling import draw_indices
from air.training.compiled_svi import CompiledSVI, inductor
from air.training.objectives import mvd, rws, vimco
from air.training.teacher import Teacher
from air.training.trainer import Trainer


def compare_with_eager(
    air: AIR,
    program: Any,  # noqa: ANN401
    data: Tensor,
    compiler: Callable[..., Any],
    rtol: float,
    **keywords: Any,  # noqa: ANN401
) -> None:
    """Loss and gradients of a few steps, from the same weights and noise, while weights change.

    So does the prior.
    """
    eager = make_svi(program, (0.01, 0.1))
    arguments = program.model, program.guide, eager.optim, eager.loss
    compiled = CompiledSVI(*arguments, compiler)
    prior = CountPrior([0.5] * air.num_steps, "lin", 1e-3, 0, 10)
    for step in range(3):
        prior.set_step(step)
        losses, grads = [], []
        for svi in (eager, compiled):
            pyro.set_rng_seed(step)
            eager.optim.zero_grad()
            arguments = {"z_pres_prior_p": prior, **keywords}
            losses.append(float(svi._before_sum(data, (), arguments).loss))
            grads.append(gradients(air))
        assert losses[1] == pytest.approx(losses[0], rel=rtol)
        assert grads[0].keys() == grads[1].keys()
        for name, expected in grads[0].items():
            scale = expected.abs().max().item()
            torch.testing.assert_close(
                grads[1][name], expected, rtol=rtol, atol=10 * rtol * scale, msg=name
            )
        eager.optim.step()
    assert len(compiled._compiled) == 1, "captured again"
    assert None not in compiled._compiled.values()


CASES: list[tuple[int, int | None, dict[str, Any]]] = [  # number of steps, batch size, options
    (1, 3, {}),
    (2, None, {"likelihood": "bernoulli", "embed_channels": [3, 2], "embed_net": [5]}),
    (2, 7, {"guide_input": "difference"}),
    (2, 3, {"guide_input": "glimpse", "background_model": "pca"}),
]


@pytest.mark.parametrize(
    ("estimator", "num_steps", "batch_size", "options"),
    [
        *((estimator, *CASES[0]) for estimator in ("score", "marginal")),
        *(
            pytest.param(estimator, *case, marks=pytest.mark.slow)
            for estimator in ("score", "marginal")
            for case in CASES[1:]
        ),
        pytest.param("teacher", 2, 9, {"use_baselines": False}, marks=pytest.mark.slow),
        *(
            pytest.param(objective, 2, 3, {"use_baselines": False}, marks=pytest.mark.slow)
            for objective in (mvd, vimco, rws)
        ),
    ],
)
def test_captured_gradients_equal_eager_ones(
    estimator: str | Objective, num_steps: int, batch_size: int | None, options: dict[str, Any]
) -> None:
    air = small_air(num_steps=num_steps, **options).double()
    program: AIR | MarginalAIR = air
    if callable(estimator):
        program = MarginalAIR(air, estimator, 2)
    elif estimator != "score":
        teacher = Teacher(air, 10.0) if estimator == "teacher" else None
        program = MarginalAIR(air, count_term=teacher)
    data = torch.randint(256, (10, 12, 12), dtype=torch.uint8)
    with pyro.validation_enabled(False):
        compare_with_eager(air, program, data, capture_only, 1e-10, batch_size=batch_size)


@pytest.mark.slow
@pytest.mark.parametrize(
    "estimator", [pytest.param("score", marks=pytest.mark.benchmark), "marginal"]
)
def test_compiled_gradients_equal_eager_ones(estimator: str) -> None:
    air = small_air(num_steps=1)
    program = MarginalAIR(air) if estimator == "marginal" else air
    with pyro.validation_enabled(False):
        compare_with_eager(air, program, torch.rand(10, 12, 12), inductor, 1e-4, batch_size=4)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_captured_step_is_pure_draws_what_the_eager_one_draws_and_is_freed(
    ranks: int, images: Tensor
) -> None:
    """Capturing draws no random numbers. A rate of zero keeps the weights: losses differ by noise.

    With another operation than those on tensors, such as a mark for a profiler, Inductor makes two
    functions. A cycle would keep CUDA graphs and their memory while the next model needs it.
    """
    graphs: list[str] = []

    def compiler(graph: fx.GraphModule) -> fx.GraphModule:
        graphs.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    runs = []
    for chosen in (None, compiler):
        pyro.set_rng_seed(1)
        svi = make_svi(small_air(num_steps=1), (0.0, 0.0), 1.0, chosen)
        with pyro.validation_enabled(False), as_rank(0) if ranks == 2 else nullcontext():
            runs.append([svi.step(images, batch_size=4) for _ in range(4)])
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)
    assert len(set(runs[1])) == 4
    assert {name for name in graphs if not name.startswith("aten.")} <= {
        "<built-in function getitem>"
    }
    gone = weakref.ref(svi)
    gc.disable()
    try:
        del svi
        assert gone() is None
    finally:
        gc.enable()


def test_what_cannot_be_compiled_runs_uncompiled(
    images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(graph: fx.GraphModule) -> Callable[..., Any]:
        raise RuntimeError("no compiler\nand a long story")

    svi = make_svi(small_air(num_steps=1), compiler=fails)
    with pyro.validation_enabled(False):
        assert len({svi.step(images) for _ in range(3)}) == 3
    assert caplog.messages == ["steps run uncompiled: RuntimeError: no compiler"]


@pytest.mark.parametrize("known", [["fallback_random", "deterministic"], ["fallback_random"]])
def test_inductor_chooses_no_kernel_by_timing_it_where_it_can(known: list[str]) -> None:
    with (
        mock.patch("torch._inductor.list_options", return_value=known),
        mock.patch("torch.compile") as compiler,
    ):
        inductor(fx.GraphModule({}, fx.Graph()))
    assert compiler.call_args.kwargs["options"] == dict.fromkeys(known, True)


# The path of a GPU, without one.


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({}, {"added_scenes": 5.0, "added_scenes_from": 1, "clip_grad_norm": 10.0}),
        ({"guide_input": "glimpse", "embed_channels": [2, 3]}, {}),
        ({"background_model": "pca"}, {}),
        ({"channels": 3, "likelihood": "bernoulli", "guide_input": "difference"}, {}),
        ({}, {"estimator": "score", "clip_grad_norm": 10.0}),
        ({"use_masking": False, "guide_input": "difference"}, {"estimator": "score"}),
    ],
)
def test_a_step_and_inference_stay_on_their_device(
    options: dict[str, Any], settings: dict[str, Any]
) -> None:
    """On torch's device without memory, where no value can be read; `is_cuda` picks the path."""
    air = small_air(num_steps=2, **options).to("meta")
    images = torch.zeros(100, *pixels_of(air), dtype=torch.uint8)
    if air.background is not None:
        air.background.fitted = torch.tensor(True)
    training = replace(SETTINGS, lr_schedule="cosine", **settings)
    trainer = Trainer(air, images, HeldOut(images[:3]), training)
    with (
        pyro.validation_enabled(False),
        mock.patch.object(Tensor, "is_cuda", True),
        mock.patch.object(trainer.optimizer, "step") as update,  # torch has none for meta
        OffTheHost(),
    ):
        for _ in range(2):
            trainer._take_step()
        infer(air, trainer.images[:5])
        air.prior(5, trainer.prior)
        sample_elbo(air, trainer.images[:5], trainer.prior)
    assert update.call_count == 2


@pytest.mark.slow
@pytest.mark.parametrize("captured", [False, True])
def test_the_path_of_a_gpu_takes_the_same_steps(captured: bool, images: Tensor) -> None:
    """A skipped step too, although a CUDA graph overwrites the results of its last run."""
    results: list[Tensor] = []

    def like_cuda_graphs(graph: fx.GraphModule) -> Callable[[Tensor], Any]:
        def run(data: Tensor) -> Any:  # noqa: ANN401
            found = graph(data)
            results[:] = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
            return found

        return run

    def overwrite() -> None:
        for result in results:
            result.fill_(result.dtype == torch.bool or math.nan)

    def weights() -> list[Tensor]:
        pyro.set_rng_seed(0)
        air = small_air(num_steps=1, use_baselines=False)
        chosen = like_cuda_graphs if captured else None
        svi: Any = make_svi(MarginalAIR(air), clip=10.0, compiler=chosen)
        data = images.clone()
        for step in range(4):
            data.copy_(images * (math.nan if step == 2 else 1))
            svi.step(data, batch_size=8)
            assert bool(svi.skipped) == (step == 2)
        assert svi.stats.read()[2] == 1
        assert not hasattr(svi.optim, "found_inf")
        if captured:
            assert len(svi._compiled) == 1
            assert None not in svi._compiled.values()
        return list(air.parameters())

    without_devices = lambda _, fork=torch.random.fork_rng: fork([])  # noqa: E731
    with pyro.validation_enabled(False):
        expected = weights()
        with (
            mock.patch.object(Tensor, "is_cuda", True),
            mock.patch("torch.random.fork_rng", without_devices),
            mock.patch("torch.compiler.cudagraph_mark_step_begin", overwrite),
        ):
            found = weights()
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()


# Arithmetic of indices.


class IndexArithmetic(fx.Interpreter):
    """Runs a graph, and refuses whole numbers from 2**31 on that follow from arange alone.

    Inductor computes them in 32 bits on a GPU (PyTorch issue 175966).
    """

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401
        result = super().run_node(n)
        inputs = n.all_input_nodes
        is_arange = n.target is torch.ops.aten.arange.default
        n.meta["index"] = is_arange or (inputs and all(i.meta.get("index") for i in inputs))
        if n.meta["index"] and isinstance(result, Tensor) and not result.is_floating_point():
            assert int(result.abs().max()) < 2**31, n.format_node()
        return result


@pytest.mark.slow
@pytest.mark.parametrize("size", [60_000, 10**8])
def test_indices_of_a_batch_need_no_more_than_31_bits(size: int) -> None:
    def captured(n: int) -> fx.GraphModule:
        return make_fx(lambda: draw_indices(size, n, torch.device("cpu")))()

    for n in (*range(1, 300, 7), 256, 1000, 1024, 4099, 46_341, 60_000, 65_536):
        IndexArithmetic(captured(min(n, size))).run()


@pytest.mark.slow
@pytest.mark.parametrize(("estimator", "batch_size"), [("score", 1024), ("marginal", 65_536)])
def test_index_arithmetic_of_a_step_needs_no_more_than_31_bits(
    estimator: str, batch_size: int
) -> None:
    air = small_air(num_steps=1, x_size=4, window_size=3)
    program = MarginalAIR(air) if estimator == "marginal" else air
    graphs: list[fx.GraphModule] = []
    svi = make_svi(program, compiler=lambda g: graphs.append(g) or g)  # type: ignore[func-returns-value]
    data = torch.zeros(1, 4, 4, dtype=torch.uint8).expand(10**8, 4, 4)  # of 16 bytes
    with pyro.validation_enabled(False):
        svi.step(data, batch_size=batch_size)
    with torch.no_grad():
        IndexArithmetic(graphs[0]).run(data)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("estimator", ["score", "marginal"])
@pytest.mark.parametrize("compiler", [capture_only, inductor])
def test_on_a_gpu_compiled_steps_are_those_of_uncompiled_ones(
    estimator: str, compiler: Callable[..., Any]
) -> None:
    """Rates and prior change in place between steps, and random numbers advance."""
    losses, finals = [], []
    data = torch.randint(256, (40, 12, 12), dtype=torch.uint8, device="cuda")
    for chosen in (None, compiler):
        pyro.set_rng_seed(1)
        # In float32, Adam makes a whole step of a gradient that is zero but for its rounding.
        air = small_air(num_steps=2).double().cuda()
        program = MarginalAIR(air) if estimator == "marginal" else air
        prior = CountPrior([0.5, 0.5], "lin", 1e-3, 0, 10, "cuda")
        svi: Any = make_svi(program, (1e-3, 1e-2), 100.0, chosen)
        with pyro.validation_enabled(False):
            taken = []
            for step in range(10):
                prior.set_step(step)
                svi.optim.param_groups[0]["lr"].fill_(1e-3 / (step + 1))
                taken.append(svi.step(data, batch_size=8, z_pres_prior_p=prior))
                assert not svi.skipped
        losses.append(taken)
        finals.append([p.detach().clone() for p in air.parameters()])
    assert None not in svi._compiled.values(), "the step ran uncompiled"
    assert len(set(losses[1])) == 10
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for eager, compiled in zip(*finals, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)
