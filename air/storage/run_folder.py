"""The folder of a run: its configuration, metrics, state and pictures.

config.json             the settings, the versions of the packages, the hash of the data
metrics.jsonl           one object per line: progress and evaluations
checkpoint.pt           weights, optimiser, step and random state, from which a run goes on
checkpoint.previous.pt  the one before it
evaluation.json         the last evaluation with the importance-weighted bound, if asked for
snapshots/              what the model made of its scenes at certain steps
figures/                pictures
"""

import json
import math
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from air.storage.checkpoint import (
    FORMAT,
    CheckpointError,
    copy_atomically,
    read_state,
    write_atomically,
    write_state,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class RunFolder:
    """One run's files. `create` begins a folder, `open` goes on with one; no two processes can."""

    def __init__(self, path: Path, source: Path | None = None) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint.pt"
        self.previous = path / "checkpoint.previous.pt"
        self.source = source or self.checkpoint  # from which the run goes on
        self.metrics = path / "metrics.jsonl"
        self.figures = path / "figures"
        self.snapshots = path / "snapshots"
        self._release: Callable[[], object] | None = None

    @classmethod
    def create(cls, name: str | Path | None, seed: int) -> "RunFolder":
        """Makes the folder, by default runs/<time>-seed<k>.

        Raises:
            CheckpointError: If it exists and is not empty, is in use, or cannot be written.
        """
        path = Path(name or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-seed{seed}")
        try:
            if name is None:
                path = _new_folder(path)
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path)
            run._lock()
            if any(path.iterdir()):
                raise CheckpointError(
                    f"--output-dir must be a new or empty folder, but {path} is not empty; "
                    f"name another, or go on with that run by --resume {path}"
                )
            run.figures.mkdir()
        except OSError as error:
            raise CheckpointError(f"cannot write into --output-dir {path}: {error}") from error
        return run

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """An existing run, by its folder or by one of the two checkpoints in it; writes nothing.

        Raises:
            CheckpointError: If there is no checkpoint, or the run is in use.
        """
        run = cls(path.parent, path) if path.is_file() else cls(path)
        if run.source not in (run.checkpoint, run.previous) or not run.source.is_file():
            raise CheckpointError(f"{path} is no folder of a run: it holds no checkpoint.pt")
        run._lock()
        return run

    def truncate_after(self, step: int, finished: bool = False) -> None:
        """Makes ready what a run that goes on from `step` writes again, and drops it.

        Those are metrics and snapshots after that step and, of a run that has taken its last step,
        the evaluation; and what a run that was killed left half written.

        Raises:
            CheckpointError: If the folder cannot be written, or the metrics are damaged.
        """
        kept = self._records_until(step, finished)
        try:
            for name in (".*.pt.*.tmp", ".*.json*.*.tmp", "*/.*.npz.*.tmp", "figures/.*.tmp"):
                for left_over in self.path.glob(name):
                    left_over.unlink()
            if self.source != self.checkpoint and self.source.exists():
                copy_atomically(self.source, self.checkpoint)  # before anything is done to it
            for path in self.snapshots.glob("*.npz"):
                if path.stem.isdecimal() and int(path.stem) > step:
                    path.unlink()
            lines = [json.dumps(record) + "\n" for record in kept]
            write_atomically(self.metrics, lambda path: path.write_text("".join(lines)))
            self.figures.mkdir(exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot write into {self.path}: {error}") from error

    def _records_until(self, step: int, finished: bool) -> list[dict[str, Any]]:
        kept: list[dict[str, Any]] = []
        try:
            for record in self._records():
                if record["step"] > step:
                    break
                if record["step"] < step or not (finished and "eval_elbo" in record):
                    kept.append(record)
        except CheckpointError:
            if not kept or kept[-1]["step"] < step:  # or the damage is in what is written again
                raise
        return kept

    def close(self) -> None:
        """Lets others have it; the end of the process does so too, however it comes."""
        if self._release:
            self._release()

    def _lock(self) -> None:
        if fcntl is None:
            return
        descriptor = os.open(self.path, os.O_RDONLY)
        self._release = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{self.path} is in use by another process") from None
        except OSError:  # a file system without locks
            return

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Writes a file such as config.json."""
        text = json.dumps(_finite(values), indent=2) + "\n"
        write_atomically(self.path / name, lambda path: path.write_text(text))

    def log(self, record: Mapping[str, Any]) -> None:
        """Adds a line to metrics.jsonl; a number that is not finite becomes null."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(_finite(record)) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, less one that was cut off in writing.

        Raises:
            CheckpointError: If one of them is no record.
        """
        return list(self._records())

    def _records(self) -> Iterator[dict[str, Any]]:
        lines = self.metrics.read_bytes().splitlines(True) if self.metrics.exists() else []
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                raise CheckpointError(f"{self.metrics}: line {number} is no record")
            yield record

    def resume_hint(self) -> str:
        """What to tell whose run ended badly."""
        if not self.checkpoint.exists():
            return "No checkpoint was written yet"
        return f"Go on from the last checkpoint with: python main.py --resume {self.path}"

    def save(self, state: Mapping[str, Any]) -> None:
        """Writes checkpoint.pt, and keeps the one before it."""
        if self.metrics.exists():  # its lines up to here must not be lost with the power
            with self.metrics.open("a") as file:
                os.fsync(file.fileno())
        write_state(self.checkpoint, {"format": FORMAT, **state}, self.previous)

    def load(self) -> dict[str, Any]:
        """Reads the checkpoint from which the run goes on, onto the CPU.

        Raises:
            CheckpointError: If it is damaged, foreign or of another program; the message says
                whether the one before it can be used.
        """
        if self.source == self.previous and _is_whole(self.checkpoint):
            raise CheckpointError(f"{self.checkpoint} is whole: --resume {self.path}")
        try:
            return read_state(self.source)
        except CheckpointError as error:
            if self.source == self.previous or not _is_whole(self.previous):
                raise
            raise CheckpointError(
                f"{error}; the one before it is whole: --resume {self.previous}"
            ) from error


def _is_whole(checkpoint: Path) -> bool:
    try:
        read_state(checkpoint)
    except CheckpointError:
        return False
    return True


def _new_folder(path: Path) -> Path:
    """Makes a folder of that name, or with -2, -3, ... behind it where another run was first."""
    number = 1
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


def _finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
