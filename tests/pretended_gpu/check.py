"""The CUDA path of the program on a pretended GPU: checks that need no GPU, only a C++ compiler.

Tensors are fake (`FakeTensorMode`): they have a shape, a type and a device, "cuda:1", but no
values. So an operation on tensors of two devices raises, and so does reading a value. Recording is
torch's own; what it calls of CUDA is pretended here (`PretendedGPU`).

Run in a process of its own, into which the library of pretend_gpu.cpp was loaded before torch. It
prints one line of JSON for each check, its name, "ok", and if it failed a "detail".
"""

import gc
import json
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import numpy as np
import pyro
import torch
from helpers import SETTINGS, capture_only, small_air
from numpy.typing import NDArray
from pyro.infer import TraceGraph_ELBO
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from air import AIR
from air.data.streaming import StreamedImages
from air.evaluation.collapse import first_not_finite
from air.evaluation.elbo import importance_weighted_bound, sample_elbo
from air.evaluation.metrics import HeldOut
from air.inference import infer, sample_prior
from air.marginal import MarginalAIR
from air.priors import AnnealedPresencePrior
from air.training.compiled_svi import WARMUP_STEPS, CompiledSVI, RecordingError
from air.training.events import Evaluated, Progress
from air.training.svi import SVI, make_optimizer
from air.training.trainer import Trainer
from air.visualization.snapshots import take_snapshot

GPU = torch.device("cuda:1")  # not the current one, on which a bare "cuda" would be
ESTIMATORS = ("marginal", "score")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # estimator, and arguments of AIR
    "marginal": ("marginal", {}),
    "score": ("score", {}),
    "marginal, guide difference": ("marginal", {"guide_input": "difference"}),
    "score, guide difference": ("score", {"guide_input": "difference"}),
    "marginal, likelihood bernoulli": ("marginal", {"likelihood": "bernoulli"}),
    "score, likelihood bernoulli": ("score", {"likelihood": "bernoulli"}),
    "marginal, three channels": ("marginal", {"channels": 3}),
    "score, three channels": ("score", {"channels": 3}),
    "score, no masking": ("score", {"use_masking": False}),
    "score, no baselines": ("score", {"use_baselines": False}),
    "marginal, no baselines": ("marginal", {"use_baselines": False}),
}
STEPS = 2  # of AIR

CAPTURED = partial(CompiledSVI, compiler=capture_only)

CHECKS: dict[str, Callable[[], None]] = {}
Check = Callable[..., None]


def check(*cases: str | tuple[str, ...]) -> Callable[[Check], Check]:
    """Registers a check under its name; with cases, once for each of them, its argument."""

    def register(function: Check) -> Check:
        name = function.__name__.replace("_", " ")
        if not cases:
            CHECKS[name] = function
        for case in cases:
            label = case if isinstance(case, str) else ", ".join(case)
            CHECKS[f"{name}: {label}"] = partial(function, case)
        return function

    return register


