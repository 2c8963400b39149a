"""The optimisation step: SVI driven by one ``torch.optim`` optimiser, and its compiled twin."""

import logging
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from air.air import AIR

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]
Gradients = Callable[[Tensor], tuple[Tensor, ...]]  # data -> loss and a gradient per parameter
Compiler = Callable[[fx.GraphModule], Gradients]

UNRECORDED_STEPS = 3  # on a GPU: they build kernels and Adam's state, before a CUDA graph


def make_optimizer(
    air: AIR,
    learning_rate: float,
    baseline_learning_rate: float,
    clip_grad_norm: float | None = None,
) -> torch.optim.Adam:
    """Adam with two parameter groups: model and guide, and the baseline's nets.

    The rates are tensors on the parameters' device, to be changed in place.

    Args:
        air: Owns the parameters.
        learning_rate: For model and guide.
        baseline_learning_rate: For the parameters whose names begin with ``bl_``.
        clip_grad_norm: Bound on the joint norm of the gradients of model and guide, for a cost in
            nats per image; None for no bound. The baseline learns by a regression of its own.
    """
    baseline = [p for name, p in air.named_parameters() if name.startswith("bl_")]
    others = [p for name, p in air.named_parameters() if not name.startswith("bl_")]
    rates = torch.tensor([learning_rate, baseline_learning_rate], device=air.h_init.device)
    # Pyro's own optimisers keep one torch.optim object per parameter; one for all is faster.
    groups: list[dict[str, Any]] = [
        {"params": others, "lr": rates[0].clone(), "clip_grad_norm": clip_grad_norm},
        {"params": baseline, "lr": rates[1].clone()},
    ]
    return torch.optim.Adam(groups, fused=True)


class SVI:
    """``pyro.infer.SVI`` for a ``torch.optim`` optimiser: the same arguments, the same `step`.

    The parameters trained are those that `optim` holds. Pyro's global store of parameters is not
    asked, so several models train side by side. A loss or a gradient that is not finite never
    reaches the weights: such a step changes nothing.

    Attributes:
        skipped: Whether the last step was such a one, a tensor of one bool.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: torch.optim.Adam,  # fused: only then can the device decide to skip a step
        loss: Any,  # noqa: ANN401  # of the ELBOs only those with loss_and_grads
    ) -> None:
        self.model, self.guide = model, guide
        self.optim = optim
        self.loss = loss
        self.skipped = torch.zeros((), dtype=torch.bool)
        self._parameters = [p for group in optim.param_groups for p in group["params"]]

    def step(self, data: Tensor, *args: Any, **kwargs: Any) -> float:  # noqa: ANN401
        """Takes one gradient step and returns the loss, as Pyro does: -ELBO of all of `data`."""
        return float(self.advance(data, *args, **kwargs))

    def advance(self, data: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """`step` that need not wait for the device: the loss is a tensor, good until the next."""
        self.optim.zero_grad(set_to_none=True)
        loss = self._loss_and_grads(data, args, kwargs)
        self._update(loss, len(data))
        return loss

    def _loss_and_grads(self, data: Tensor, args: Arguments, kwargs: Keywords) -> Tensor:
        """Leaves gradients in the parameters, which hold none, and returns the loss."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Encountered NaN")  # `_update` sees to it
            loss = self.loss.loss_and_grads(self.model, self.guide, data, *args, **kwargs)
        return self._parameters[0].new_tensor(loss)

    def _update(self, loss: Tensor, number: int) -> None:
        """Changes the weights by their gradients, clipped; `number` images went into the loss."""
        finite = loss.isfinite()
        for group in self.optim.param_groups:
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            if not gradients:
                continue
            norm = nn.utils.get_total_norm(gradients)
            finite = finite & norm.isfinite()
            if group.get("clip_grad_norm") is not None:
                # The plate multiplies every cost, and so the gradient, by the number of images.
                bound = group["clip_grad_norm"] * number
                nn.utils.clip_grads_with_norm_(group["params"], bound, norm)
        self.skipped = ~finite
        # How torch.amp tells a fused optimiser, on the device, to leave out a step.
        self.optim.found_inf = self.skipped.float()  # type: ignore[attr-defined]
        self.optim.step()


