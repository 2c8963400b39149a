"""The optimisation step: SVI driven by one ``torch.optim`` optimiser."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.infer import TraceGraph_ELBO
from torch import Tensor, nn

from air.air import AIR
from air.support.handlers import LocalParameters
from air.training.ranks import sum_over_ranks, world_size
from air.training.step_stats import StepStats

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]


def make_optimizer(
    air: AIR,
    learning_rate: float,
    baseline_learning_rate: float,
    clip_grad_norm: float | None = None,
) -> torch.optim.Adam:
    """Fused Adam with two parameter groups: model and guide, and the baseline's nets.

    Parameters that are frozen now (``requires_grad=False``) are left out. The learning rates are
    tensors on the parameters' device, to be changed in place.

    Args:
        air: Owns the parameters.
        learning_rate: For model and guide.
        baseline_learning_rate: For `AIR.baseline_parameters`.
        clip_grad_norm: Bound on the joint norm of the gradients of model and guide, for a cost in
            nats per image; None for no bound. The baseline's gradients are not clipped.
    """
    is_baseline = {id(parameter) for parameter in air.baseline_parameters()}
    trainable = [parameter for parameter in air.parameters() if parameter.requires_grad]
    baseline = [parameter for parameter in trainable if id(parameter) in is_baseline]
    others = [parameter for parameter in trainable if id(parameter) not in is_baseline]
    rates = torch.tensor([learning_rate, baseline_learning_rate], device=air.h_init.device)
    # Pyro's own optimisers keep one torch.optim object per parameter; one for all is faster.
    groups: list[dict[str, Any]] = [
        {"params": others, "lr": rates[0].clone(), "clip_grad_norm": clip_grad_norm},
        {"params": baseline, "lr": rates[1].clone()},
    ]
    return torch.optim.Adam(groups, fused=True)


class StepResult(NamedTuple):
    """The results of a step before it changes the weights; its gradients are the parameters'."""

    loss: Tensor  # -ELBO of all images
    num_images: int | Tensor  # of the loss
    grad_norm: Tensor
    skipped: Tensor
    sums: Tensor  # `StepStats.sums` with this step