class NothingCrosses(TorchDispatchMode):
    """Refuses operations on tensors of host and device, be it a copy or a mixture."""

    def __torch_dispatch__(
        self,
        operation: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        result = operation(*args, **(kwargs or {}))
        devices = {*devices_of(args), *devices_of((kwargs or {}).values()), *devices_of([result])}
        assert len(devices) < 2, f"{operation} on {sorted(map(str, devices))}"
        return result


def devices_of(values: Iterable[object]) -> Iterator[torch.device]:
    """The devices of tensors among values and lists of values."""
    for value in values:
        if isinstance(value, Tensor):
            yield value.device
        elif isinstance(value, list | tuple):
            yield from devices_of(value)


class EveryNumberIsOne(TorchDispatchMode):
    """Lets the host read numbers, where it means to: a fake tensor's elements are all one.

    Of a result whose size depends on values, it takes one that is possible.
    """

    def __torch_dispatch__(
        self,
        operation: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        aten = torch.ops.aten
        if operation is aten._local_scalar_dense.default:
            is_bool, is_float = args[0].dtype == torch.bool, args[0].is_floating_point()
            return True if is_bool else 1.0 if is_float else 1
        if operation is aten.nonzero.default:
            return args[0].new_zeros(args[0].numel(), args[0].dim(), dtype=torch.long)
        if operation is aten.bincount.default:
            return args[0].new_zeros(max(2, (kwargs or {}).get("minlength", 0)))
        return operation(*args, **(kwargs or {}))


class PretendedGPU:
    """What recording asks of CUDA, and fused Adam's kernel, of which torch has no fake.

    Attributes:
        device: The number of the current GPU.
        recording: The graph that is being recorded.
        graphs: All graphs.
        replayed: The graphs that were replayed, and what else a check notes between them.
        stepped: For each call of fused Adam's kernel, its parameters.
    """

    def __init__(self) -> None:
        self.device = 0
        self.recording: PretendedGraph | None = None
        self.graphs: list[PretendedGraph] = []
        self.replayed: list[PretendedGraph | str] = []
        self.stepped: list[Sequence[Tensor]] = []

    def patches(self) -> dict[str, Any]:
        """What stands in for what."""
        stream = mock.Mock()
        stream.is_capturing = lambda: self.recording is not None
        return {
            "torch._fused_adam_": self.fused_adam,
            "torch.accelerator.current_accelerator": lambda *_, **__: GPU,
            "torch.accelerator.current_stream": lambda *_: stream,
            "torch.Tensor.pin_memory": pinned,
            "torch.cuda.CUDAGraph": partial(PretendedGraph, self),
            "torch.cuda.Stream": lambda *_: self.device,
            "torch.cuda._exchange_device": self.exchange,
            "torch.cuda._maybe_exchange_device": self.exchange,
            "torch.cuda.empty_cache": lambda: None,
            "torch.cuda.get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
            "torch.cuda.set_rng_state": lambda *_: None,
            "torch.cuda.stream": lambda _: nullcontext(),
            "torch.cuda.synchronize": lambda *_: None,
        }

    def exchange(self, device: int) -> int:
        """Makes a device the current one, and returns the one before."""
        before, self.device = self.device, device
        return before

    def fused_adam(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        max_exp_avg_sqs: Sequence[Tensor],
        state_steps: Sequence[Tensor],
        *,
        lr: Tensor,
        grad_scale: None = None,
        found_inf: Tensor,
        **_: object,
    ) -> None:
        """What the kernel takes for granted of its arguments, whose memory it reads unchecked."""
        assert grad_scale is None
        assert params
        numbers = (*state_steps, lr, found_inf)
        for tensor in (*params, *grads, *exp_avgs, *exp_avg_sqs, *numbers):
            assert tensor.device == GPU, f"fused Adam got a tensor on {tensor.device}"
            assert tensor.dtype == torch.float32, f"fused Adam got a tensor of {tensor.dtype}"
        assert all(number.numel() == 1 for number in numbers)
        assert len(state_steps) == len(params)
        for tensors in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
            assert len({tensor.shape for tensor in tensors}) == 1, "fused Adam got other shapes"
            assert all(tensor.is_contiguous() for tensor in tensors), "fused Adam goes by memory"
        written = [*params, *grads, *exp_avgs, *exp_avg_sqs, *state_steps]
        assert len({*map(address, written)}) == len(written), "fused Adam got shared memory"
        self.stepped.append(params)


class PretendedGraph:
    """A CUDA graph that holds nothing."""

    def __init__(self, gpu: PretendedGPU) -> None:
        self.gpu = gpu
        self.pools: tuple[object, ...] = ()
        self.mode = ""
        self.recorded_on = -1
        self.failed = False
        gpu.graphs.append(self)

    def capture_begin(self, *pools: object, capture_error_mode: str, **_: object) -> None:
        """Begins to record; `torch.cuda.graph` calls it, and `capture_end`."""
        assert self.gpu.recording is None, "recorded within a recording"
        self.gpu.recording = self
        self.pools, self.mode, self.recorded_on = pools, capture_error_mode, self.gpu.device

    def capture_end(self) -> None:
        self.gpu.recording = None
        if self.failed:  # as CUDA says it, which keeps no cause
            raise RuntimeError("operation failed due to a previous error during capture")

    def pool(self) -> object:
        return self, "pool"

    def replay(self) -> None:
        assert self.gpu.recording is None, "replayed within a recording"
        self.gpu.replayed.append(self)


def address(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor, fake or not, begins."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def pinned(tensor: Tensor) -> Tensor:
    assert tensor.device.type == "cpu", f"a tensor to pin is on {tensor.device}"
    return tensor.clone()


def numpy_of(tensor: Tensor, *_: object, **__: object) -> NDArray[Any]:
    """A fake tensor as an array, which torch refuses to make."""
    assert tensor.device.type == "cpu", f"NumPy got a tensor on {tensor.device}"
    assert not tensor.requires_grad
    return np.ones(tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))


@contextmanager
def pretended(
    estimator: str, device: torch.device = GPU, warmup_steps: int = WARMUP_STEPS
) -> Iterator[PretendedGPU]:
    """A pretended GPU, or for comparison the CPU, under fake tensors.

    Pyro finds by ProvenanceTensor which costs depend on which choices, and that cannot wrap a fake
    tensor. So here every cost depends on every choice: more operations than there would be.
    """
    choices = [f"z_pres_{t}" for t in range(STEPS)] if estimator == "score" else []
    gpu = PretendedGPU()
    patches = {
        "air.training.compiled_svi.WARMUP_STEPS": warmup_steps,
        "pyro.infer.tracegraph_elbo.track_provenance": lambda value, _: value,
        "pyro.infer.tracegraph_elbo.get_provenance": lambda _: frozenset(choices),
        "torch.Tensor.data_ptr": address,
        # A copy of a fake tensor as Python makes it would be of another FakeTensorMode.
        "torch._subclasses.FakeTensor.__deepcopy__": lambda tensor, _: tensor.detach().clone(),
        "torch.Tensor.numpy": numpy_of,
    }
    with ExitStack() as stack:
        for name, value in (patches | (gpu.patches() if device == GPU else {})).items():
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(mock.patch("torch._C._host_emptyCache", create=True))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=False))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("error")  # as one about `capturable`
        pyro.clear_param_store()
        yield gpu


