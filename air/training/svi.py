"""The optimisation step: SVI driven by one ``torch.optim`` optimiser."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from air.air import AIR

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]
AllReduce = Callable[[Tensor], None]


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
    """``pyro.infer.SVI`` for one ``torch.optim`` optimiser: the same arguments, the same `step`.

    The parameters trained are those that `optim` holds. Pyro's global store of parameters is not
    asked, so several models train side by side. A loss or a gradient that is not finite never
    reaches the weights: such a step changes nothing. On a GPU the optimiser must be a fused one,
    for there the device itself leaves out the step.

    Args:
        model, guide, optim, loss: As for Pyro's.
        all_reduce: Where several processes train one model, each with images of its own, sums a
            tensor over all of them, in place. All then take the step of all images; None for one process.

    Attributes:
        number: Of the images that went into the last loss.
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
        all_reduce: AllReduce | None = None,
    ) -> None:
        self.model, self.guide = model, guide
        self.optim = optim
        self.loss = loss
        self.all_reduce = all_reduce
        self.number: int | Tensor = 0
        self.skipped = torch.zeros((), dtype=torch.bool)
        self.grad_norm = torch.zeros(())
        self._parameters = [p for group in optim.param_groups for p in group["params"]]

    def step(self, data: Tensor, *args: Any, **kwargs: Any) -> float:  # noqa: ANN401
        """Takes one gradient step and returns the loss, as Pyro does: -ELBO of all of `data`."""
        return float(self.step_async(data, *args, **kwargs))

    def step_async(self, data: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """`step` without waiting for the device: a tensor, which the next step may overwrite."""
        found = self._find(data, args, kwargs)
        if self.all_reduce is not None:
            self.all_reduce(found)
        return self._apply(found)

    def _find(self, data: Tensor, args: Arguments, kwargs: Keywords) -> Tensor:
        """The loss; with gradients and number of images in one tensor if they are to be added."""
        self.optim.zero_grad(set_to_none=True)
        loss = self._loss_and_grads(data, args, kwargs)
        self.number = kwargs.get("num_images") or len(data)
        if self.all_reduce is None:
            return loss
        gradients = [p.grad.flatten() for p in self._parameters if p.grad is not None]
        return torch.cat([*gradients, loss.view(1), torch.full_like(loss.view(1), self.number)])

    def _apply(self, found: Tensor) -> Tensor:
        """Takes the step of what `_find` gave, added up; returns the loss."""
        loss = found
        if self.all_reduce is not None:
            with_grads = [p for p in self._parameters if p.grad is not None]
            gradients = torch.split(found[:-2], [p.numel() for p in with_grads])
            for parameter, gradient in zip(with_grads, gradients, strict=True):
                parameter.grad = gradient.view_as(parameter)
            loss, self.number = found[-2:]
        self._update(loss)
        return loss

    def _loss_and_grads(self, data: Tensor, args: Arguments, kwargs: Keywords) -> Tensor:
        """Leaves gradients in the parameters, which hold none, and returns the loss."""
        loss = self.loss.loss_and_grads(self.model, self.guide, data, *args, **kwargs)
        return self._parameters[0].new_tensor(loss)

    def _update(self, loss: Tensor) -> None:
        """Changes the weights by their gradients, clipped."""
        finite = loss.isfinite()
        for i, group in enumerate(self.optim.param_groups):
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            if not gradients:
                continue
            # The plate multiplies every cost, and so the gradient, by the number of images.
            norm = nn.utils.get_total_norm(gradients) / self.number
            finite = finite & norm.isfinite()
            if i == 0:
                self.grad_norm = norm
            if (bound := group.get("clip_grad_norm")) is not None:
                nn.utils.clip_grads_with_norm_(group["params"], bound, norm)
        self.skipped = ~finite
        if finite.is_cuda:  # to read it would be to wait for it
            # How torch.amp's GradScaler tells a fused optimiser to leave out a step.
            self.optim.found_inf = self.skipped.float()  # type: ignore[attr-defined]
            self.optim.step()
            del self.optim.found_inf  # type: ignore[attr-defined]
        elif finite:
            self.optim.step()
