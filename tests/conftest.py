import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyro
import pytest
import torch

from air import AIR


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Seeds the generators, empties Pyro's store, and keeps torch to one thread.

    Afterwards the threads and Pyro's validation, which the program changes, are as before.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two on a busy machine can be ten times slower
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pyro.validation_enabled():
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


@contextlib.contextmanager
def visdom_server(folder: Path) -> Iterator[tuple[int, "subprocess.Popen[bytes]"]]:
    """A real server on a free port, with its environments in that folder."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    options = f"port={port}, env_path={str(folder)!r}, bind_local=True, base_url=''"
    code = f"from visdom.server.run_server import start_server; start_server({options})"
    with subprocess.Popen([sys.executable, "-c", code], stdout=-3, stderr=-3) as server:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        try:
            yield port, server
        finally:
            server.kill()


def ask(url: str, body: bytes | None = None) -> str:
    """What a server on this machine answers, at port/path."""
    with urllib.request.urlopen(f"http://127.0.0.1:{url}", body, timeout=20) as answer:
        return str(answer.read().decode())
