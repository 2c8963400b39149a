"""Files of weights and of training state, and the models in them.

A file holds only tensors and plain values, and is read with ``weights_only=True``, so that no code
in it can run. Two kinds can be read: checkpoint.pt of a run, and weights alone, a ``state_dict``
such as Pyro's example saves.

checkpoint.pt is a dict: ``format`` (a number), ``config`` (every flag's value by name, the size and
channels of the images included), ``data_sha256`` (of the scenes), and the entries of
`Trainer.state_dict`.
"""

import io
import math
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from air.air import AIR
from air.model_settings import ModelSettings, NetFactory
from air.priors import count_probs
from air.settings import SettingError, from_config
from air.storage.files import UnusableFileError, check_unpacked_size, write_atomically

FORMAT = 3  # of checkpoint.pt; raise it when earlier and later programs cannot read each other's


class CheckpointError(UnusableFileError):
    """A run's folder or a file of weights cannot be used; the message is one line for the user."""


def write_state(path: Path, state: Any, previous: Path | None = None) -> None:  # noqa: ANN401
    """Writes tensors and plain values; `previous` as for `write_atomically`."""
    buffer = io.BytesIO()
    torch.save(state, buffer)  # torch.save does not report a full disk when it writes to a file
    write_atomically(path, lambda file: file.write_bytes(buffer.getbuffer()), previous)


def read_state(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU.

    Raises:
        CheckpointError: If it is no checkpoint, damaged, or written by a newer or older program.
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


def _load(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"there is no file {path}")
    if not path.is_file():
        raise CheckpointError(f"{path} is no file")
    try:
        check_unpacked_size(path)
    except UnusableFileError as error:
        raise CheckpointError(str(error)) from error
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if damaged := file.testzip():  # torch does not compare checksums
                    raise ValueError(f"{damaged} in it is damaged")
        with warnings.catch_warnings():  # about foreign files, which end in an error anyway
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch would advise to run the code in the file
        reason = "it holds more than tensors and plain values, or is of another kind"
        raise CheckpointError(f"{path} is no readable file of weights: {reason}") from error
    except Exception as error:  # zipfile and torch raise errors of many types for foreign bytes
        reason = "it is damaged, cut off or of another kind"
        raise CheckpointError(f"{path} is no readable file of weights: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{path} holds no weights, but a {type(state).__name__}")
    return state


def _is_checkpoint(state: Mapping[str, Any], path: Path) -> bool:
    """Whether a file that was read is a run's checkpoint, and not weights alone.

    Raises:
        CheckpointError: If it is a checkpoint that this program cannot read.
    """
    if "format" not in state:
        return False
    if type(state["format"]) is not int:
        raise CheckpointError(f"{path} is no whole checkpoint: its format is no number")
    if state["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {state['format']}, newer than this program's {FORMAT}; "
            "use the program that wrote it"
        )
    types = {"config": dict, "model": dict, "optimizer": dict, "step": int}
    for name, expected in types.items():
        if not isinstance(state.get(name), expected):
            raise CheckpointError(f"{path} is no whole checkpoint: it holds no {name}")
    return True


def check_progress(state: Mapping[str, Any]) -> None:
    """Checks the numbers in a state that came from a file.

    Raises:
        ValueError: If one of them is none that training can have left.
    """
    for steps in (state["step"], state["tally"]["steps"]):
        if type(steps) is not int or steps < 0:
            raise ValueError(f"step is {steps!r}")
    if not isinstance(state["seconds"], float) or not math.isfinite(state["seconds"]):
        raise ValueError(f"seconds are {state['seconds']!r}")
    if not all(type(index) is int and index >= 0 for index in state["miscounted"]):
        raise ValueError(f"miscounted scenes are {state['miscounted']!r}")


def save_weights(module: nn.Module, path: Path) -> None:
    """Writes a module's weights alone, as Pyro's example does."""
    write_state(path, module.state_dict())


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights in a checkpoint and its run's configuration, or weights alone and {}.

    In the configuration, count_prior is the prior at the saved step, annealed or learnt.

    Raises:
        CheckpointError: If the file is neither.
    """
    state = _load(path)
    if not _is_checkpoint(state, path):
        return state, {}
    config = dict(state["config"])
    try:
        config["count_prior"] = count_probs(state["presence"])
    except (KeyError, TypeError, ValueError):  # written by an earlier program, or foreign
        config.pop("count_prior", None)
    return state["model"], config


def load_air(path: Path, device: str | torch.device = "cpu", nets: NetFactory | None = None) -> AIR:
    """The model in a run's checkpoint, or in a file of weights of nets of default sizes.

    Args:
        path: The file.
        device: Where the model goes.
        nets: The nets of one's own that the model was trained with; see `AIR`.

    Raises:
        CheckpointError: If there is none in the file.
    """
    weights, config = read_weights(path)
    try:
        if "channels" not in config:  # weights alone, or a checkpoint of an earlier program
            config |= _image_size(weights, from_config(ModelSettings, config))
        settings = from_config(ModelSettings, {**config, "use_baselines": False})  # of no use here
    except SettingError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # a foreign file can hold anything
        raise CheckpointError(f"{path} holds no AIR: {error!r}") from error
    try:
        air = AIR.from_settings(settings, nets)
    except RuntimeError as error:  # sizes beyond the memory
        raise CheckpointError(f"{path} holds no AIR: {error!r}") from error
    load_weights_strict(air, weights, path)
    return air.to(device).eval()


def _image_size(weights: Mapping[str, Tensor], settings: ModelSettings) -> dict[str, int]:
    """Channels and side of the images, from the shapes of the nets, for files without a record."""
    window_pixels = weights["encode.mlp.seq.0.weight"].shape[1]
    channels = window_pixels // settings.window_size**2
    first = weights.get("embed.seq.0.weight")
    latents = 1 + 3 + settings.z_what_size
    pixels = weights["rnn.weight_ih"].shape[1] - latents if first is None else first.shape[1]
    return {"channels": channels, "x_size": math.isqrt(pixels // channels)}


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
        for name, constant in module.named_buffers(recurse=False)
        if name in weights and weights[name].shape == constant.shape
        if not torch.allclose(weights[name].to(constant), constant)
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"the weights in {path} do not fit these settings and nets: "
            f"{'; '.join(problems[:3])}{more}"
        )
    module.load_state_dict(weights)
