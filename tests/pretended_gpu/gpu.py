"""A pretended GPU: tensors that claim to be on one, and what recording asks of CUDA.

Tensors are fake (`FakeTensorMode`): they have a shape, a type and a device, "cuda:1", but no
values. So an operation on tensors of two devices raises, and so does reading a value. Recording is
torch's own; what it calls of CUDA is pretended here (`PretendedGPU`).
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from air.training.compiled_svi import WARMUP_STEPS

GPU = torch.device("cuda:1")  # not the current one, on which a bare "cuda" would be
STEPS = 2  # of AIR


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