def inductor(graph: fx.GraphModule) -> Gradients:
    """Compiles by Inductor, with the random numbers that the graph would draw uncompiled."""
    return torch.compile(graph, options={"fallback_random": True})


class CompiledSVI(SVI):
    """`SVI` whose steps are captured once and compiled: the same numbers, without the Python.

    At the first step the program runs once under ``make_fx``: model, guide, ELBO and backward pass
    leave a graph of some 2,000 tensor operations, which is compiled and from then on runs instead.
    On a GPU a CUDA graph then holds the whole step, optimiser included. Both read the parameters,
    and other tensors that the program holds, anew at every step: change those in place. Other data
    and other arguments are captured anew.

    Where a step cannot be captured or compiled, it runs uncompiled, after one warning.

    Args:
        model, guide, optim, loss: As for `SVI`.
        compiler: From the captured graph to what runs in its place.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: torch.optim.Adam,
        loss: Any,  # noqa: ANN401
        compiler: Compiler = inductor,
    ) -> None:
        super().__init__(model, guide, optim, loss)
        self.compiler = compiler
        self._compiled: dict[Any, Gradients | None] = {}
        self._taken: Counter[Any] = Counter()  # steps on a GPU, until they are recorded
        self._recorded: dict[Any, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def advance(self, data: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        key = data.data_ptr(), *_key(data, args, kwargs)
        if key in self._recorded:
            graph, loss, self.skipped = self._recorded[key]
            graph.replay()
            return loss
        loss = super().advance(data, *args, **kwargs)
        self._taken[key] += 1
        if data.is_cuda and self._taken[key] == UNRECORDED_STEPS:
            self._record(key, data, args, kwargs)
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

    def _capture(self, data: Tensor, args: Arguments, kwargs: Keywords) -> Gradients | None:
        """The compiled program, or None where there can be none; draws no random numbers."""

        def loss_and_grads(data: Tensor) -> tuple[Tensor | None, ...]:
            # What TraceGraph_ELBO.loss_and_grads does until the loss becomes a number.
            elbo, surrogate_loss = self.loss._loss_and_surrogate_loss(
                self.model, self.guide, (data, *args), kwargs
            )
            found = torch.autograd.grad(surrogate_loss, self._parameters, allow_unused=True)
            # In the parameters' layout, as backward() leaves them: a fused Adam goes by memory.
            return -elbo, *(None if g is None else g.contiguous() for g in found)

        devices = [data.device] if data.is_cuda else []
        try:
            with torch.random.fork_rng(devices), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own, about its own code
                compiled = self.compiler(make_fx(loss_and_grads)(data))
                with torch.no_grad():
                    compiled(data)  # compiles
        except Exception as error:  # of any kind: compilers and their tools fail in many ways
            _warn("steps run uncompiled", error)
            return None
        return compiled

    def _record(self, key: Any, data: Tensor, args: Arguments, kwargs: Keywords) -> None:  # noqa: ANN401
        """Records a whole step as a CUDA graph; nothing runs, and no random numbers are drawn."""
        if self._compiled[_key(data, args, kwargs)] is None:
            return  # Pyro's own Python reads from the device
        for group in self.optim.param_groups:
            group["capturable"] = True
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                loss = super().advance(data, *args, **kwargs)
        except Exception as error:
            _warn("steps run without a CUDA graph", error)
            return
        self._recorded[key] = graph, loss, self.skipped


def _key(data: Tensor, args: Arguments, kwargs: Keywords) -> tuple[Any, ...]:
    """What a captured program depends on, beside what it reads anew."""
    return data.shape, data.dtype, data.device, args, tuple(kwargs.items())


def _warn(what: str, error: Exception) -> None:
    reason = str(error).strip().partition("\n")[0]
    logging.getLogger("air").warning("%s: %s: %s", what, type(error).__name__, reason)
