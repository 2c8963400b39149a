"""Pyro's store: the names go to the module that runs."""

import pyro
from torch import nn

from air.param_store import register_parameters


def test_names_go_to_the_module_that_runs() -> None:
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    for module in (one, one, other, one):
        register_parameters(module)
        store = pyro.get_param_store()
        assert store["weight"] is module.weight
        assert store["bias"] is module.bias
