"""Handlers that connect a model with Pyro's parameter store, or isolate it.

``pyro.infer.SVI`` trains the parameters that a model and its guide name by ``pyro.param``. AIR
names its parameters as they are named in the module ("decode.mlp.seq.0.weight"); Pyro's example
names them by ``pyro.module`` ("decode$$$mlp.seq.0.weight").
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pyro
import torch
from pyro.poutine import runtime
from pyro.poutine.messenger import Messenger
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
    if not runtime.am_i_wrapped():
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


_one_at_a_time = threading.RLock()  # Pyro's handlers are those of the whole process


class LocalParameters(Messenger):
    """Answers `register_parameters` with the module's own parameters, without Pyro's store.

    So several models can be used side by side in one process. Threads take turns.
    """

    def __enter__(self) -> "LocalParameters":
        _one_at_a_time.acquire()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:  # noqa: ANN401
        try:
            super().__exit__(*error)
        finally:
            _one_at_a_time.release()

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        if isinstance(msg["args"][-1], torch.Tensor):  # of a script, parameters are plain tensors
            msg["value"], msg["done"] = msg["args"][-1], True


@contextmanager
def _without_handlers() -> Iterator[None]:
    """Hides the handlers around the block; `poutine.block` would leave the dimensions of plates."""
    lists: tuple[list[Any], list[Any]] = runtime._PYRO_STACK, runtime._DIM_ALLOCATOR._stack
    former = [[*each] for each in lists]
    for each in lists:
        each.clear()
    try:
        yield
    finally:
        for each, items in zip(lists, former, strict=True):
            each[:] = items


@contextmanager
def closed(module: nn.Module) -> Iterator[None]:
    """For the block, model and guide are plain functions of their arguments.

    Outer handlers see no site, Pyro's store stays as it is, no gradients are recorded (refinement
    asks for its own, also in inference mode), no precision is lowered, and the nets are in
    evaluation mode, so that batch normalisation keeps its statistics. Afterwards each net has its
    former mode. Threads take turns, also with steps of `air.training.svi.SVI`, but not with those
    of Pyro's own SVI: a display beside it needs another process.
    """
    device = next((p.device.type for p in module.parameters()), "cpu")
    can_be_low = torch.amp.is_autocast_available(device)
    full_precision = torch.autocast(device, enabled=False) if can_be_low else nullcontext()
    with _one_at_a_time, torch.inference_mode(False), torch.no_grad(), full_precision:
        training = [each for each in module.modules() if each.training]
        module.eval()
        try:
            with _without_handlers(), LocalParameters():
                yield
        finally:
            for each in training:
                each.training = True
