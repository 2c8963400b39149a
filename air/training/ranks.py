"""Training by several processes (ranks), which torchrun starts; each runs the same program.

A rank draws its part of every batch from its shard of the images, by random numbers of its own. One
all_reduce a step sums gradients and losses, so that all ranks take the same step and have the same
weights. Rank 0 alone writes, draws and prints. If a rank fails, torchrun ends the others. Without
torchrun there is one rank.

DistributedDataParallel cannot be used: it hooks into a module's forward pass, but Pyro's model and
guide are methods, and a captured step calls no module at all.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


@contextmanager
def joined_ranks() -> Iterator[None]:
    """For the block, joins the ranks that torchrun started: by NCCL on GPUs, by Gloo on CPUs."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield
        return
    has_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    # Keys of an earlier attempt of torchrun, with addresses of ended processes, are left aside.
    store, own_rank, number = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    store = dist.PrefixStore(f"attempt_{restarts()}", store)  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if has_gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=own_rank, world_size=number)
    try:
        yield
    except BaseException:
        if not has_gpus:  # NCCL might wait for the other ranks; Gloo's threads must end before exit
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def restarts() -> int:
    """How often torchrun has started this process again, after one had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def _is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if _is_joined() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if _is_joined() else 1


def local_rank() -> int | None:
    """The number of this process on its machine, and of its GPU; None without torchrun."""
    return int(os.environ["LOCAL_RANK"]) if _is_joined() else None


def is_main() -> bool:
    """Whether this is rank 0, which writes, draws and prints."""
    return rank() == 0


def sum_over_ranks(tensor: Tensor) -> None:
    """Sums a tensor over all ranks, in place.

    Raises:
        ConnectionError: If another rank has exited.
    """
    if world_size() == 1:
        return
    try:
        dist.all_reduce(tensor)
    except RuntimeError as error:  # the only type that the backends raise
        reason = str(error).strip().partition("\n")[0]
        raise ConnectionError(f"another rank has exited or cannot be reached ({reason})") from error


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; all ranks must call it at the same step."""
    flags = torch.tensor(int(flag))
    sum_over_ranks(flags)
    return bool(flags)


def shard(rows: Any) -> Any:  # noqa: ANN401  # a tensor or an array
    """This rank's part of the rows; the parts of all ranks make up the rows.

    `draw_indices` draws one index from each stratum of the rows, and the strata of the shards are
    the strata of all rows. So batches are drawn as if by one process.
    """
    number = world_size()
    return rows[len(rows) * rank() // number : len(rows) * (rank() + 1) // number]


def seed_of_step(seed: int, step: int) -> int:
    """The seed of this rank's random numbers in a step, from which a resumed run draws the same."""
    sequence = np.random.SeedSequence([seed, step, rank(), world_size()])
    return int(sequence.generate_state(1)[0])
