"""The optimisation step captured as a graph of tensor operations, compiled, and recorded."""

import gc
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakMethod

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from air.training.parallel import AllReduce
from air.training.svi import SVI, Arguments, Keywords, StepResult

Captured = Callable[[Tensor], tuple[Any, ...]]  # of data
Compiler = Callable[[fx.GraphModule], Captured]

WARMUP_STEPS = 3  # on a GPU: they build kernels and Adam's state, before a CUDA graph


class _Recorded(NamedTuple):
    """A step as CUDA graphs, and the tensors that a replay overwrites."""

    graph: torch.cuda.CUDAGraph  # the whole step, or with several ranks all before the all_reduce
    graph_after_reduce: torch.cuda.CUDAGraph | None
    message: Tensor | None  # to all_reduce between the two graphs
    loss: Tensor
    results: tuple[Tensor, Tensor, int | Tensor]  # skipped, grad_norm, num_images


class RecordingError(RuntimeError):
    """A step could not be recorded as a CUDA graph; the message is one line for the user."""


def inductor(graph: fx.GraphModule) -> Captured:
    """Compiles by Inductor, with the random numbers that the graph would draw uncompiled."""
    wanted: dict[str, Any] = {
        "fallback_random": True,
        # No kernel is chosen by timing it, so that a resumed run computes what it would have.
        "deterministic": True,
    }
    devices = (node.kwargs.get("device") for node in graph.graph.nodes)
    if any(isinstance(device, torch.device) and device.type == "cuda" for device in devices):
        # A step launches some 160 small kernels, one after another, so they should be few: those
        # that are independent run as one, and what is cheap is computed twice, not stored.
        wanted |= {"combo_kernels": True, "combo_kernel_max_num_nodes": 32}
        wanted |= {"realize_opcount_threshold": 100, "realize_reads_threshold": 8}
    known = torch._inductor.list_options()  # of this version of torch
    options = {name: wanted[name] for name in wanted if name in known}
    return torch.compile(graph, fullgraph=True, options=options)


