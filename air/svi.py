"""The optimisation step: Pyro's SVI driven by one ``torch.optim`` optimiser."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from air.air import AIR


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
        loss: float = self.loss.loss_and_grads(self.model, self.guide, data, *args, **kwargs)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}; lower the learning rate")
        for group in self.optim.param_groups:
            bound = group.get("clip_grad_norm")
            if bound is not None:
                # The plate multiplies every cost, and so the gradient, by the number of images.
                nn.utils.clip_grad_norm_(group["params"], bound * len(data))
        self.optim.step()
        return loss
