"""Several processes train one model, each on a shard of the images, started by torchrun.

Every rank runs the same program with the same flags and files; rank 0 alone writes, draws and
prints. A rank draws its part of the batch from its shard, by random numbers of its own. One
all_reduce a step sums losses and gradients, so that all ranks take the same step. Not by
DistributedDataParallel, which hooks into a module's forward pass: Pyro's model and guide are
methods, and a captured step calls no module at all.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")
AllReduce = Callable[[Tensor], None]  # sums a tensor over all ranks, in place

# The other ranks wait while rank 0 evaluates and draws. The loss of a rank is noticed at once.
WAIT_FOR_RANK_0 = timedelta(days=1)
# The sums of a step wait for no evaluation. NCCL does not notice the loss of a rank otherwise.
WAIT_FOR_SUMS = timedelta(minutes=30)


class RankLostError(RuntimeError):
    """Another rank has ended or cannot be reached."""


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that train together; by default one process, where collectives do nothing.

    Attributes:
        rank: The number of this process.
        world_size: The number of processes.
        local_rank: The number of this process on its machine, and the index of its GPU; None where
            torchrun has not started it.
        gloo: The group that carries Python objects.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None
    gloo: "dist.ProcessGroup | None" = None  # quoted: some builds of torch have none

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes, draws and prints."""
        return self.rank == 0

    @property
    def all_reduce(self) -> AllReduce | None:
        """Sums a tensor over all ranks, in place; None for one process."""
        return _all_reduce if self.world_size > 1 else None

    def all_gather(self, value: Value) -> list[Value]:
        """The value of each rank, a plain Python object."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with _lost_ranks_noticed():
            dist.all_gather_object(values, value, group=self.gloo)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return any(self.all_gather(flag))

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Lets rank 0 run the block before the other ranks do."""
        if not self.is_main:
            self.all_gather(None)
        try:
            yield
        finally:
            if self.is_main:
                self.all_gather(None)

    def shard(self, rows: Any) -> Any:  # noqa: ANN401  # an array, a tensor, or rows in files
        """This rank's part of the rows of an array; the parts of all ranks make up the array.

        `draw_indices` draws one index from each stratum of the rows, and the strata of the shards
        are the strata of the whole. So batches are drawn as if by one process.
        """
        start = len(rows) * self.rank // self.world_size
        end = len(rows) * (self.rank + 1) // self.world_size
        part = rows[start:end]
        # A copy, so that the memory of the other shards is freed.
        return part.copy() if self.world_size > 1 and isinstance(part, np.ndarray) else part

    def seed(self, seed: int, step: int) -> int:
        """The seed of this rank's own random numbers from a step on."""
        sequence = np.random.SeedSequence([seed, step, self.rank, self.world_size])
        return int(sequence.generate_state(1)[0])


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """The group of the processes that torchrun started: by NCCL on GPUs, by Gloo on CPUs."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield SINGLE_PROCESS
        return
    has_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if has_gpus else "gloo"
    dist.init_process_group(backend, timeout=WAIT_FOR_SUMS)
    gloo = dist.new_group(backend="gloo", timeout=WAIT_FOR_RANK_0)
    group = ProcessGroup(
        dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]), gloo
    )
    try:
        yield group
    except BaseException as error:
        # Gloo's threads must end before the interpreter does, or the process aborts.
        if not has_gpus:
            dist.destroy_process_group()
        # NCCL, and so an ordinary exit, might wait for ranks that this one leaves in a collective.
        elif isinstance(error, SystemExit):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(error.code if isinstance(error.code, int) else 1)
        raise
    dist.destroy_process_group()


def _all_reduce(tensor: Tensor) -> None:
    with _lost_ranks_noticed():
        dist.all_reduce(tensor)


@contextmanager
def _lost_ranks_noticed() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the only type that the backends raise
        reason = str(error).strip().partition("\n")[0]
        raise RankLostError(f"another rank has ended or is out of reach ({reason})") from error