def make_svi(
    estimator: str,
    *,
    kind: Callable[..., SVI] = SVI,
    device: torch.device = GPU,
    clip_grad_norm: float | None = None,
    frozen: tuple[str, ...] = (),
    **options: Any,  # noqa: ANN401  # of SVI
) -> tuple[AIR, SVI]:
    """A model on the device, and its SVI."""
    with torch.device(device):  # `AIR.to` cannot move fake parameters
        air = small_air(num_steps=STEPS)
    freeze(air, *frozen)
    program = MarginalAIR(air) if estimator == "marginal" else air
    optimizer = make_optimizer(air, 1e-3, 1e-2, clip_grad_norm)
    return air, kind(program.model, program.guide, optimizer, TraceGraph_ELBO(), **options)


def make_images(number: int = 100, channels: int = 1, device: torch.device = GPU) -> Tensor:
    shape = [number, 12, 12] if channels == 1 else [number, channels, 12, 12]
    return torch.zeros(shape, dtype=torch.uint8, device=device)


def make_prior(device: torch.device = GPU) -> AnnealedPresencePrior:
    return AnnealedPresencePrior([0.5] * STEPS, "lin", 1e-3, 0, 10, device)


def freeze(air: AIR, *prefixes: str) -> None:
    """Freezes the parameters whose names begin so, and no others."""
    for name, parameter in air.named_parameters():
        parameter.requires_grad_(not name.startswith(prefixes))


def take_steps(svi: SVI, data: Tensor, prior: AnnealedPresencePrior, number: int) -> Tensor:
    """Some steps, between which rates and prior change in place; the last loss."""
    for step in range(number):
        with NothingCrosses():
            prior.set_step(step + 1)
            for group in svi.optim.param_groups:
                group["lr"].fill_(0.1 / (step + 1))
            loss = svi.step_async(data, batch_size=7, z_pres_prior_p=prior)
    return loss


def trained_names(air: AIR, stepped: Sequence[Sequence[Tensor]]) -> list[str]:
    """The parameters in some calls of fused Adam."""
    names = {id(parameter): name for name, parameter in air.named_parameters()}
    return sorted(names[id(parameter)] for params in stepped for parameter in params)


