from collections.abc import Iterator

import pyro
import pytest
import torch

from air import AIR


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Seeds the generators, empties Pyro's store, and keeps torch to one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two on a busy machine can be ten times slower
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    torch.set_num_threads(threads)


def small_air(**arguments: object) -> AIR:
    """A small AIR in which nothing is square by accident."""
    sizes = {
        **{"num_steps": 3, "x_size": 12, "window_size": 7, "z_what_size": 5},
        **{"rnn_hidden_size": 11, "encoder_net": [9], "decoder_net": [8], "predict_net": [6]},
        **{"bl_predict_net": [4]},
    }
    return AIR(**{**sizes, **arguments})  # type: ignore[arg-type]


@pytest.fixture
def air() -> AIR:
    return small_air()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(10, 12, 12)
