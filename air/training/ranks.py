"""The processes that train one model together, each on a part of its images; mostly but one.

A plain start is a group of one and needs nothing of ``torch.distributed``; what torchrun starts is
`distributed.TorchrunRanks`.
"""

import os
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from air.training.trainer import Trainer

Value = TypeVar("Value")
Config = Mapping[str, Any]
# From every flag's value to what trains, and the SHA-256 of its scenes.
Assemble = Callable[[Config, "Ranks"], "tuple[Trainer, str]"]


class RankLostError(RuntimeError):
    """Another of the processes is gone, and with it the run."""


class Ranks:
    """A group of one process, which leads itself.

    Attributes:
        rank: The number of this process; 0 leads: it alone reads flags, writes, draws and prints.
        size: How many there are.
        local_rank: Its number on this machine, and that of its GPU; None where it may choose.
    """

    rank: int = 0
    size: int = 1
    local_rank: int | None = None

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Lets the others go."""

    def others_wait(self) -> None:
        """Tells that the others wait for what rank 0 will have them do."""

    def lead(self, config: Config, sha256: str, state: Mapping[str, Any]) -> None:
        """Makes the others ready to begin from the `Trainer.state_dict` of rank 0.

        Raises:
            ValueError: If one of them cannot; the message is one line for the user.
        """

    def go(self) -> None:
        """Lets them begin."""

    def follow(self, assemble: Assemble) -> int:
        """What all but rank 0 do: train as it says, and write, draw and print nothing."""
        raise RuntimeError("a process alone has none to follow")

    def end_by_error(self) -> bool:
        """Tells that this process ends by an error; whether it is the first of all to say so."""
        return True

    @property
    def all_reduce(self) -> Callable[[Tensor], None] | None:
        """Sums a tensor over all ranks, in place; None where there is nothing to add."""
        return None

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return flag

    def gather(self, value: Value) -> list[Value]:
        """The value of each rank."""
        return [value]

    def part(self, rows: Any) -> Any:  # noqa: ANN401  # whatever can be sliced
        """This rank's part of the rows of an array; with those of the others, all of them.

        One index from each n-th part of the data, as `draw_indices` draws them, is the same as
        one from each part of what the ranks have, so batches are drawn as if by one process.
        """
        return rows[len(rows) * self.rank // self.size : len(rows) * (self.rank + 1) // self.size]

    def seed(self, seed: int, step: int) -> int:
        """The seed of this rank's own random numbers from a step on."""
        sequence = np.random.SeedSequence([seed, step, self.rank, self.size])
        return int(sequence.generate_state(1)[0])


def join_ranks() -> Ranks:
    """The group that torchrun started this process in, or a group of one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Ranks()
    from air.training.distributed import TorchrunRanks

    return TorchrunRanks()
