"""A model's parameters in Pyro's parameter store, which is global: one name, one tensor.

``pyro.infer.SVI`` trains the parameters that a model and its guide name by ``pyro.param``. AIR
names its parameters as they are named in the module, where Pyro's example has
``pyro.module("decode", net)`` and so "decode$$$mlp.seq.0.weight".
"""

import logging
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import pyro
import torch
from pyro.params.param_store import normalize_param_name
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils.weak import WeakTensorKeyDictionary

# The tensors that were registered here. The value is a part of the store as it was then, which
# `pyro.clear_param_store` replaces by a new one.
_registered: MutableMapping[Tensor, object] = WeakTensorKeyDictionary()
_is_unregistered = ContextVar("_is_unregistered", default=False)


@contextmanager
def unregistered() -> Iterator[None]:
    """Within the block, no module is registered: for a copy, which would take over the names."""
    token = _is_unregistered.set(True)
    try:
        yield
    finally:
        _is_unregistered.reset(token)


def register_parameters(module: nn.Module) -> None:
    """Registers a module's parameters with Pyro, under the names they have in the module.

    Frozen parameters (``requires_grad=False``) are left out, as ``pyro.module`` leaves them out.

    Values that were loaded or set in the store are copied into the module's parameters. If a name
    in the store belongs to another module of this process, this module takes over the name:
    otherwise Pyro would go on training the other module without a warning.

    Raises:
        ValueError: If a loaded value has another shape than the parameter.
    """
    if _is_unregistered.get():
        return
    store = pyro.get_param_store()
    parameters = dict(module.named_parameters())
    others = {
        name: tensor
        for name, tensor in store.named_parameters()
        if parameters.get(normalize_param_name(name), tensor) is not tensor
    }
    if others:
        _replace(others, parameters)
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            if not parameter.is_contiguous():  # Pyro would train a contiguous copy in its place
                with disable_proxy_modes_tracing():
                    parameter.data = parameter.data.contiguous()
            pyro.param(name, parameter)
    for name, tensor in store.named_parameters():
        if name in parameters and _registered.get(tensor) is not store._constraints:
            _registered[tensor] = store._constraints


def _replace(others: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Puts these parameters in the places of the store's other tensors, after restoring values."""
    store = pyro.get_param_store()
    loaded = _loaded_names(others, parameters)
    values = {normalize_param_name(name): store[name] for name in loaded}
    # A name in the form of the module comes before the same name in the form of `pyro.module`.
    values |= {name: store[name] for name in loaded if name in parameters}
    _restore(values, parameters)
    for name, tensor in others.items():
        if name not in parameters and name not in loaded:
            continue
        if store.param_name(tensor) != name:  # it has a second name, and `del` would fail
            store[name] = store[name].detach().clone()
        del store[name]
    for name in {normalize_param_name(name) for name in others}:
        parameter = parameters[name]
        if not parameter.requires_grad:  # kept, so that a saved store holds the whole model
            store[name] = parameter
            parameter.requires_grad_(False)


def _loaded_names(
    others: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
) -> Sequence[str]:
    """Names in the store whose tensors are values to restore, and not those of another module."""
    store = pyro.get_param_store()
    loaded = [name for name, tensor in others.items() if tensor not in _registered]
    # A tensor that was registered before the store was cleared came back by `set_state`: as the
    # values for a new model, or because the block of a ``store.scope()`` has ended.
    returned = [
        name
        for name, tensor in others.items()
        if _registered.get(tensor, store._constraints) is not store._constraints
        and parameters[normalize_param_name(name)] not in _registered
    ]
    if returned:
        logging.getLogger("air").warning(
            "a new model takes the weights of another one from the state of Pyro's parameter "
            "store; for weights of its own, call pyro.clear_param_store() first"
        )
    return loaded + returned


def _restore(values: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Copies values into the parameters of these names, all of them or none."""
    for name, value in values.items():
        if value.shape != parameters[name].shape:
            raise ValueError(
                f"Pyro's parameter store holds {name} of shape {list(value.shape)}, but the "
                f"model's is of shape {list(parameters[name].shape)}; load the store for an AIR of "
                "the sizes with which it was saved, or call pyro.clear_param_store() for new "
                "weights"
            )
    # Once, and not at every step of a program that is being captured.
    with torch.no_grad(), disable_proxy_modes_tracing():
        for name, value in values.items():
            parameters[name].copy_(value)
