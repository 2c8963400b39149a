"""The optimisation step: SVI driven by one ``torch.optim`` optimiser, and its compiled twin."""

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from air.air import AIR

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]
LossAndGrads = Callable[[Tensor], tuple[Tensor, ...]]  # of data, a gradient for each parameter
Compiler = Callable[[fx.GraphModule], LossAndGrads]

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


class RecordingError(RuntimeError):
    """A step could not be recorded as a CUDA graph; the message is one line for the user."""


class SVI:
    """``pyro.infer.SVI`` for one ``torch.optim`` optimiser: the same arguments, the same `step`.

    The parameters trained are those that `optim` holds. Pyro's global store of parameters is not
    asked, so several models train side by side. A loss or a gradient that is not finite never
    reaches the weights: such a step changes nothing. On a GPU the optimiser must be a fused one,
    for there the device itself leaves out the step.

    Attributes:
        skipped: Whether the last step was such a one, a tensor of one bool.
        grad_norm: Norm of its gradient before clipping, over the optimiser's first group of
            parameters and for a cost per image, a tensor of one number.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: torch.optim.Optimizer,
        loss: Any,  # noqa: ANN401  # of the ELBOs only those with loss_and_grads
    ) -> None:
        self.model, self.guide = model, guide
        self.optim = optim
        self.loss = loss
        self.skipped = torch.zeros((), dtype=torch.bool)
        self.grad_norm = torch.zeros(())
        self._parameters = [p for group in optim.param_groups for p in group["params"]]

    def step(self, data: Tensor, *args: Any, **kwargs: Any) -> float:  # noqa: ANN401
        """Takes one gradient step and returns the loss, as Pyro does: -ELBO of all of `data`."""
        return float(self.advance(data, *args, **kwargs))

    def advance(self, data: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """`step` without waiting for the device: a tensor, which the next step may overwrite."""
        self.optim.zero_grad(set_to_none=True)
        loss = self._loss_and_grads(data, args, kwargs)
        self._update(loss, len(data))
        return loss

    def _loss_and_grads(self, data: Tensor, args: Arguments, kwargs: Keywords) -> Tensor:
        """Leaves gradients in the parameters, which hold none, and returns the loss."""
        loss = self.loss.loss_and_grads(self.model, self.guide, data, *args, **kwargs)
        return self._parameters[0].new_tensor(loss)

    def _update(self, loss: Tensor, number: int) -> None:
        """Changes the weights by their gradients, clipped; `number` images went into the loss."""
        finite = loss.isfinite()
        for i, group in enumerate(self.optim.param_groups):
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            if not gradients:
                continue
            norm = nn.utils.get_total_norm(gradients)
            finite = finite & norm.isfinite()
            if i == 0:
                # The plate multiplies every cost, and so the gradient, by the number of images.
                self.grad_norm = norm / number
            if group.get("clip_grad_norm") is not None:
                bound = group["clip_grad_norm"] * number
                nn.utils.clip_grads_with_norm_(group["params"], bound, norm)
        self.skipped = ~finite
        if finite.is_cuda:  # to read it would be to wait for it
            # How torch.amp's GradScaler tells a fused optimiser to leave out a step.
            self.optim.found_inf = self.skipped.float()  # type: ignore[attr-defined]
            self.optim.step()
            del self.optim.found_inf  # type: ignore[attr-defined]
        elif finite:
            self.optim.step()


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
        model, guide, optim, loss: As for `SVI`.
        compiler: From the captured graph to what runs in its place.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: torch.optim.Optimizer,
        loss: Any,  # noqa: ANN401
        compiler: Compiler = inductor,
    ) -> None:
        super().__init__(model, guide, optim, loss)
        self.compiler = compiler
        self._compiled: dict[Any, LossAndGrads | None] = {}
        self._taken: Counter[Any] = Counter()  # steps on a GPU, until they are recorded
        self._recorded: dict[Any, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}
        optim.register_load_state_dict_post_hook(self._forget)

    def advance(self, data: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        if not data.is_cuda:
            return super().advance(data, *args, **kwargs)
        key = data.data_ptr(), *_key(data, args, kwargs)
        if key in self._recorded:
            graph, loss, self.skipped, self.grad_norm = self._recorded[key]
            graph.replay()
            return loss
        loss = super().advance(data, *args, **kwargs)
        self._taken[key] += 1
        compiled = self._compiled[_key(data, args, kwargs)] is not None
        if compiled and self._taken[key] == UNRECORDED_STEPS:
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

    def _record(
        self, data: Tensor, args: Arguments, kwargs: Keywords
    ) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]:
        """A step as a CUDA graph, its loss, `skipped` and `grad_norm`; nothing runs here."""
        for group in self.optim.param_groups:
            group["capturable"] = True
        last = self.skipped, self.grad_norm
        graph = torch.cuda.CUDAGraph()
        try:
            stream = torch.cuda.Stream(data.device)  # type: ignore[no-untyped-call]
            with torch.cuda.graph(graph, stream=stream):
                loss = super().advance(data, *args, **kwargs)
        except Exception as error:  # the device is in no state to go on
            raise RecordingError(f"no CUDA graph of the step: {_line(error)}") from error
        recorded = graph, loss, self.skipped, self.grad_norm
        self.skipped, self.grad_norm = last
        return recorded

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
