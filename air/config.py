"""The configuration of a run: the value of every flag, by name.

Defaults stand where they are used, in the signature of `AIR` and in `TrainingSettings`, and are
read from there.
"""

import inspect
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from air.air import AIR
from air.training import TrainingSettings

_RENAMED = {"num_steps": "model_steps", "z_what_size": "encoder_latent_size"}
_SIGNATURE = inspect.signature(AIR).parameters

# AIR's arguments and the flags they come from; the size of the images comes from the data.
AIR_ARGUMENTS = {
    name: _RENAMED.get(name, name) for name in _SIGNATURE if name not in ("x_size", "use_cuda")
}
DEFAULTS: dict[str, Any] = {
    **{flag: _SIGNATURE[name].default for name, flag in AIR_ARGUMENTS.items()},
    **asdict(TrainingSettings()),
    **dict.fromkeys(("load", "save", "output_dir", "resume", "data")),
    "device": "auto",
    "threads": 1,  # more gain little on these small nets, and lose much on a busy machine
    "viz": False,
    "viz_every": None,
    "viz_log": None,
    "visdom_env": None,
    "visdom_server": "http://localhost",
    "visdom_port": 8097,
    "restarts": 0,
    "evaluate": False,
    "iwae_samples": 100,
    "iwae_scenes": 2000,
    "verbose": False,
}
COMPILING_PAYS = 5000  # steps; some 2,500 save the time that compiling takes (tests/benchmarks)
# What may be given anew when a run goes on: it does not change what the run learns.
RESUMABLE = {
    "num_steps", "progress_every", "eval_every", "eval_scenes", "save_every", "save", "restarts",
    "alarm_after", "evaluate", "iwae_samples", "iwae_scenes", "device", "threads", "viz",
    "viz_every", "viz_log", "visdom_env", "visdom_server", "visdom_port", "verbose", "resume",
    "data", "mnist_dir", "cache_dir",
}  # fmt: skip
# What is asked anew, or not at all: files to write and servers to reach, which no file may name.
_OF_THE_PROCESS = {
    "save", "output_dir", "cache_dir", "viz", "viz_log", "visdom_env", "visdom_server",
    "visdom_port",
}  # fmt: skip
# What a model is, beside its weights: a checkpoint of it brings these along.
_OF_THE_MODEL = {*AIR_ARGUMENTS.values(), "z_pres_prior", "z_pres_prior_raw"}


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of flags as JSON has them, for config.json and the checkpoint."""
    paths = {name: str(value) for name, value in config.items() if isinstance(value, Path)}
    lists = {name: list(value) for name, value in config.items() if isinstance(value, tuple)}
    return {**config, **paths, **lists}


def merge_resumed(saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run that goes on: the saved one, with what is given anew.

    Raises:
        ValueError: If a flag is given that would make it another run.
    """
    for name, value in given.items():
        if value != saved.get(name) and (name not in RESUMABLE or _changes_rates(name, saved)):
            raise ValueError(
                f"--resume keeps the settings of the run, where {name} is {saved.get(name)}, "
                f"got {value}; leave that flag out, or begin a new run"
            )
    mine = {name: value for name, value in saved.items() if name not in _OF_THE_PROCESS}
    return {**DEFAULTS, **mine, **given}


def _changes_rates(name: str, saved: Mapping[str, Any]) -> bool:
    """Whether the number of steps decides the learning rates of the steps already taken."""
    return name == "num_steps" and saved.get("lr_schedule") == "cosine"


def merge_loaded(saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given, and for the rest the model that is loaded: its nets, prior and likelihood.

    Args:
        saved: The configuration in a checkpoint, empty for a file of weights alone.
        given: The flags given.
    """
    return {name: saved[name] for name in _OF_THE_MODEL if name in saved} | dict(given)


def is_compiled(config: Mapping[str, Any]) -> bool:
    """Whether to compile the step: as asked for, or where the run is long enough to gain by it."""
    if config["compile"] is None:
        return bool(config["num_steps"] >= COMPILING_PAYS and not config["jit"])
    return bool(config["compile"])


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA if it is there.

    Raises:
        ValueError: If there is no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
        wanted = "expected auto, cpu, cuda, cuda:1, ... or mps"
        raise ValueError(f"--device: cannot use {name!r}: {wanted}")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # NotImplementedError is a RuntimeError
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device: cannot use {name!r} on this machine: {reason}") from error
    return device
