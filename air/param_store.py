"""Pyro's global store of parameters, where every AIR of a process uses the same names."""

import pyro
from torch import nn


def register_parameters(module: nn.Module) -> None:
    """Tells Pyro which parameters to train, under the names they have in this module.

    Where a name in the store belongs to another module, Pyro would go on training that one without
    a word; so the name goes to the module that runs.
    """
    store = pyro.get_param_store()
    for name, parameter in module.named_parameters():
        if name in store and store[name] is not parameter:
            del store[name]
        pyro.param(name, parameter)
