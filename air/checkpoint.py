"""The folder of a run: its configuration, metrics and checkpoint; written atomically, read safely.

    config.json     the settings, the versions of the packages, the hash of the data
    metrics.jsonl   one object per line: progress and evaluations
    checkpoint.pt   weights, optimiser, step and random state, from which a run goes on
    evaluation.json the last evaluation with the importance-weighted bound, where it is asked for
    figures/        pictures

Only tensors and plain values are stored, and read with ``weights_only=True``.
"""

import json
import math
import os
import pickle
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FORMAT = 1  # of checkpoint.pt; raise it when an older program could not read a newer file


class CheckpointError(ValueError):
    """A run folder or a file of weights cannot be used; the message is one line for the user."""


def write_atomically(path: Path, write: Any) -> None:  # noqa: ANN401
    """Calls ``write(temporary path)``, then puts that file in place of `path` in one step.

    A reader, and a run that was killed, sees the old file or the new one, never a part.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class RunFolder:
    """One run's files. `create` begins a folder, `open` goes on with one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint.pt"
        self.metrics = path / "metrics.jsonl"
        self.figures = path / "figures"

    @classmethod
    def create(cls, path: Path | None, seed: int) -> "RunFolder":
        """Makes the folder, by default runs/<time>-seed<k>.

        Raises:
            CheckpointError: If it exists and is not empty, or cannot be written.
        """
        if path is None:
            path = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-seed{seed}"
        try:
            if path.exists() and any(path.iterdir()):
                raise CheckpointError(
                    f"--output-dir must be a new or empty folder, but {path} is not empty; "
                    f"name another, or go on with that run by --resume {path}"
                )
            (path / "figures").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot write into --output-dir {path}: {error}") from error
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """An existing run's folder.

        Raises:
            CheckpointError: If there is no checkpoint in it.
        """
        run = cls(path)
        if not run.checkpoint.is_file():
            raise CheckpointError(f"{path} is no folder of a run: it holds no checkpoint.pt")
        run.figures.mkdir(exist_ok=True)
        return run

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Writes a file such as config.json."""
        text = json.dumps(_finite(values), indent=2) + "\n"
        write_atomically(self.path / name, lambda path: path.write_text(text))

    def log(self, record: Mapping[str, Any]) -> None:
        """Adds a line to metrics.jsonl; a number that is not finite becomes null."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(_finite(record)) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, less one that was cut off in writing."""
        if not self.metrics.exists():
            return []
        whole = [line for line in self.metrics.read_text().splitlines(True) if line[-1] == "\n"]
        return [json.loads(line) for line in whole]

    def rewind_metrics(self, step: int) -> None:
        """Drops the lines after `step`, which a run that goes on from there writes again."""
        lines = [json.dumps(r) + "\n" for r in self.read_metrics() if r["step"] <= step]
        write_atomically(self.metrics, lambda path: path.write_text("".join(lines)))

    def save(self, state: Mapping[str, Any]) -> None:
        """Writes checkpoint.pt."""
        whole = {"format": FORMAT, **state}
        write_atomically(self.checkpoint, lambda path: torch.save(whole, path))

    def load(self) -> dict[str, Any]:
        """Reads checkpoint.pt, onto the CPU.

        Raises:
            CheckpointError: If it is no checkpoint, or one of a newer program.
        """
        state = _load(self.checkpoint)
        if "format" not in state:
            raise CheckpointError(f"{self.checkpoint} is no checkpoint of a run")
        if state["format"] > FORMAT:
            raise CheckpointError(
                f"{self.checkpoint} has format {state['format']}, newer than this program's "
                f"{FORMAT}; use the program that wrote it"
            )
        return state


def _finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }


def _load(path: Path) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():  # of foreign files, which end in an error anyway
            warnings.simplefilter("ignore", UserWarning)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}") from error
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(f"{path} is no readable file of weights: {reason}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds no weights, but a {type(state).__name__}")
    return state


def save_weights(module: nn.Module, path: Path) -> None:
    """Writes a module's weights alone, as Pyro's example does."""
    write_atomically(path, lambda temporary: torch.save(module.state_dict(), temporary))


def load_weights(module: nn.Module, path: Path) -> None:
    """Loads weights from a checkpoint.pt, or from a file of weights alone.

    Raises:
        CheckpointError: If the file is neither, or its weights are not those of the module.
    """
    state = _load(path)
    fit_weights(module, state["model"] if "format" in state else state, path)


def fit_weights(module: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Loads weights strictly, and says in one line which do not fit.

    Raises:
        CheckpointError: If names or shapes differ from the module's.
    """
    own = module.state_dict()
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [f"{name} is unknown" for name in weights if name not in own]
    problems += [
        f"{name} is {list(weights[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"the weights in {path} do not fit these settings: {'; '.join(problems[:3])}{more}"
        )
    module.load_state_dict(weights)
