"""Files of weights and state: written so that they are whole or as before, read without trust.

Only tensors and plain values are stored, and read with ``weights_only=True``.
"""

import io
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from air.priors import count_probs

FORMAT = 3  # of checkpoint.pt; raise it when programs before and after cannot read each other's
MAX_BYTES = 8 << 30  # in a file of weights or scenes, unpacked


class CheckpointError(ValueError):
    """A run folder or a file of weights cannot be used; the message is one line for the user."""


def write_atomically(path: Path, write: Any, previous: Path | None = None) -> None:  # noqa: ANN401
    """Calls ``write(temporary path)``, then puts that file in place of `path` in one step.

    A reader, and a run that was killed, sees the old file or the new one, never a part; so does one
    after the power failed, for what is written is flushed before.

    Args:
        path: To be written.
        write: Writes it.
        previous: What the file was before goes there; None to let it go.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        if previous and path.exists():
            copy_atomically(path, previous)
        temporary.replace(path)
        _flush_names(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def copy_atomically(path: Path, other: Path) -> None:
    """Gives a file a second name, in one step; where that cannot be, copies it."""
    temporary = other.with_name(f".{other.name}.{os.getpid()}.tmp")
    try:
        try:
            os.link(path, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(path, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(other)
        _flush_names(other.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush_names(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_state(path: Path, state: Any, previous: Path | None = None) -> None:  # noqa: ANN401
    """Writes tensors and plain values; `previous` as for `write_atomically`."""
    whole = io.BytesIO()
    torch.save(state, whole)  # which would not say of a file that the disk is full
    write_atomically(path, lambda file: file.write_bytes(whole.getbuffer()), previous)


def read_state(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU, whole or not at all.

    Raises:
        CheckpointError: If it is no checkpoint, or one of a newer or older program.
    """
    state = _load(path)
    if not _is_checkpoint(state, path):
        raise CheckpointError(f"{path} is no checkpoint of a run")
    if state["format"] < FORMAT:
        raise CheckpointError(
            f"{path} has format {state['format']}, older than this program's {FORMAT}; only its "
            "weights can be used, by --load"
        )
    return state


def check_unpacked_size(path: Path) -> None:
    """Looks at a file's table of contents before anything is unpacked.

    Raises:
        CheckpointError: If it is a zip file that unpacks to more than `MAX_BYTES`.
    """
    if path.is_file() and zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as file:
                size = sum(part.file_size for part in file.infolist())
        except Exception as error:  # foreign bytes make zipfile raise anything
            raise CheckpointError(f"{path} is damaged: {error}") from error
        if size > MAX_BYTES:
            raise CheckpointError(
                f"{path} unpacks to {size:,} bytes, more than the {MAX_BYTES:,} of this program"
            )


def _load(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"there is no file {path}")
    if not path.is_file():
        raise CheckpointError(f"{path} is no file")
    check_unpacked_size(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if damaged := file.testzip():  # torch would not look
                    raise ValueError(f"{damaged} in it is damaged")
        with warnings.catch_warnings():  # of foreign files, which end in an error anyway
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch would advise to execute what is in it
        reason = "it holds more than tensors and plain values, or is of another kind"
        raise CheckpointError(f"{path} is no readable file of weights: {reason}") from error
    except Exception as error:  # foreign bytes make zipfile and torch raise anything
        reason = "it is damaged, cut off or of another kind"
        raise CheckpointError(f"{path} is no readable file of weights: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{path} holds no weights, but a {type(state).__name__}")
    return state


def _is_checkpoint(state: Mapping[str, Any], path: Path) -> bool:
    """Whether it is the checkpoint of a run, which this program can read, and not weights alone."""
    if "format" not in state:
        return False
    if type(state["format"]) is not int:
        raise CheckpointError(f"{path} is no whole checkpoint: its format is no number")
    if state["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {state['format']}, newer than this program's {FORMAT}; "
            "use the program that wrote it"
        )
    kinds = {"config": dict, "model": dict, "optimizer": dict, "step": int}
    for name, kind in kinds.items():
        if not isinstance(state.get(name), kind):
            raise CheckpointError(f"{path} is no whole checkpoint: it holds no {name}")
    return True


def save_weights(module: nn.Module, path: Path) -> None:
    """Writes a module's weights alone, as Pyro's example does."""
    write_state(path, module.state_dict())


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights in a checkpoint.pt and the configuration of its run, or weights alone and {}.

    The configuration is with the prior as it stood, after annealing and learning, as count_prior.

    Raises:
        CheckpointError: If the file is neither.
    """
    state = _load(path)
    whole = _is_checkpoint(state, path)
    if not whole:
        return state, {}
    config = dict(state["config"])
    try:
        config["count_prior"] = count_probs(state["presence"])
    except (KeyError, TypeError):  # of an earlier program, or foreign
        config.pop("count_prior", None)
    return state["model"], config


def load_weights(module: nn.Module, path: Path) -> None:
    """Loads the weights that `read_weights` finds, strictly."""
    load_weights_strict(module, read_weights(path)[0], path)


def load_weights_strict(module: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Loads weights strictly, and says in one line which do not fit.

    Raises:
        CheckpointError: If names or shapes differ from the module's, or constants of its prior.
    """
    for name, weight in weights.items():
        if not isinstance(weight, Tensor):
            raise CheckpointError(f"{path} holds no weights: {name} is a {type(weight).__name__}")
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
