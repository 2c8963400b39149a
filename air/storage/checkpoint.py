"""Files of weights and of training state, and the models in them.

A file holds only tensors and plain values, and is read with ``weights_only=True``, so that no code
in it can run. Two kinds can be read: checkpoint.pt of a run, and weights alone, a ``state_dict``
such as Pyro's example saves.

checkpoint.pt is a dict: ``format`` (a number), ``config`` (every flag's value by name, the size and
channels of the images included), ``data_sha256`` (of the scenes), and the entries of
`Trainer.state_dict`.
"""

import dataclasses
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
from air.priors import counts_from_presence
from air.settings import SettingError, from_config
from air.storage.files import UnusableFileError, check_unpacked_size, write_atomically

FORMAT = 3  # of checkpoint.pt; raise it when earlier and later programs cannot read each other's
NO_SETTINGS = (
    "The file brings no settings of the model, so the defaults were tried: load the run's "
    "checkpoint.pt, which brings them, or in Python make the AIR with its sizes, AIR(...), and use "
    "its load_state_dict"
)


class CheckpointError(UnusableFileError):
    """A run's folder or a file of weights cannot be used; the message is one line for the user."""


def write_state(
    path: Path | str,
    state: Any,  # noqa: ANN401
    previous: Path | str | None = None,
) -> None:
    """Writes tensors and plain values; `previous` as for `write_atomically`."""
    path, previous = Path(path), None if previous is None else Path(previous)
    buffer = io.BytesIO()
    torch.save(state, buffer)  # torch.save does not report a full disk when it writes to a file
    write_atomically(path, lambda file: file.write_bytes(buffer.getbuffer()), previous)


def read_state(path: Path | str) -> dict[str, Any]:
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


def _load(path: Path | str) -> dict[str, Any]:
    path = Path(path)
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


def _is_checkpoint(state: Mapping[str, Any], path: Path | str) -> bool:
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


def save_weights(module: nn.Module, path: Path | str) -> None:
    """Writes a module's weights alone, as Pyro's example does."""
    write_state(path, module.state_dict())


def read_weights(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
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
        config["count_prior"] = counts_from_presence(state["presence"])
    except (KeyError, TypeError, ValueError):  # written by an earlier program, or foreign
        config.pop("count_prior", None)
    return state["model"], config


def read_config(path: Path | str) -> dict[str, Any]:
    """The configuration of a checkpoint's run; {} for weights alone. See `read_weights`."""
    return read_weights(path)[1]


def load_air(
    path: Path | str, device: str | torch.device = "cpu", nets: NetFactory | None = None
) -> AIR:
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
        settings = from_config(ModelSettings, {**config, "use_baselines": False})  # of no use here
        if "channels" not in config:  # weights alone, or a checkpoint of an earlier program
            size = _image_size(weights, settings.window_size) or {}
            settings = dataclasses.replace(settings, **size)
    except SettingError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # a foreign file can hold anything
        raise CheckpointError(f"{path} holds no AIR: {error!r}") from error
    missing = [name for name in ("rnn.weight_ih", "h_init") if name not in weights]
    if missing:
        raise CheckpointError(f"{path} holds no AIR: {' and '.join(missing)} are not in it")
    try:
        air = AIR.from_settings(settings, nets)
    except RuntimeError as error:  # sizes beyond the memory
        raise CheckpointError(f"{path} holds no AIR: {error!r}") from error
    try:
        load_weights_strict(air, weights, path)
    except CheckpointError as error:
        raise error if config else CheckpointError(f"{error}. {NO_SETTINGS}") from error
    return air.to(device).eval()


def check_image_size(
    air: AIR, weights: Mapping[str, Any], config: Mapping[str, Any], path: Path | str
) -> None:
    """Checks that the model in a file was trained on images of the size that `air` has.

    Does nothing if neither the configuration nor the weights tell that size.

    Args:
        air: The model to load the weights into.
        weights: The weights in the file.
        config: The configuration in the file; {} for none.
        path: The file.

    Raises:
        CheckpointError: If the images had another size, or another number of channels.
    """
    window_size = config.get("window_size", air.window_size)
    # A checkpoint of an earlier program has no channels, and its x_size is not that of the images.
    size = config if "channels" in config else _image_size(weights, window_size)
    if size is None or not {"x_size", "channels"} <= size.keys():
        return
    trained_on, own = (size["x_size"], size["channels"]), (air.x_size, air.channels)
    if trained_on != own:
        (x_size, channels), (own_x_size, own_channels) = trained_on, own
        raise CheckpointError(
            f"{path} was trained on images of {x_size} x {x_size} pixels in {channels} "
            f"channel{'s' * (channels != 1)}, but these are {own_x_size} x {own_x_size} in "
            f"{own_channels}"
        )


def _image_size(weights: Mapping[str, Any], window_size: int) -> dict[str, int] | None:
    """Channels and side of the images, from the shapes of the nets; None if they do not tell."""
    try:
        z_what_size = weights["z_what_init"].shape[1]
        embeds = any(name.startswith("bl_embed.") for name in weights)
        # The baseline sees whole images, also where the guide sees glimpses.
        first = weights["bl_embed.seq.0.weight" if embeds else "bl_rnn.weight_ih"].shape[1]
        channels, rest = divmod(weights["encode.mlp.seq.0.weight"].shape[1], window_size**2)
    except (AttributeError, IndexError, KeyError, TypeError, ZeroDivisionError):
        return None  # nets of one's own, or foreign weights
    pixels = first if embeds else first - (1 + 3 + z_what_size)
    if rest or channels < 1 or pixels < 1 or pixels % channels:
        return None
    x_size = math.isqrt(pixels // channels)
    return {"channels": channels, "x_size": x_size} if channels * x_size**2 == pixels else None


def load_weights_strict(module: nn.Module, weights: Mapping[str, Tensor], path: Path | str) -> None:
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