def expected_names(air: AIR, estimator: str, *frozen: str) -> list[str]:
    unused = ("bl_",) if estimator == "marginal" else ()  # the baseline
    names = (name for name, _ in air.named_parameters())
    return sorted(name for name in names if not name.startswith(frozen + unused))


def assert_captured_once(svi: SVI) -> fx.GraphModule:
    assert isinstance(svi, CompiledSVI)
    (graph,) = svi._compiled.values()
    assert isinstance(graph, fx.GraphModule), "the step runs uncompiled"
    return graph


def assert_on_gpu(*values: object) -> None:
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    assert tensors
    for tensor in tensors:
        assert tensor.device == GPU, f"a result is on {tensor.device}"


@check(*ESTIMATORS)
def eager_step(estimator: str) -> None:
    with pretended(estimator) as gpu:
        air, svi = make_svi(estimator)
        loss = take_steps(svi, make_images(), make_prior(), 2)
        calls = len(gpu.stepped) // 2
        for stepped in (gpu.stepped[:calls], gpu.stepped[calls:]):
            assert trained_names(air, stepped) == expected_names(air, estimator)
        assert_on_gpu(loss, svi.skipped, svi.grad_norm, svi.stats.sums, [*air.parameters()])


@check(*ESTIMATORS)
def eager_step_on_one_batch_of_many_images(estimator: str) -> None:
    with pretended(estimator):
        _, svi = make_svi(estimator)
        images = make_images(7)
        with NothingCrosses():
            assert_on_gpu(svi.step_async(images, num_images=100))


@check(*ESTIMATORS)
def clipped_step(estimator: str) -> None:
    with pretended(estimator) as gpu:
        air, svi = make_svi(estimator, clip_grad_norm=10.0)
        take_steps(svi, make_images(), make_prior(), 1)
        assert trained_names(air, gpu.stepped) == expected_names(air, estimator)


@check(*product(ESTIMATORS, ("one graph", "two graphs")))
def recorded_step(case: tuple[str, str]) -> None:
    estimator, number = case
    with pretended(estimator) as gpu:

        def all_reduce(tensor: Tensor) -> None:
            assert gpu.recording is None, "an all_reduce in a recording"
            gpu.replayed.append("all_reduce")
            tensor.mul_(2)

        air, svi = make_svi(
            estimator,
            kind=CAPTURED,
            clip_grad_norm=10.0,
            all_reduce=all_reduce if number == "two graphs" else None,
        )
        data, prior = make_images(), make_prior()
        take_steps(svi, data, prior, WARMUP_STEPS - 1)
        assert not gpu.graphs, "recorded before all was built"
        stepped = len(gpu.stepped)
        take_steps(svi, data, prior, 1)
        graphs = list(gpu.graphs)
        assert len(graphs) == (2 if number == "two graphs" else 1)
        for graph in graphs:
            assert graph.mode == "thread_local", f"other threads may not go on: {graph.mode!r}"
            assert graph.recorded_on == GPU.index, "another device than the data's was current"
        for graph in graphs[1:]:
            assert graph.pools == (graphs[0].pool(),), "the graphs of a step share no memory"
        assert gpu.device == 0, "the device that was current is not so again"
        assert not any(group["capturable"] for group in svi.optim.param_groups), "still capturable"
        # The third step and the recorded one, which hold the update of the same parameters.
        names = trained_names(air, gpu.stepped[stepped:])
        assert names == sorted(2 * expected_names(air, estimator))

        stepped = len(gpu.stepped)
        gpu.replayed.clear()
        loss = take_steps(svi, data, prior, 2)
        once = [graphs[0], "all_reduce", graphs[1]] if number == "two graphs" else graphs
        assert gpu.replayed == 2 * once
        assert len(gpu.stepped) == stepped, "a replay also ran the step"
        assert gpu.graphs == graphs, "recorded again"
        assert_on_gpu(loss, svi.skipped, svi.grad_norm)
        assert_captured_once(svi)


@check()
def other_data_is_recorded_too() -> None:
    with pretended("marginal", warmup_steps=1) as gpu:
        _, svi = make_svi("marginal", kind=CAPTURED)
        data, other, prior = make_images(), make_images(), make_prior()
        take_steps(svi, data, prior, 1)
        take_steps(svi, other, prior, 1)
        first, second = gpu.graphs
        assert_captured_once(svi)  # the program, which is that of any such data
        for images in (data, other, data):
            take_steps(svi, images, prior, 1)
        assert gpu.replayed == [first, second, first]


