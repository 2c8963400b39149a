"""Files of weights and of training state, and the models in them.

A file contains only tensors and plain values, and is read with ``weights_only=True``, so that no
code in it can run. Two kinds can be read: checkpoint.pt of a run, and weights alone, a
``state_dict`` such as Pyro's example saves.

checkpoint.pt is a dict: ``format`` (a number), ``config`` (every flag's value by name, and the size
and channels of the images), ``data_sha256`` (of the scenes), and the entries of
`Trainer.state_dict`.

A file that cannot be used raises a `CheckpointError`.
"""

import io
import math
import re
import textwrap
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from air.air import AIR
from air.priors import counts_from_presence
from air.storage.files import UnusableFileError, check_unpacked_size, write_atomically
from air.storage.pretrained import find_weights, names
from air.support.fields import from_config
from air.support.model_settings import ModelSettings, NetFactory

FORMAT = 4  # of checkpoint.pt; raise it when earlier and later programs cannot read each other's
NO_SETTINGS = (
    "The file has no settings of the model, so the defaults were used: load the run's "
    "checkpoint.pt, which has them, or in Python make the AIR with its sizes, AIR(...), and use "
    "its load_state_dict"
)
AN_AIR = r"((?:.*\.)?)rnn\.weight_ih"  # the name of a weight that every AIR has, and its prefix


class CheckpointError(UnusableFileError):
    """A run's folder or a file of weights cannot be used; the message is one line for the user."""


def write_state(path: Path | str, state: Mapping[str, Any]) -> None:
    """Writes tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(state, buffer)  # torch.save does not report a full disk when it writes to a file
    write_atomically(Path(path), lambda file: file.write_bytes(buffer.getbuffer()))


def read_state(path: Path | str) -> dict[str, Any]:
    """Reads a checkpoint of this program's format onto the CPU."""
    state = _load(path)
    if not _is_checkpoint(state, path):
        raise CheckpointError(f"{path} is not the checkpoint of a run")
    if state["format"] < FORMAT:
        raise CheckpointError(
            f"{path} has format {state['format']}, older than this program's {FORMAT}; only its "
            "weights can be used, by --load"
        )
    return state


