"""The optimisation step: SVI driven by one ``torch.optim`` optimiser, and its compiled twin."""

import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from air.air import AIR

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]


def make_optimizer(
    air: AIR,
    learning_rate: float,
    baseline_learning_rate: float,
    clip_grad_norm: float | None = None,
) -> torch.optim.Adam:
    """Adam with two parameter groups: model and guide, and the baseline's nets.

    Args:
        air: Owns the parameters.
        learning_rate: For model and guide.
        baseline_learning_rate: For the parameters whose names begin with ``bl_``.
        clip_grad_norm: Bound on the joint norm of the gradients of model and guide, for a cost in
            nats per image; None for no bound. The baseline learns by a regression of its own.
    """
    baseline = [p for name, p in air.named_parameters() if name.startswith("bl_")]
    others = [p for name, p in air.named_parameters() if not name.startswith("bl_")]
    # Pyro's own optimisers keep one torch.optim object per parameter; one for all is faster.
    groups: list[dict[str, Any]] = [
        {"params": others, "lr": learning_rate, "clip_grad_norm": clip_grad_norm},
        {"params": baseline, "lr": baseline_learning_rate},
    ]
    return torch.optim.Adam(groups, fused=True)


class SVI:
    """``pyro.infer.SVI`` for a ``torch.optim`` optimiser: the same arguments, the same `step`.

    The parameters trained are those that `optim` holds. Pyro's global store of parameters is not
    asked, so several models train side by side.
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

    def step(self, data: Tensor, *args: Any, **kwargs: Any) -> float:  # noqa: ANN401
        """Takes one gradient step and returns the loss, as Pyro does: -ELBO of all of `data`.

        Raises:
            FloatingPointError: If the loss is not finite; the weights stay as they were.
        """
        self.optim.zero_grad(set_to_none=True)
        loss = self._loss_and_grads(data, args, kwargs)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}; lower the learning rate")
        for group in self.optim.param_groups:
            bound = group.get("clip_grad_norm")
            if bound is not None:
                # The plate multiplies every cost, and so the gradient, by the number of images.
                nn.utils.clip_grad_norm_(group["params"], bound * len(data))
        self.optim.step()
        return loss

    def _loss_and_grads(self, data: Tensor, args: Arguments, kwargs: Keywords) -> float:
        """Leaves gradients in the parameters, which hold none, and returns the loss."""
        loss: float = self.loss.loss_and_grads(self.model, self.guide, data, *args, **kwargs)
        return loss


def inductor(graph: fx.GraphModule) -> Callable[..., Any]:
    """Compiles by Inductor, with the random numbers that the graph would draw uncompiled."""
    return torch.compile(graph, options={"fallback_random": True})


class CompiledSVI(SVI):
    """`SVI` whose gradients are captured once and compiled: the same numbers, without the Python.

    At the first step the program runs once under ``make_fx``: model, guide, ELBO and backward pass
    leave a graph of some 2,000 tensor operations, which is compiled and from then on runs instead.
    It reads the parameters, and other tensors that the program holds, anew at every step: change
    those in place. Data of another shape and other arguments are captured anew.

    Where a step cannot be captured or compiled, it runs uncompiled, after one warning.

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
        compiler: Callable[[fx.GraphModule], Callable[..., Any]] = inductor,
    ) -> None:
        super().__init__(model, guide, optim, loss)
        self.compiler = compiler
        self._parameters = [p for group in optim.param_groups for p in group["params"]]
        self._compiled: dict[Any, Callable[..., Any] | None] = {}

    def _loss_and_grads(self, data: Tensor, args: Arguments, kwargs: Keywords) -> float:
        key = data.shape, data.dtype, data.device, args, tuple(kwargs.items())
        if key not in self._compiled:
            self._compiled[key] = self._capture(data, args, kwargs)
        compiled = self._compiled[key]
        if compiled is None:
            return super()._loss_and_grads(data, args, kwargs)
        with torch.no_grad():
            loss, *gradients = compiled(data)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return float(loss)

    def _capture(
        self, data: Tensor, args: Arguments, kwargs: Keywords
    ) -> Callable[..., Any] | None:
        """The compiled step, or None where there can be none; draws no random numbers."""

        def step(data: Tensor) -> tuple[Tensor | None, ...]:
            # What loss_and_grads does, up to the point where the loss becomes a number.
            elbo, surrogate_loss = self.loss._loss_and_surrogate_loss(
                self.model, self.guide, (data, *args), kwargs
            )
            return -elbo, *torch.autograd.grad(surrogate_loss, self._parameters, allow_unused=True)

        devices = [data.device] if data.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own, about its own code
                compiled = self.compiler(make_fx(step)(data))
                with torch.no_grad():
                    compiled(data)  # compiles
        except Exception as error:  # of any kind: compilers and their tools fail in many ways
            reason = str(error).strip().partition("\n")[0]
            logging.getLogger("air").warning(
                "steps run uncompiled: %s: %s", type(error).__name__, reason
            )
            return None
        return compiled
