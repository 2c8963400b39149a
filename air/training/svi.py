"""The optimisation step: SVI driven by one ``torch.optim`` optimiser."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.infer import TraceGraph_ELBO
from torch import Tensor, nn

from air.air import AIR
from air.support_handlers import LocalParameters
from air.training.parallel import AllReduce
from air.training.step_stats import StepStats

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]


class TrainableAdam(torch.optim.Adam):
    """Adam of the parameters that are not frozen, to which the others can be added later.

    Args:
        groups: Parameter groups, frozen parameters included.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self._left_out = [[p for p in g["params"] if not p.requires_grad] for g in groups]
        trainable = [[p for p in g["params"] if p.requires_grad] for g in groups]
        super().__init__(
            [{**g, "params": params} for g, params in zip(groups, trainable, strict=True)],
            fused=True,
        )

    def add(self, wanted: Callable[[nn.Parameter], bool]) -> None:
        """Adds those of the parameters left out that are wanted."""
        for group, left_out in zip(self.param_groups, self._left_out, strict=True):
            if added := [p for p in left_out if wanted(p)]:
                group["params"].extend(added)
                left_out[:] = [p for p in left_out if not wanted(p)]


def make_optimizer(
    air: AIR,
    learning_rate: float,
    baseline_learning_rate: float,
    clip_grad_norm: float | None = None,
) -> TrainableAdam:
    """Adam with two parameter groups: model and guide, and the baseline's nets.

    Frozen parameters (``requires_grad=False``) are left out. `SVI` adds those that are no longer
    frozen at a later step. The rates are tensors on the parameters' device, to be changed in place.

    Args:
        air: Owns the parameters.
        learning_rate: For model and guide.
        baseline_learning_rate: For `AIR.baseline_parameters`.
        clip_grad_norm: Bound on the joint norm of the gradients of model and guide, for a cost in
            nats per image; None for no bound. The baseline's gradients are not clipped.
    """
    baseline = air.baseline_parameters()
    is_baseline = {id(parameter) for parameter in baseline}
    others = [parameter for parameter in air.parameters() if id(parameter) not in is_baseline]
    rates = torch.tensor([learning_rate, baseline_learning_rate], device=air.h_init.device)
    # Pyro's own optimisers keep one torch.optim object per parameter; one for all is faster.
    groups: list[dict[str, Any]] = [
        {"params": others, "lr": rates[0].clone(), "clip_grad_norm": clip_grad_norm},
        {"params": baseline, "lr": rates[1].clone()},
    ]
    return TrainableAdam(groups)


class StepResult(NamedTuple):
    """What a step finds out before it changes the weights; its gradients are the parameters'."""

    loss: Tensor  # -ELBO of all images
    num_images: int | Tensor  # of the loss
    grad_norm: Tensor
    skipped: Tensor
    sums: Tensor  # `StepStats.sums` with this step