@check(*ESTIMATORS)
def the_graph_is_that_of_the_cpu(estimator: str) -> None:
    """What is compiled on a GPU is what other tests compare with eager steps on the CPU."""
    programs = []
    for device in (torch.device("cpu"), GPU):
        with pretended(estimator, device):
            _, svi = make_svi(estimator, kind=CAPTURED, device=device, clip_grad_norm=10.0)
            images, prior = make_images(device=device), make_prior(device)
            # On the CPU the step reads whether it is to be skipped.
            with EveryNumberIsOne() if device.type == "cpu" else NothingCrosses():
                svi.step_async(images, batch_size=7, z_pres_prior_p=prior)
            nodes = [str(node.format_node()) for node in assert_captured_once(svi).graph.nodes]
            programs.append([node.replace(f"device: {device}", "device") for node in nodes])
    on_cpu, on_gpu = programs
    for one, other in zip(on_cpu, on_gpu, strict=False):
        assert one == other, f"on the CPU {one}, on the GPU {other}"
    assert len(on_cpu) == len(on_gpu) > 500


@check(("marginal", "eager"), ("score", "eager"), ("marginal", "captured"))
def step_of_which_a_part_is_frozen(case: tuple[str, str]) -> None:
    """Frozen before the optimiser is made, and others on the way."""
    estimator, how = case
    kind = SVI if how == "eager" else CAPTURED
    with pretended(estimator) as gpu:
        air, svi = make_svi(estimator, kind=kind, frozen=("decode.",))
        data, prior = make_images(), make_prior()
        for frozen in ("decode.", "encode."):
            freeze(air, frozen)
            gpu.stepped.clear()
            take_steps(svi, data, prior, 1)
            assert trained_names(air, gpu.stepped) == expected_names(air, estimator, frozen)


@check("one graph", "two graphs")
def a_recording_that_fails_names_the_cause(number: str) -> None:
    with pretended("marginal", warmup_steps=1) as gpu:

        def fails(*_: object, **__: object) -> None:
            if gpu.recording is not None:
                gpu.recording.failed = True
                raise RuntimeError("the root of all evil\nand a long story")

        all_reduce = None if number == "one graph" else lambda tensor: tensor.mul_(2)
        _, svi = make_svi("marginal", kind=CAPTURED, all_reduce=all_reduce)
        try:
            with mock.patch("torch._fused_adam_", fails):
                take_steps(svi, make_images(), make_prior(), 1)
        except RecordingError as error:
            message = str(error)
        else:
            raise AssertionError("no RecordingError")
        assert message == "no CUDA graph of the step: RuntimeError: the root of all evil", message
        assert gpu.device == 0
        assert not any(group["capturable"] for group in svi.optim.param_groups), "still capturable"


@contextmanager
def pretended_trainer(
    variant: str,
    warmup_steps: int = WARMUP_STEPS,
    **settings: Any,  # noqa: ANN401
) -> Iterator[tuple[PretendedGPU, Callable[..., Trainer]]]:
    """A pretended GPU and what makes a trainer on it, whose held-out scenes are on the host."""
    estimator, arguments = VARIANTS[variant]
    given = {"estimator": estimator, "lr_schedule": "cosine", **settings}
    with pretended(estimator, warmup_steps=warmup_steps) as gpu:

        def make(*, captured: bool = False) -> Trainer:
            pyro.clear_param_store()
            with torch.device(GPU):
                air = small_air(num_steps=STEPS, **arguments)
            host = torch.device("cpu")
            scenes = make_images(7, air.channels, host)
            # Without boxes and overlaps, whose scores the host computes, and from their values.
            held_out = HeldOut(scenes, torch.zeros(7, dtype=torch.long, device=host))
            images = make_images(channels=air.channels)
            own = replace(SETTINGS, compile=captured, **given)
            return Trainer(air, images, held_out, own, compiler=capture_only)

        yield gpu, make


