"""Who sees a model's parameters and sites: Pyro's parameter store, outer handlers, or nobody."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import am_i_wrapped
from torch import nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing


def register_parameters(module: nn.Module) -> None:
    """Registers a module's parameters in Pyro's parameter store, for ``pyro.infer.SVI``.

    Their names are those in the module. Frozen parameters (``requires_grad=False``) are left out,
    as ``pyro.module`` leaves them out. A call without any handler of Pyro around it trains nothing,
    so nothing is registered.

    Raises:
        ValueError: If the store holds other tensors under these names.
    """
    if not am_i_wrapped():
        return
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if not parameter.is_contiguous():  # Pyro would train a contiguous copy in its place
            with disable_proxy_modes_tracing():
                parameter.data = parameter.data.contiguous()
        if pyro.param(name, parameter) is not parameter:
            raise ValueError(
                f"Pyro's parameter store holds another tensor under the name {name}, which Pyro "
                "would train in place of this model's; call pyro.clear_param_store() before you "
                "use a new model, and load saved weights by load_state_dict"
            )


class LocalParameters(Messenger):
    """Keeps the parameters of the models that run inside out of Pyro's parameter store."""

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        msg["value"], msg["done"] = msg["args"][1], True


class _Hidden(LocalParameters):
    """Hides all sites from the handlers outside, too."""

    def _process_message(self, msg: Any) -> None:  # noqa: ANN401
        super()._process_message(msg)
        msg["stop"] = True


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Sets all nets to evaluation mode; each has its former mode afterwards."""
    modes = [(net, net.training) for net in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for net, training in modes:
            net.training = training


@contextmanager
def closed(module: nn.Module) -> Iterator[None]:
    """For a function of images: it gives the same result whatever surrounds it, and adds nothing.

    Inside, nets are in evaluation mode, no gradient is recorded, parameters stay out of Pyro's
    parameter store, and Pyro's handlers outside do not see any site.
    """
    with evaluating(module), torch.no_grad(), _Hidden():
        yield