class SVI:
    """``pyro.infer.SVI`` for one ``torch.optim`` optimiser: the same arguments, the same `step`.

    It trains the parameters that `optim` holds, except frozen ones, and does not use Pyro's global
    store, so that several models train side by side. Parameters can be frozen and unfrozen between
    steps; with several processes, the same ones in each.

    A step whose loss or gradients are not finite is skipped: it changes no weight. On a GPU the
    optimiser must be a fused one, which skips the step on the device.

    Args:
        model, guide, optim, loss: As for Pyro's.
        all_reduce: Sums a tensor over all ranks, in place, where several processes train one model
            on different images; None for one process. All ranks take the step of the joined batch.

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
        all_reduce: AllReduce | None = None,
    ) -> None:
        self.model = model
        self.guide = guide
        self.optim = optim
        self.loss = loss
        self.all_reduce = all_reduce
        self.num_images: int | Tensor = 0
        self.skipped = torch.zeros((), dtype=torch.bool)
        self.grad_norm = torch.zeros(())
        parameters = (p for group in optim.param_groups for p in group["params"])
        self.stats = StepStats(next((p.device for p in parameters), torch.device("cpu")))
        self._parameters = self._trainable()  # those that the present step trains

    def step(self, data: Tensor, *args: Any, **kwargs: Any) -> float:  # noqa: ANN401
        """Takes one gradient step and returns the loss, as Pyro does: -ELBO of all of `data`."""
        return float(self.step_async(data, *args, **kwargs))

    def step_async(self, data: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """`step` that does not wait for the device. The next step may overwrite the tensor.

        Raises:
            ValueError: If every parameter is frozen.
        """
        self._find_trainable()
        self.optim.zero_grad(set_to_none=True)
        found = self._before_reduce(data, args, kwargs)
        if self.all_reduce is not None:
            self.all_reduce(found)
        return self._after_reduce(found)

    def _find_trainable(self) -> None:
        """Takes notice of parameters that were frozen or unfrozen since the last step."""
        trainable = self._trainable()
        if not trainable:
            raise ValueError(
                "there is nothing to train: every parameter of the optimiser is frozen; unfreeze "
                "some by requires_grad_(True)"
            )
        if [*map(id, trainable)] != [*map(id, self._parameters)]:
            # A program traced by torch.jit holds frozen parameters as constants.
            for name in ("_jit_loss_and_surrogate_loss", "_loss_and_surrogate_loss"):
                vars(self.loss).pop(name, None)
        self._parameters = trainable

    def _trainable(self) -> list[nn.Parameter]:
        if isinstance(self.optim, TrainableAdam):
            self.optim.add(lambda parameter: parameter.requires_grad)
        groups = self.optim.param_groups
        return [p for group in groups for p in group["params"] if p.requires_grad]

    def _before_reduce(self, data: Tensor, args: Arguments, kwargs: Keywords) -> Any:  # noqa: ANN401
        """The part of a step before the ranks' all_reduce; for one process, all but the update.

        Returns:
            A `StepResult`, or with several ranks the tensor that they sum. Nothing changes but the
            gradients, so that `CompiledSVI` can compile the method.
        """
        loss = self._loss_and_grads(data, args, kwargs)
        num_images = kwargs.get("num_images") or len(data)
        if self.all_reduce is None:
            return self._clip(loss, num_images)
        # Gradients, loss and number of images as one flat tensor.
        gradients = [p.grad.flatten() for p in self._parameters if p.grad is not None]
        return torch.cat([*gradients, loss.view(1), torch.full_like(loss.view(1), num_images)])

    def _after_reduce(self, found: Any) -> Tensor:  # noqa: ANN401
        """The rest of the step: changes the weights, and returns the loss."""
        if self.all_reduce is not None:
            with_grads = [p for p in self._parameters if p.grad is not None]
            gradients = torch.split(found[:-2], [p.numel() for p in with_grads])
            for parameter, gradient in zip(with_grads, gradients, strict=True):
                parameter.grad = gradient.view_as(parameter)
            found = self._clip(*found[-2:])
        loss, self.num_images, self.grad_norm, self.skipped, sums = found
        self.stats.sums.copy_(sums)
        if self.skipped.is_cuda:  # reading it would wait for the device
            # How torch.amp's GradScaler tells a fused optimiser to leave out a step.
            self.optim.found_inf = self.skipped.float()  # type: ignore[attr-defined]
            self.optim.step()
            del self.optim.found_inf  # type: ignore[attr-defined]
        elif not self.skipped:
            self.optim.step()
        return loss

    def _loss_and_grads(self, data: Tensor, args: Arguments, kwargs: Keywords) -> Tensor:
        """Leaves gradients in the parameters, which have none, and returns the loss."""
        if type(self.loss) is not TraceGraph_ELBO:
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
            return self.loss._loss_and_surrogate_loss(self.model, self.guide, (data, *args), kwargs)

    def _clip(self, loss: Tensor, num_images: int | Tensor) -> StepResult:
        """Clips the gradients, and looks at whether they and the loss are finite."""
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