def _load(path: Path | str) -> dict[str, Any]:
    path = find_weights(path)
    if not path.is_file():
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder; name a file, such as {path}/checkpoint.pt")
        problem = f"there is no file {path}"
        if len(path.parts) == 1:  # it may be meant as a name
            problem += f"; the pretrained models are {', '.join(names())}"
        raise CheckpointError(problem)
    try:
        check_unpacked_size(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if damaged := file.testzip():  # torch does not compare checksums
                    raise ValueError(f"{damaged} in it is damaged")
        with warnings.catch_warnings(action="ignore"):  # about foreign files
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UnusableFileError as error:
        raise CheckpointError(str(error)) from error
    except Exception as error:  # of many types; torch would advise to run the code in the file
        raise CheckpointError(
            f"{path} cannot be read as weights: the file is damaged, truncated or of another type, "
            "or contains more than tensors and plain values"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):  # as Lightning saves
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{path} contains a {type(state).__name__} instead of weights")
    return state


def _is_checkpoint(state: Mapping[str, Any], path: Path | str) -> bool:
    """Whether a file that was read is a run's checkpoint, and not weights alone."""
    if "format" not in state:
        return False
    types = {"format": int, "config": dict, "model": dict, "optimizer": dict, "step": int}
    for name, expected in types.items():
        if not isinstance(state.get(name), expected):
            raise CheckpointError(
                f"{path} is not an intact checkpoint: expected {expected.__name__} for {name}, got "
                f"{type(state.get(name)).__name__}"
            )
    if state["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {state['format']}, newer than this program's {FORMAT}; "
            "use the program that wrote it"
        )
    if state["config"].get("guide") == "glimpse" and "z_pres_bias" not in state["config"]:
        raise CheckpointError(
            f"{path} is of an earlier program, whose glimpses meant other windows"
        )
    return True


def check_progress(state: Mapping[str, Any]) -> None:
    """Checks the numbers in a state that came from a file.

    Raises:
        ValueError: If training cannot have left one of them.
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

    The path may be the name of a pretrained model. In the configuration, count_prior is the prior
    at the saved step, annealed or learnt.
    """
    state = _load(path)
    if not _is_checkpoint(state, path):
        return unwrapped(state), {}
    config = dict(state["config"])
    try:
        config["count_prior"] = counts_from_presence(state["presence"])
    except (KeyError, TypeError, ValueError):  # of an earlier format, or foreign
        config.pop("count_prior", None)
    return state["model"], config


def unwrapped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by their names in an AIR, without the prefix of what it was a part of.

    This may be a module of one's own, or a wrapper such as `torch.compile`,
    `DistributedDataParallel` or `AveragedModel`. A prefix within, of a part, stays.
    """
    prefixes = [match[1] for name in weights if (match := re.fullmatch(AN_AIR, name))]
    if len(prefixes) != 1:  # none, or several
        return dict(weights)
    length = len(prefixes[0])
    return {name[length:]: w for name, w in weights.items() if name.startswith(prefixes[0])}


def _without_wrappers(name: str) -> str:
    """A weight's name without those of the wrappers of a part."""
    return re.sub(r"(?<![^.])(_orig_mod|module)\.", "", name)


def load_air(
    path: Path | str, device: str | torch.device = "cpu", nets: NetFactory | None = None
) -> AIR:
    """The model in a run's checkpoint, or in a file of weights of nets of default sizes.

    Args:
        path: The file, or the name of a pretrained model; see `air.storage.pretrained`.
        device: The device of the model.
        nets: Makes the user-defined nets that the model was trained with; see `AIR`.

    Raises:
        CheckpointError: If the file contains no AIR that `nets` fit.
    """
    weights, config = read_weights(path)
    if "rnn.weight_ih" not in weights:
        raise CheckpointError(f"{path} contains no AIR: rnn.weight_ih is missing")
    try:
        # Inference needs no baselines.
        settings = from_config(ModelSettings, {**config, "use_baselines": False})
        with torch.random.fork_rng([]):  # for the initial weights
            air = AIR.from_settings(settings, nets)
        load_weights_strict(air, weights, path)
    except CheckpointError as error:
        raise error if config else CheckpointError(f"{error}. {NO_SETTINGS}") from error
    except (ValueError, RuntimeError) as error:  # the latter for sizes beyond the memory
        raise CheckpointError(f"{path} contains no AIR: {error}") from error
    return air.to(device).eval()


def check_image_size(air: AIR, config: Mapping[str, Any], path: Path | str) -> None:
    """Checks that the model in a file was trained on images of the size that `air` has.

    The configuration of weights alone is {}, which does not tell the size.
    """
    own = (air.x_size, air.channels)
    x_size, channels = config.get("x_size", own[0]), config.get("channels", own[1])
    if (x_size, channels) != own:
        raise CheckpointError(
            f"{path} was trained on images of [{channels}, {x_size}, {x_size}] (channels, height, "
            f"width), but these images are [{own[1]}, {own[0]}, {own[0]}]"
        )


def load_weights_strict(module: nn.Module, weights: Mapping[str, Tensor], path: Path | str) -> None:
    """Loads weights strictly; one line names those that do not fit.

    Weights without a baseline (``bl_``) leave that of the module as it is.
    """
    own_names = {_without_wrappers(name): name for name in module.state_dict()}
    weights = {own_names.get(_without_wrappers(name), name): w for name, w in weights.items()}
    if not any(name.startswith("bl_") for name in weights):
        own = module.state_dict()
        weights = {k: own[k] for k in own if k.startswith("bl_")} | weights
    constants = {name: buffer.clone() for name, buffer in module.named_buffers(recurse=False)}
    problem = ""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:  # its lines name all weights
        problem = textwrap.shorten(str(error), 400)
    for name, expected in constants.items():
        loaded = module.get_buffer(name)
        if not problem and not torch.allclose(loaded, expected):
            problem = f"{name} is {loaded.tolist()}, expected {expected.tolist()} from the flags"
    if problem:
        raise CheckpointError(
            f"the weights in {path} do not fit these settings and nets: {problem}"
        )
