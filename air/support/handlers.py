"""Handlers that connect a model with Pyro's parameter store, or isolate it.

``pyro.infer.SVI`` trains the parameters that a model and its guide name by ``pyro.param``. AIR
names its parameters as they are named in the module ("decode.mlp.seq.0.weight"); Pyro's example
names them by ``pyro.module`` ("decode$$$mlp.seq.0.weight").
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import am_i_wrapped
from torch import nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing


def register_parameters(module: nn.Module) -> None:
    """Names a module's parameters by ``pyro.param``, as they are named in the module.

    Frozen parameters (``requires_grad=False``) are left out, as ``pyro.module`` leaves them out. A
    call without any of Pyro's handlers around it trains nothing, so it names nothing.

    Raises:
        ValueError: If the store has another tensor under one of the names. Pyro would train that
            tensor, and the module would keep its weights without a warning.
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
                f"Pyro's parameter store holds another tensor under the name {name}, of another "
                "AIR or of a file; call pyro.clear_param_store() before training a new model, and "
                "load weights by load_state_dict"
            )


class LocalParameters(Messenger):
    """Answers `register_parameters` with the module's own parameters, without Pyro's store.

    So several models can be used side by side in one process.
    """

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        if isinstance(msg["args"][-1], nn.Parameter):
            msg["value"], msg["done"] = msg["args"][-1], True


_one_at_a_time = threading.RLock()  # Pyro's handlers are those of the whole process


@contextmanager
def closed(module: nn.Module) -> Iterator[None]:
    """For the block, model and guide are plain functions of their arguments.

    Outer handlers see no site, Pyro's store stays as it is, no gradients are recorded (refinement
    asks for its own, also in inference mode), and the nets are in evaluation mode, so that batch
    normalisation keeps its statistics. Afterwards each net has its former mode. Threads take turns.
    """
    with _one_at_a_time, torch.inference_mode(False), torch.no_grad():
        training = [each for each in module.modules() if each.training]
        module.eval()
        try:
            with poutine.block(), LocalParameters():
                yield
        finally:
            for each in training:
                each.training = True
