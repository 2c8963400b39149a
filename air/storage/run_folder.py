"""The folder of a run: its configuration, metrics, state and pictures.

config.json           every flag's value, the versions of the packages, the SHA-256 of the scenes
metrics.jsonl         one JSON object per line, in the order of time. Progress: step, elbo (nats
                      per image, higher is better), skipped (steps without an update, because loss
                      or gradient was not finite), grad_norm (before clipping, for a cost per
                      image), learning_rate, z_pres_prior_p, images_per_second, steps_per_second,
                      seconds. Evaluation: step, eval_elbo, eval_elbo_se, eval_scenes, empty_elbo
                      (of an empty canvas), alarm, and the fields of `evaluation.Evaluation`
checkpoint.pt         weights, optimiser, step and random state, from which a run resumes
evaluation.json       the last evaluation with the importance-weighted bound, with --evaluate
refined.json          the last evaluation with refined latents, with --refine
snapshots/<step>.npz  64 held-out scenes, the objects inferred in them, and samples of the prior
figures/*.png         pictures and curves
"""

import json
import math
import os
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from air.storage.checkpoint import FORMAT, CheckpointError, write_state
from air.storage.files import quoted, write_atomically

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class RunFolder:
    """One run's files: `create` a folder, or `open` one to resume its run.

    A folder is locked, where the system can lock it, so that only one run writes into it. One that
    is in use, damaged or not writable raises a `CheckpointError`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint.pt"
        self.metrics = path / "metrics.jsonl"
        self.figures = path / "figures"
        self.snapshots = path / "snapshots"
        self._release: Callable[[], object] | None = None

    @classmethod
    def create(cls, name: str | Path | None, seed: int) -> "RunFolder":
        """Makes the folder, by default runs/<time>-seed<k>; it must be new or empty."""
        path = Path(name or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-seed{seed}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            run = cls(_new_folder(path) if name is None else path)
            run.path.mkdir(exist_ok=True)
            run._lock()
            if any(run.path.iterdir()):
                raise CheckpointError(
                    f"--output-dir: expected a new or empty folder, but {path} is not empty; "
                    f"name another folder, or resume its run by --resume {quoted(path)}"
                )
            run.figures.mkdir()
        except OSError as error:
            raise CheckpointError(f"cannot write into --output-dir {path}: {error}") from error
        return run

    @classmethod
    def open(cls, path: Path, lock: bool = True) -> "RunFolder":
        """An existing run, by its folder or by the checkpoint in it. Writes nothing."""
        run = cls(path.parent if path.name == "checkpoint.pt" else path)
        if not run.checkpoint.is_file():
            raise CheckpointError(f"{path} is not a run folder: checkpoint.pt is missing")
        if lock:
            run._lock()
        return run

    def truncate_after(self, step: int, finished: bool = False) -> None:
        """Deletes metrics and snapshots after `step`, so that a resumed run rewrites them.

        It also deletes the last evaluation of a finished run, and the temporary files of a killed
        run.
        """
        lines = [
            json.dumps(record) + "\n"
            for record in self.read_metrics(until=step)
            if record["step"] < step or not (finished and "eval_elbo" in record)
        ]
        try:
            for name in (".*.pt.*.tmp", ".*.json*.*.tmp", "*/.*.npz.*.tmp", "figures/.*.tmp"):
                for left_over in self.path.glob(name):
                    left_over.unlink()
            for path in self.snapshots.glob("*.npz"):
                if path.stem.isdecimal() and int(path.stem) > step:
                    path.unlink()
            write_atomically(self.metrics, lambda path: path.write_text("".join(lines)))
            self.figures.mkdir(exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot write into {self.path}: {error}") from error

    def close(self) -> None:
        """Unlocks the folder; so does the end of the process."""
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

    def read_metrics(self, until: float = math.inf) -> list[dict[str, Any]]:
        """The records of metrics.jsonl up to a step, without a last line that was cut off."""
        records: list[dict[str, Any]] = []
        lines = self.metrics.read_bytes().splitlines(True) if self.metrics.exists() else []
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                is_later = record["step"] > until
            except (ValueError, TypeError, KeyError):
                if records and records[-1]["step"] >= until:
                    break
                raise CheckpointError(
                    f"{self.metrics}: line {number} is damaged: expected a JSON object with a step"
                ) from None
            if is_later:
                break
            records.append(record)
        return records

    def resume_hint(self) -> str:
        """How to resume the run after an error, for the user."""
        if not self.checkpoint.exists():
            return "No checkpoint was written yet"
        return f"Resume from the last checkpoint with: {self.resume_command()}"

    def resume_command(self) -> str:
        """The command that resumes the run, by the program that runs now."""
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        start = "the same torchrun command and" if under_torchrun else program()
        return f"{start} --resume {quoted(self.path)}"

    def save(self, state: Mapping[str, Any]) -> None:
        """Writes checkpoint.pt."""
        if self.metrics.exists():  # a power failure must not lose its lines up to here
            with self.metrics.open("a") as file:
                os.fsync(file.fileno())
        write_state(self.checkpoint, {"format": FORMAT, **state})


def program() -> str:
    """The words that start the program that runs now; those of main.py in a notebook or a test.

    Notebooks, tests and Ray run no script, or one of a package that is installed.
    """
    path = Path(next(iter(sys.argv), ""))
    if path.stem == "air-train":  # on Windows, its name ends in .exe
        return quoted(path)
    is_installed = {"site-packages", "dist-packages"} & {*path.resolve().parts}
    is_script = path.suffix == ".py" and path.is_file() and not is_installed
    return f"python {quoted(path)}" if is_script else "python main.py"


def _new_folder(path: Path) -> Path:
    """Makes a folder of that name, with -2, -3, ... appended if it exists."""
    folder, number = path, 1
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
            folder = path.with_name(f"{path.name}-{number}")


def _finite(value: Any) -> Any:  # noqa: ANN401
    """The value with None for NaN and infinities, which JSON lacks, also in lists and mappings."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """Versions of Python and of the packages on which a run's numbers depend."""
    packages = ("torch", "pyro-ppl", "numpy")
    return {"python": sys.version.split()[0]} | {name: version(name) for name in packages}
