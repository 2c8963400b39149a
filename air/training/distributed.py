"""Training by several processes under torchrun, each on a part of the images.

Each rank draws its share of the batch from its part of the images, by its own random numbers. Loss
and gradients of all are added up in one message, and every rank takes the same step. Not by
DistributedDataParallel, which watches a module's forward pass: Pyro's model and guide are methods,
and a captured step has no pass of a module at all.
"""

import io
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

from air.cli.faults import explain, stop_on_signals, terminate_like_interrupt
from air.cli.recorder import restore_trainer
from air.training.events import CheckpointDue
from air.training.ranks import Assemble, Config, RankLostError, Ranks, Value

FIRST_WORD_SECONDS = 2.0  # that rank 0 has to say what went wrong, before another does


class TorchrunRanks(Ranks):
    """The group of processes that torchrun started; by NCCL on GPUs and by Gloo on CPUs.

    The ranks but 0 wait for an order, make themselves ready, wait for the word to go, train, and
    wait for the next order; in place of either there may come the word to end.
    """

    def __init__(self) -> None:
        store, self.rank, self.size = next(rendezvous("env://"))
        gpus = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo",
            store=PrefixStore("group", store),
            rank=self.rank,
            world_size=self.size,
        )
        # Rank 0 may draw and evaluate for long; one that is gone is noticed all the same.
        self._orders = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        self._store = PrefixStore("air", store)
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self._others_wait = False  # for an order or the word to go
        if self.rank > 0:
            logging.getLogger("air").setLevel(logging.ERROR)  # rank 0 warns for all

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._others_wait:
            with suppress(RankLostError):
                self._broadcast(None)
        if self._others_wait or kind is None:  # else the others may be in the middle of something
            dist.destroy_process_group()

    def lead(self, config: Config, sha256: str, state: Mapping[str, Any]) -> None:
        whole = io.BytesIO()
        torch.save({"config": dict(config), "data_sha256": sha256, "state": dict(state)}, whole)
        self._broadcast(whole.getvalue())
        self._all_ready(None)

    def go(self) -> None:
        self._broadcast(b"go")
        self._others_wait = False

    def others_wait(self) -> None:
        self._others_wait = self.rank == 0

    def follow(self, assemble: Assemble) -> int:
        try:
            with terminate_like_interrupt():
                self._follow(assemble)
        except KeyboardInterrupt:
            return 0  # rank 0 says so
        except Exception as error:
            mine = self.end_by_error()
            if (line := explain(error, None)) is None:
                raise
            if mine or not isinstance(error, RankLostError):
                print(f"{os.path.basename(sys.argv[0])}: rank {self.rank}: {line}", file=sys.stderr)
            return 1
        return 0

    def _follow(self, assemble: Assemble) -> None:
        stop_requested = False
        while (order := self._broadcast(None)) is not None:
            told, problem = torch.load(io.BytesIO(order), "cpu", weights_only=True), None
            try:
                trainer, sha256 = assemble(told["config"], self)
                state = {**told["state"], "data_sha256": told["data_sha256"]}
                restore_trainer(trainer, state, Path("rank 0"), sha256)
            except (ValueError, OSError) as error:
                problem = str(error)
            try:
                self._all_ready(problem)
            except ValueError:  # rank 0 says so
                continue
            if self._broadcast(None) is None:
                return
            trainer.stop_requested = stop_requested  # since the training before
            with stop_on_signals(trainer), suppress(FloatingPointError):  # rank 0 says so
                for event in trainer.train():
                    # The rest of what comes at the end is for rank 0 alone: it may take long.
                    if trainer.finished and isinstance(event, CheckpointDue):
                        break
            stop_requested = trainer.stop_requested

    def _all_ready(self, problem: str | None) -> None:
        """Raises the first problem of any rank, on all of them."""
        for rank, its_problem in enumerate(self.gather(problem)):
            if its_problem is not None:
                raise ValueError(f"rank {rank}: {its_problem}")

    def end_by_error(self) -> bool:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # or torchrun would cut off the last words
        if self.rank > 0:
            time.sleep(FIRST_WORD_SECONDS)
        with suppress(RuntimeError):  # that store may be gone too
            return bool(self._store.add("said", 1) == 1)
        return True

    def part(self, rows: Any) -> Any:  # noqa: ANN401
        own = super().part(rows)
        return own.copy() if isinstance(own, np.ndarray) else own  # so that the rest can go

    @property
    def all_reduce(self) -> Callable[[Tensor], None] | None:
        return self._add_up

    def _add_up(self, tensor: Tensor) -> None:
        with _others_there():
            dist.all_reduce(tensor)

    def any(self, flag: bool) -> bool:
        set_somewhere = torch.tensor(int(flag))
        self._add_up(set_somewhere)
        return bool(set_somewhere)

    def gather(self, value: Value) -> list[Value]:
        values: list[Any] = [None] * self.size
        with _others_there():
            dist.all_gather_object(values, value, group=self._orders)
        return values

    def _broadcast(self, value: bytes | None) -> bytes | None:
        """What rank 0 calls it with."""
        values = [value]
        with _others_there():
            dist.broadcast_object_list(values, src=0, group=self._orders)
        return values[0]


@contextmanager
def _others_there() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # all that the backends raise
        reason = str(error).strip().partition("\n")[0]
        raise RankLostError(f"another rank is gone or out of reach ({reason})") from error
