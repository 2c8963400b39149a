"""The folder of a run: its configuration, metrics and checkpoint; written atomically, read safely.

    config.json     the settings, the versions of the packages, the hash of the data
    metrics.jsonl   one object per line: progress and evaluations
    checkpoint.pt   weights, optimiser, step and random state, from which a run goes on
    evaluation.json the last evaluation with the importance-weighted bound, where it is asked for
    snapshots/      what the model made of its scenes at certain steps
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

FORMAT = 3  # of checkpoint.pt; raise it when programs before and after cannot read each other's


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
        self.snapshots = path / "snapshots"

    @classmethod
    def create(cls, name: str | Path | None, seed: int) -> "RunFolder":
        """Makes the folder, by default runs/<time>-seed<k>.

        Raises:
            CheckpointError: If it exists and is not empty, or cannot be written.
        """
        path = Path(name or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-seed{seed}")
        try:
            if name is None:
                path = _new_folder(path)
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
        """The lines of metrics.jsonl, less one that was cut off in writing.

        Raises:
            CheckpointError: If one of them is no record.
        """
        if not self.metrics.exists():
            return []
        whole = [line for line in self.metrics.read_text().splitlines(True) if line[-1] == "\n"]
        try:
            return [dict(json.loads(line)) for line in whole]
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{self.metrics} holds a line that is no record") from error

    def rewind(self, step: int, finished: bool = False) -> None:
        """Drops the metrics and snapshots that a run which goes on from `step` writes again.

        Those are the ones after it and, of a run that has taken its last step, the evaluation.
        """
        for path in self.snapshots.glob("*.npz"):
            if path.stem.isdecimal() and int(path.stem) > step:
                path.unlink()
        kept = [
            record
            for record in self.read_metrics()
            if record["step"] < step
            or (record["step"] == step and not (finished and "eval_elbo" in record))
        ]
        lines = [json.dumps(record) + "\n" for record in kept]
        write_atomically(self.metrics, lambda path: path.write_text("".join(lines)))

    def how_to_go_on(self) -> str:
        """What to tell whose run ended badly."""
        if not self.checkpoint.exists():
            return "No checkpoint was written yet"
        return f"Go on from the last checkpoint with: python main.py --resume {self.path}"

    def save(self, state: Mapping[str, Any]) -> None:
        """Writes checkpoint.pt."""
        whole = {"format": FORMAT, **state}
        write_atomically(self.checkpoint, lambda path: torch.save(whole, path))

    def load(self) -> dict[str, Any]:
        """Reads checkpoint.pt, onto the CPU.

        Raises:
            CheckpointError: If it is no checkpoint, or one of a newer or older program.
        """
        state = _load(self.checkpoint)
        if not _is_checkpoint(state, self.checkpoint):
            raise CheckpointError(f"{self.checkpoint} is no checkpoint of a run")
        if state["format"] < FORMAT:
            raise CheckpointError(
                f"{self.checkpoint} has format {state['format']}, older than this program's "
                f"{FORMAT}; only its weights can be used, by --load"
            )
        return state


def _new_folder(path: Path) -> Path:
    """Makes a folder of that name, or with -2, -3, ... behind it where another run was first."""
    number = 1
    while True:
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


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


def _is_checkpoint(state: Mapping[str, Any], path: Path) -> bool:
    """Whether it is the checkpoint of a run, which this program can read, and not weights alone."""
    if "format" not in state:
        return False
    if state["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {state['format']}, newer than this program's {FORMAT}; "
            "use the program that wrote it"
        )
    if not {"config", "model", "optimizer", "step"} <= state.keys():
        raise CheckpointError(f"{path} is no whole checkpoint")
    return True


def save_weights(module: nn.Module, path: Path) -> None:
    """Writes a module's weights alone, as Pyro's example does."""
    write_atomically(path, lambda temporary: torch.save(module.state_dict(), temporary))


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights in a checkpoint.pt and the configuration of its run, or weights alone and {}.

    Raises:
        CheckpointError: If the file is neither.
    """
    state = _load(path)
    return (state["model"], state["config"]) if _is_checkpoint(state, path) else (state, {})


def load_weights(module: nn.Module, path: Path) -> None:
    """Loads the weights that `read_weights` finds, strictly."""
    fit_weights(module, read_weights(path)[0], path)


def fit_weights(module: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Loads weights strictly, and says in one line which do not fit.

    Raises:
        CheckpointError: If names or shapes differ from the module's, or constants of its prior.
    """
    own = module.state_dict()
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [f"{name} is unknown" for name in weights if name not in own]
    problems += [
        f"{name} is {list(weights[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    problems += [
        f"{name} is {weights[name].tolist()}, by the flags {constant.tolist()}"
        for name, constant in module.named_buffers()
        if name in weights and weights[name].shape == constant.shape
        if not torch.allclose(weights[name].to(constant), constant)
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"the weights in {path} do not fit these settings: {'; '.join(problems[:3])}{more}"
        )
    module.load_state_dict(weights)
