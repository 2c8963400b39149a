"""The optimisation step captured as a graph of tensor operations, and compiled."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from pyro.infer import TraceGraph_ELBO
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from air.training.svi import SVI, Arguments, Keywords, StepResult

Captured = Callable[[Tensor], tuple[Any, ...]]  # of data
Compiler = Callable[[fx.GraphModule], Captured]


def inductor(graph: fx.GraphModule) -> Captured:
    """Compiles by Inductor, with the random numbers that the graph would draw uncompiled."""
    wanted: dict[str, Any] = {
        "fallback_random": True,
        # No kernel is chosen by timing it, so that a resumed run computes what it would have.
        "deterministic": True,
    }
    devices = (node.kwargs.get("device") for node in graph.graph.nodes)
    if any(isinstance(device, torch.device) and device.type == "cuda" for device in devices):
        # A step has some 160 small kernels. A CUDA graph launches them at once, and the options
        # below merge them: independent kernels, and those that compute cheap values twice.
        wanted |= {"triton.cudagraphs": True}
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
    holds: change them in place. A step with other arguments, or with data of another shape, is
    captured as well, and kept.

    A step that cannot be captured or compiled runs uncompiled, after a warning.

    On a GPU, Inductor records a CUDA graph of all but the optimiser's update, which a fused Adam
    does in one further launch.

    Args:
        model, guide, optim, loss: As for `SVI`.
        compiler: Turns the captured graph into a function that runs in its place.
        module: The module whose buffers, such as the statistics of batch normalisation, stay as
            they are when a step is captured.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: torch.optim.Optimizer,
        loss: Any,  # noqa: ANN401
        compiler: Compiler = inductor,
        module: nn.Module | None = None,
    ) -> None:
        super().__init__(model, guide, optim, loss)
        self.compiler, self.module = compiler, module
        self._compiled: dict[Any, Captured | None] = {}

    def _before_sum(self, data: Tensor, args: Arguments, kwargs: Keywords) -> StepResult | Tensor:
        key = data.shape, data.stride(), data.dtype, data.device, args, tuple(kwargs.items())
        if key not in self._compiled:
            self._compiled[key] = self._capture(data, args, kwargs)
        compiled = self._compiled[key]
        if compiled is None:
            return super()._before_sum(data, args, kwargs)
        if data.is_cuda:  # the last step's results, which its CUDA graph overwrites, were used
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            gradients, found = compiled(data)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return found if isinstance(found, Tensor) else StepResult(*found)

    def _loss_and_grads(self, data: Tensor, args: Arguments, kwargs: Keywords) -> Tensor:
        if type(self.loss) is not TraceGraph_ELBO:
            return super()._loss_and_grads(data, args, kwargs)
        elbo, surrogate_loss = self._elbo_and_surrogate_loss(data, args, kwargs)
        gradients = torch.autograd.grad(surrogate_loss, self._parameters, allow_unused=True)
        alone = _as_backward_leaves_them(gradients)
        for parameter, gradient in zip(self._parameters, alone, strict=True):
            parameter.grad = gradient
        return -elbo.detach()

    def _capture(self, data: Tensor, args: Arguments, kwargs: Keywords) -> Captured | None:
        """The compiled program, or None if it cannot be compiled. Draws no random numbers."""

        def program(data: Tensor) -> tuple[Any, ...]:
            found = super(CompiledSVI, self)._before_sum(data, args, kwargs)
            gradients = [parameter.grad for parameter in self._parameters]
            return gradients, found if isinstance(found, Tensor) else tuple(found)

        former = [(each, each.clone()) for each in self.module.buffers()] if self.module else []
        devices = [data.device] if data.is_cuda else []
        if data.is_cuda and kwargs.get("batch_size"):
            # A CUDA graph reads the data set where it is, instead of copying it at each step.
            torch._dynamo.mark_static_address(data)
        try:
            with torch.random.fork_rng(devices), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns about its own code
                compiled = self.compiler(make_fx(program)(data))
                with torch.no_grad():
                    compiled(data)  # compiles
        except Exception as error:  # compilers and their tools fail in many ways
            reason = str(error).strip().partition("\n")[0]
            logging.getLogger("air").warning(
                "steps run uncompiled: %s: %s", type(error).__name__, reason
            )
            return None
        finally:
            for buffer, values in former:
                buffer.copy_(values)
        return compiled


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