@check(*VARIANTS)
def trainers_step(variant: str) -> None:
    with pretended_trainer(variant) as (gpu, make):
        trainer = make()
        with NothingCrosses():
            trainer._take_step()
        assert gpu.stepped
        assert_on_gpu(trainer.stats.sums, [*trainer.air.parameters()])


@check()
def images_in_files() -> None:
    """Each batch is copied to the same place, from which a recorded step reads."""
    with pretended("marginal", warmup_steps=1) as gpu, EveryNumberIsOne():
        _, svi = make_svi("marginal", kind=CAPTURED)
        images = StreamedImages(np.zeros((100, 12, 12), np.uint8), GPU)
        for _ in range(3):
            assert_on_gpu(svi.step_async(images.draw(7), num_images=100))
        (graph,) = gpu.graphs
        assert gpu.replayed == [graph] * 2


@check(*(variant for variant in VARIANTS if variant.startswith("score")))
def evaluation(variant: str) -> None:
    """Copies and reads are meant here; only devices must not be mixed."""
    with pretended_trainer(variant) as (_, make), EveryNumberIsOne():
        trainer = make()
        air, images, prior = trainer.air, trainer.images[:5], trainer.prior
        with NothingCrosses():
            assert_on_gpu(infer(air, images))
            assert_on_gpu(air.prior(5), air.prior(5, prior))
        assert_on_gpu(sample_elbo(air, images, prior), sample_elbo(air, images))
        assert_on_gpu(importance_weighted_bound(air, images, 1, prior))
        assert_on_gpu(sample_prior(air, 5, seed=0))
        on_host = torch.zeros(3, *images.shape[1:], device="cpu")  # of floats, whose range is read
        assert_on_gpu(infer(air, on_host), sample_elbo(air, on_host))
        assert first_not_finite(air, images, prior) == "a sample"
        trainer._learn_count_prior()
        found = trainer.evaluate(7, iwae_samples=1, iwae_scenes=5)
        assert found.result.bound is not None
        snapshot = take_snapshot(air, trainer.held_out, 0, seed=0, miscounted=[1, 2])
        assert snapshot.scenes.images.shape[0] == 7


@check("marginal")  # one of the two, for the sake of time
def training_from_start_to_end(estimator: str) -> None:
    settings = {"num_steps": WARMUP_STEPS + 2, "progress_every": 3, "eval_every": 4}
    with pretended_trainer(estimator, **settings) as (gpu, make), EveryNumberIsOne():
        events = list(make(captured=True).train())
    kinds = [type(event) for event in events]
    assert kinds.count(Progress) == 2
    assert kinds.count(Evaluated) == 2
    (graph,) = gpu.graphs
    assert gpu.replayed == [graph] * 2


@check("score")  # which has two groups of parameters, and so two rates
def resumed_training(estimator: str) -> None:
    """A checkpoint is read onto the host; from there all must find its way to the GPU."""
    with pretended_trainer(estimator, warmup_steps=1) as (gpu, make):
        stopped = make()
        stopped._take_step()
        with EveryNumberIsOne():
            state = stopped.state_dict()
        state = tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, state)
        resumed = make(captured=True)
        with EveryNumberIsOne():
            resumed.load_state_dict(state)
        restored = trained_names(resumed.air, [[*resumed.optimizer.state]])
        assert restored == expected_names(resumed.air, estimator)
        for moments in resumed.optimizer.state.values():
            assert_on_gpu(moments)
        with NothingCrosses():
            resumed._take_step()
            resumed._take_step()
        assert gpu.replayed == gpu.graphs
        # Its own state, loaded into the same trainer: a recorded step holds the former moments.
        with EveryNumberIsOne():
            resumed.load_state_dict(state)
        resumed._take_step()
        assert len(gpu.replayed) == 1, "replayed what writes to moments that are no more in use"


def main() -> None:
    """Runs all checks."""
    pyro.enable_validation(False)  # as the program does
    torch.set_num_threads(1)
    gc.freeze()  # so that recording, which collects garbage, does not look through all of torch
    for name, function in CHECKS.items():
        outcome: dict[str, Any] = {"name": name, "ok": True}
        try:
            function()
        except Exception:  # whatever it is, the test of that name shows it
            outcome = {"name": name, "ok": False, "detail": traceback.format_exc()}
        print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main()
