"""The device that a command line names, and the settings of torch and Pyro for a run."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import torch

from air.training.ranks import local_rank


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA if available, and otherwise the CPU.

    Under torchrun, each process takes the GPU of its local rank.

    Returns:
        The device. A GPU becomes the current one of this process, as a CUDA graph needs it.

    Raises:
        ValueError: If this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if local_rank() is not None and name.startswith("cuda"):
        if name != "cuda":
            raise ValueError(f"--device: expected cuda, so each process takes its GPU, got {name}")
        name = f"cuda:{local_rank()}"
    if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
        expected = "expected auto, cpu, cuda, cuda:1, ... or mps"
        raise ValueError(f"--device: cannot use {name!r}: {expected}")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:  # NotImplementedError is a RuntimeError
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device: cannot use {name!r} on this machine: {reason}") from error
    return device


@contextmanager
def torch_settings_of_a_run() -> Iterator[None]:
    """In the block, Pyro checks nothing; after it, torch and Pyro have their former settings.

    So have the random number generators of the CPU. Pyro's checks would read from the device at
    every site of every step.
    """
    threads, random_state = torch.get_num_threads(), pyro.util.get_rng_state()
    try:
        with pyro.validation_enabled(False):
            yield
    finally:
        torch.set_num_threads(threads)
        pyro.util.set_rng_state(random_state)