class SVI:
    """``pyro.infer.SVI`` for one ``torch.optim`` optimiser: the same arguments, the same `step`.

    It trains the parameters that `optim` holds, and does not use Pyro's global store for those of
    an AIR, so that several models train side by side. Freeze parameters before the optimiser is
    made. Under `joined_ranks`, each rank gives its own images, and all ranks take the step of the
    joined batch.

    A step whose loss or gradients are not finite is skipped: it changes no weight. On a GPU the
    optimiser must be a fused one, which skips the step on the device.

    Args:
        model, guide, optim, loss: As for Pyro's.

    Attributes:
        num_images: Size of the data set in the last loss.
        skipped: Whether the last step was skipped, a tensor of one bool.
        grad_norm: Norm of its gradient before clipping, over the optimiser's first group of
            parameters and for a cost per image, a tensor of one number.
        stats: Sums over the steps.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: torch.optim.Optimizer,
        loss: Any,  # noqa: ANN401  # an ELBO with loss_and_grads
    ) -> None:
        self.model = model
        self.guide = guide
        self.optim = optim
        self.loss = loss
        self.num_images: int | Tensor = 0
        self.skipped = torch.zeros((), dtype=torch.bool)
        self.grad_norm = torch.zeros(())
        self._parameters = [p for group in optim.param_groups for p in group["params"]]
        devices = [p.device for p in self._parameters] or [torch.device("cpu")]
        self.stats = StepStats(devices[0])

    def step(self, data: Tensor, *args: Any, **kwargs: Any) -> float:  # noqa: ANN401
        """Takes one gradient step and returns the loss, as Pyro does: -ELBO of all of `data`."""
        return float(self.step_async(data, *args, **kwargs))

    def step_async(self, data: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """`step` that does not wait for the device.

        On a GPU the next step may overwrite the tensor, and `grad_norm` and `skipped`.

        Raises:
            ValueError: If every parameter of the loss is frozen.
        """
        self.optim.zero_grad(set_to_none=True)
        found = self._before_sum(data, args, kwargs)
        result = found if isinstance(found, StepResult) else self._after_sum(found)
        loss, self.num_images, self.grad_norm, self.skipped, sums = result
        self.stats.sums.copy_(sums)
        if self.skipped.is_cuda:  # reading it would wait for the device
            # How torch.amp's GradScaler tells a fused optimiser to leave out a step.
            self.optim.found_inf = self.skipped.float()  # type: ignore[attr-defined]
            self.optim.step()
            del self.optim.found_inf  # type: ignore[attr-defined]
        elif not self.skipped:
            self.optim.step()
        return loss

    def _before_sum(self, data: Tensor, args: Arguments, kwargs: Keywords) -> StepResult | Tensor:
        """The step but for the update; with several ranks, the part before they sum gradients.

        Returns:
            With several ranks the tensor to sum. Nothing changes but the gradients, so that
            `CompiledSVI` can compile the method.
        """
        loss = self._loss_and_grads(data, args, kwargs)
        num_images = kwargs.get("num_images") or len(data)
        if world_size() == 1:
            return self._clip(loss, num_images)
        # Gradients, loss and number of images as one flat tensor.
        gradients = [p.grad.flatten() for p in self._parameters if p.grad is not None]
        return torch.cat([*gradients, loss.view(1), torch.full_like(loss.view(1), num_images)])

    def _after_sum(self, flat: Tensor) -> StepResult:
        """Sums the tensor of `_before_sum` over the ranks; the rest of the step but the update."""
        sum_over_ranks(flat)
        with_grads = [p for p in self._parameters if p.grad is not None]
        gradients = torch.split(flat[:-2], [p.numel() for p in with_grads])
        for parameter, gradient in zip(with_grads, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter)
        return self._clip(*flat[-2:])

    def _loss_and_grads(self, data: Tensor, args: Arguments, kwargs: Keywords) -> Tensor:
        """Leaves gradients in the parameters, which have none, and returns the loss."""
        if type(self.loss) is not TraceGraph_ELBO:
            with LocalParameters():
                loss = self.loss.loss_and_grads(self.model, self.guide, data, *args, **kwargs)
            return self._parameters[0].new_tensor(loss)
        elbo, surrogate_loss = self._elbo_and_surrogate_loss(data, args, kwargs)
        surrogate_loss.backward()  # type: ignore[no-untyped-call]
        return -elbo.detach()

    def _elbo_and_surrogate_loss(
        self, data: Tensor, args: Arguments, kwargs: Keywords
    ) -> tuple[Tensor, Tensor]:
        # As TraceGraph_ELBO.loss_and_grads, which makes a number of the loss: that would wait for
        # the device.
        with LocalParameters():
            elbo, surrogate_loss = self.loss._loss_and_surrogate_loss(
                self.model, self.guide, (data, *args), kwargs
            )
        if not surrogate_loss.requires_grad:
            raise ValueError(
                "there is nothing to train: every parameter of the loss is frozen; unfreeze some "
                "by requires_grad_(True) before the optimiser is made"
            )
        return elbo, surrogate_loss

    def _clip(self, loss: Tensor, num_images: int | Tensor) -> StepResult:
        """Clips the gradients, and checks whether they and the loss are finite."""
        finite, grad_norm = loss.isfinite(), torch.zeros_like(loss)
        for i, group in enumerate(self.optim.param_groups):
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            if not gradients:
                continue
            # The plate multiplies every cost, and so the gradient, by the number of images.
            norm = nn.utils.get_total_norm(gradients) / num_images
            finite = finite & norm.isfinite()
            if i == 0:
                grad_norm = norm
            if (bound := group.get("clip_grad_norm")) is not None:
                nn.utils.clip_grads_with_norm_(group["params"], bound, norm)
        sums = self.stats.with_step(-loss / num_images, grad_norm, ~finite)
        return StepResult(loss, num_images, grad_norm, ~finite, sums)