class CompiledSVI(SVI):
    """`SVI` whose steps are captured once and compiled: the same numbers, without the Python.

    At the first step the program runs once under ``make_fx``: model, guide, ELBO, backward pass and
    clipping leave a graph of some 2,000 tensor operations, which is compiled and runs from then on.
    Every step reads the current values of the parameters and of other tensors that the program
    holds: change them in place. A step with other arguments, with other parameters frozen, or with
    data of another shape (on a GPU: any other data), is captured as well, and kept.

    A step that cannot be captured or compiled runs uncompiled, after a warning.

    On a GPU a CUDA graph then holds the whole step, optimiser included. It is recorded here and not
    by Inductor (``triton.cudagraphs``), whose CUDA graphs would hold neither the fused Adam nor two
    parts of a step with an all_reduce between them.

    Args:
        model, guide, optim, loss, all_reduce: As for `SVI`.
        compiler: Turns the captured graph into a function that runs in its place.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: torch.optim.Optimizer,
        loss: Any,  # noqa: ANN401
        compiler: Compiler = inductor,
        all_reduce: AllReduce | None = None,
    ) -> None:
        super().__init__(model, guide, optim, loss, all_reduce)
        self.compiler = compiler
        self._compiled: dict[Any, Captured | None] = {}
        self._warmup_steps: Counter[Any] = Counter()  # on a GPU, before a recording
        self._recorded: dict[Any, _Recorded] = {}
        # A weak reference: a cycle would keep CUDA graphs, and their memory, until it is collected.
        forget = WeakMethod(self._forget)
        optim.register_load_state_dict_post_hook(lambda _: (method := forget()) and method())

    def step_async(self, data: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        if not data.is_cuda:
            return super().step_async(data, *args, **kwargs)
        self._find_trainable()
        key = data.data_ptr(), *self._key(data, args, kwargs)
        if key in self._recorded:
            return self._replay(self._recorded[key])
        loss = super().step_async(data, *args, **kwargs)
        self._warmup_steps[key] += 1
        compiled = self._compiled[self._key(data, args, kwargs)] is not None
        if compiled and self._warmup_steps[key] == WARMUP_STEPS:
            self._recorded[key] = self._record(data, args, kwargs)
        return loss

    def _before_reduce(self, data: Tensor, args: Arguments, kwargs: Keywords) -> Any:  # noqa: ANN401
        key = self._key(data, args, kwargs)
        if key not in self._compiled:
            self._compiled[key] = self._capture(data, args, kwargs)
        compiled = self._compiled[key]
        if compiled is None:
            return super()._before_reduce(data, args, kwargs)
        with torch.no_grad():
            gradients, found = compiled(data)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return found if isinstance(found, Tensor) else StepResult(*found)

    def _loss_and_grads(self, data: Tensor, args: Arguments, kwargs: Keywords) -> Tensor:
        elbo, surrogate_loss = self._elbo_and_surrogate_loss(data, args, kwargs)
        gradients = torch.autograd.grad(surrogate_loss, self._parameters, allow_unused=True)
        alone = _as_backward_leaves_them(gradients)
        for parameter, gradient in zip(self._parameters, alone, strict=True):
            parameter.grad = gradient
        return -elbo.detach()

    def _key(self, data: Tensor, args: Arguments, kwargs: Keywords) -> tuple[Any, ...]:
        """Everything that is fixed in a captured program."""
        layout = data.shape, data.stride(), data.dtype, data.device
        return *layout, tuple(map(id, self._parameters)), args, tuple(kwargs.items())

    def _capture(self, data: Tensor, args: Arguments, kwargs: Keywords) -> Captured | None:
        """The compiled program, or None if it cannot be compiled. Draws no random numbers."""

        def program(data: Tensor) -> tuple[Any, ...]:
            found = super(CompiledSVI, self)._before_reduce(data, args, kwargs)
            gradients = [parameter.grad for parameter in self._parameters]
            return gradients, found if isinstance(found, Tensor) else tuple(found)

        devices = [data.device] if data.is_cuda else []
        try:
            with torch.random.fork_rng(devices), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns about its own code
                compiled = self.compiler(make_fx(program)(data))
                with torch.no_grad():
                    compiled(data)  # compiles
        except Exception as error:  # compilers and their tools fail in many ways
            logging.getLogger("air").warning("steps run uncompiled: %s", _line(error))
            return None
        return compiled

    def _record(self, data: Tensor, args: Arguments, kwargs: Keywords) -> _Recorded:
        """Records a step as CUDA graphs, without running it."""
        before = self.skipped, self.grad_norm, self.num_images
        graph, graph_after_reduce, message = torch.cuda.CUDAGraph(), None, None
        gc.collect()  # of a model that is gone, whose memory this one may need
        try:
            with torch.cuda.device(data.device), _capturable(self.optim):
                capture = partial(
                    torch.cuda.graph,
                    stream=torch.cuda.Stream(),  # type: ignore[no-untyped-call]
                    capture_error_mode="thread_local",  # other threads, as NCCL's, may do as usual
                )
                with capture(graph):
                    found = self._before_reduce(data, args, kwargs)
                    if self.all_reduce is None:
                        loss = self._after_reduce(found)
                if self.all_reduce is not None:
                    message, graph_after_reduce = found, torch.cuda.CUDAGraph()
                    with capture(graph_after_reduce, pool=graph.pool()):
                        loss = self._after_reduce(message)
        except Exception as error:  # the device is in no state to continue
            raise RecordingError(f"no CUDA graph of the step: {_line(_cause(error))}") from error
        results = self.skipped, self.grad_norm, self.num_images
        self.skipped, self.grad_norm, self.num_images = before
        return _Recorded(graph, graph_after_reduce, message, loss, results)

    def _replay(self, recorded: _Recorded) -> Tensor:
        recorded.graph.replay()
        if self.all_reduce and recorded.message is not None and recorded.graph_after_reduce:
            self.all_reduce(recorded.message)
            recorded.graph_after_reduce.replay()
        self.skipped, self.grad_norm, self.num_images = recorded.results
        return recorded.loss

    def _forget(self) -> None:
        """Drops the recorded steps, which write to the optimiser's former state."""
        self._warmup_steps.clear()
        self._recorded.clear()


@contextmanager
def _capturable(optim: torch.optim.Optimizer) -> Iterator[None]:
    """Lets an optimiser be recorded. Set for longer, its other steps would warn."""
    for group in optim.param_groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in optim.param_groups:
            group["capturable"] = False


def _as_backward_leaves_them(gradients: Sequence[Tensor | None]) -> Iterator[Tensor | None]:
    """Gives each gradient memory of its own, in its parameter's layout.

    ``autograd.grad`` returns one tensor for both terms of a sum: clipping in place would scale it
    twice. It also returns transposed tensors, whose memory a fused Adam would read in wrong order.
    """
    seen: set[int] = set()
    for gradient in gradients:
        if gradient is None:
            yield None
            continue
        alone = gradient.contiguous()
        if alone.data_ptr() in seen:
            alone = alone.clone()
        seen.add(alone.data_ptr())
        yield alone


def _cause(error: BaseException) -> BaseException:
    """The first of the errors that led to this one: ending a capture that failed fails too."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def _line(error: BaseException) -> str:
    reason = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {reason}"
