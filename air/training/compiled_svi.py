"""The optimisation step captured as a graph of tensor operations, compiled, and recorded."""

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from air.training.svi import SVI, AllReduce, Arguments, Keywords

LossAndGrads = Callable[[Tensor], tuple[Tensor, ...]]  # of data, a gradient for each parameter
Compiler = Callable[[fx.GraphModule], LossAndGrads]

WARMUP_STEPS = 3  # on a GPU: they build kernels and Adam's state, before a CUDA graph


class _Recorded(NamedTuple):
    """A step on a GPU, and the tensors that running it overwrites."""

    finding: torch.cuda.CUDAGraph  # loss and gradients; the whole step where none are added up
    applying: torch.cuda.CUDAGraph | None  # the rest
    found: Tensor
    loss: Tensor
    left: tuple[Tensor, Tensor, int | Tensor]  # skipped, grad_norm, number


class RecordingError(RuntimeError):
    """A step could not be recorded as a CUDA graph; the message is one line for the user."""


def inductor(graph: fx.GraphModule) -> LossAndGrads:
    """Compiles by Inductor, with the random numbers that the graph would draw uncompiled."""
    return torch.compile(graph, options={"fallback_random": True})


class CompiledSVI(SVI):
    """`SVI` whose steps are captured once and compiled: the same numbers, without the Python.

    At the first step the program runs once under ``make_fx``: model, guide, ELBO and backward pass
    leave a graph of some 2,000 tensor operations, which is compiled and from then on runs instead.
    On a GPU a CUDA graph then holds the whole step, optimiser included. Both read the parameters,
    and other tensors that the program holds, anew at every step: change those in place. Other
    arguments and data of another shape, on a GPU any other data, are captured anew and kept too.

    Where a step cannot be captured or compiled, it runs uncompiled, after a warning.

    Args:
        model, guide, optim, loss, all_reduce: As for `SVI`.
        compiler: From the captured graph to what runs in its place.
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
        self._compiled: dict[Any, LossAndGrads | None] = {}
        self._taken: Counter[Any] = Counter()  # steps on a GPU, until they are recorded
        self._recorded: dict[Any, _Recorded] = {}
        optim.register_load_state_dict_post_hook(self._forget)

    def step_async(self, data: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        if not data.is_cuda:
            return super().step_async(data, *args, **kwargs)
        key = data.data_ptr(), *_key(data, args, kwargs)
        if key in self._recorded:
            return self._replay(self._recorded[key])
        loss = super().step_async(data, *args, **kwargs)
        self._taken[key] += 1
        compiled = self._compiled[_key(data, args, kwargs)] is not None
        if compiled and self._taken[key] == WARMUP_STEPS:
            self._recorded[key] = self._record(data, args, kwargs)
        return loss

    def _loss_and_grads(self, data: Tensor, args: Arguments, kwargs: Keywords) -> Tensor:
        key = _key(data, args, kwargs)
        if key not in self._compiled:
            self._compiled[key] = self._capture(data, args, kwargs)
        compiled = self._compiled[key]
        if compiled is None:
            return super()._loss_and_grads(data, args, kwargs)
        with torch.no_grad():
            loss, *gradients = compiled(data)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss

    def _capture(self, data: Tensor, args: Arguments, kwargs: Keywords) -> LossAndGrads | None:
        """The compiled program, or None where there can be none; draws no random numbers."""

        def loss_and_grads(data: Tensor) -> tuple[Tensor | None, ...]:
            # What TraceGraph_ELBO.loss_and_grads does until the loss becomes a number.
            elbo, surrogate_loss = self.loss._loss_and_surrogate_loss(
                self.model, self.guide, (data, *args), kwargs
            )
            found = torch.autograd.grad(surrogate_loss, self._parameters, allow_unused=True)
            return -elbo, *_as_backward_leaves_them(found)

        devices = [data.device] if data.is_cuda else []
        try:
            with torch.random.fork_rng(devices), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own, about its own code
                compiled = self.compiler(make_fx(loss_and_grads)(data))
                with torch.no_grad():
                    compiled(data)  # compiles
        except Exception as error:  # of any kind: compilers and their tools fail in many ways
            logging.getLogger("air").warning("steps run uncompiled: %s", _line(error))
            return None
        return compiled

    def _record(self, data: Tensor, args: Arguments, kwargs: Keywords) -> "_Recorded":
        """A step as CUDA graphs; nothing runs here."""
        for group in self.optim.param_groups:
            group["capturable"] = True
        last = self.skipped, self.grad_norm, self.number
        finding, applying = torch.cuda.CUDAGraph(), None
        try:
            stream = torch.cuda.Stream(data.device)  # type: ignore[no-untyped-call]
            with torch.cuda.graph(finding, stream=stream):
                found = self._find(data, args, kwargs)
                if self.all_reduce is None:
                    loss = self._apply(found)
            if self.all_reduce is not None:  # messages go out between two graphs
                applying = torch.cuda.CUDAGraph()
                with torch.cuda.graph(applying, pool=finding.pool(), stream=stream):
                    loss = self._apply(found)
        except Exception as error:  # the device is in no state to go on
            raise RecordingError(f"no CUDA graph of the step: {_line(error)}") from error
        left = self.skipped, self.grad_norm, self.number
        self.skipped, self.grad_norm, self.number = last
        return _Recorded(finding, applying, found, loss, left)

    def _replay(self, recorded: "_Recorded") -> Tensor:
        recorded.finding.replay()
        if self.all_reduce is not None and recorded.applying is not None:
            self.all_reduce(recorded.found)
            recorded.applying.replay()
        self.skipped, self.grad_norm, self.number = recorded.left
        return recorded.loss

    def _forget(self, optim: torch.optim.Optimizer) -> None:
        """Drops recorded steps: the optimiser's state, which they write to, is another now."""
        self._taken.clear()
        self._recorded.clear()


def _as_backward_leaves_them(gradients: Sequence[Tensor | None]) -> Iterator[Tensor | None]:
    """Each with memory of its own, in its parameter's layout.

    ``autograd.grad`` gives the same tensor for both terms of a sum, where clipping in place would
    count twice, and transposed ones, which a fused Adam, going by memory, would mix up.
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


def _key(data: Tensor, args: Arguments, kwargs: Keywords) -> tuple[Any, ...]:
    """What a captured program depends on, beside what it reads anew."""
    layout = data.shape, data.stride(), data.dtype, data.device
    return *layout, args, tuple(kwargs.items())


def _line(error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {reason}"
