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
from air.training.settings import TrainingSettings

_RENAMED = {
    "num_steps": "model_steps", "z_what_size": "encoder_latent_size", "guide_input": "guide"
}  # fmt: skip
_SIGNATURE = inspect.signature(AIR).parameters

# AIR's arguments and the flags they come from; size and channels of the images come from the data.
AIR_ARGUMENTS = {
    name: _RENAMED.get(name, name)
    for name in _SIGNATURE
    if name not in ("x_size", "channels", "use_cuda")
}
DEFAULTS: dict[str, Any] = {
    **{flag: _SIGNATURE[name].default for name, flag in AIR_ARGUMENTS.items()},
    **asdict(TrainingSettings()),
    **dict.fromkeys(("load", "save", "output_dir", "resume", "data")),
    "preset": None,
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
# Scenes of a kind, and what suits them; each value stands for a flag that is not given.
_SMALL_OBJECTS = {
    "x_size": 64, "sides": [9, 18], "num_scenes": 30_000, "num_test_scenes": 5000,
    # Windows begin larger than the objects, all over the scene and nearly black, and the prior
    # wants all of them at first: else few meet an object, and they are given up before they help.
    "window_size": 18, "scale_prior_mean": 3.0, "scale_prior_sd": 1.0, "pos_prior_sd": 1.5,
    "decoder_output_bias": -3.0, "z_pres_prior": 0.99, "z_pres_prior_raw": True,
    "anneal_prior": "exp", "anneal_prior_to": 1e-4, "anneal_prior_duration": 1500,
    # What has been found is out of sight, so that every further object is found as the first was.
    "guide": "difference", "clip_grad_norm": 100.0,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    # With the annealed prior the smallest are overlooked, with a learnt one blank windows between
    # two digits come up, until the rate has fallen.
    "small-digits": {
        **_SMALL_OBJECTS, "recipe": "air", "binary": True, "learn_count_prior_from": 3000,
        "lr_schedule": "cosine",
    },
    # Three bright channels explain so much that with the usual likelihood_sd AIR would rather use
    # several windows for one object. The 12,288 pixels make the embedding a matter of speed.
    "dsprites": {
        **_SMALL_OBJECTS, "recipe": "dsprites", "rotation": 180.0, "likelihood_sd": 0.5,
        "embed_net": [200],
    },
}  # fmt: skip
COMPILE_MIN_STEPS = 5000  # steps; some 2,500 save the time that compiling takes (tests/benchmarks)
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
_OF_THE_MODEL = {*AIR_ARGUMENTS.values(), "z_pres_prior", "z_pres_prior_raw", "count_prior"}
# Where one of these flags is given, the others are not to come from a model or a preset.
_INSTEAD_OF = {
    ("z_pres_prior", "count_prior", "model_steps"): ("count_prior",),
    ("z_pres_prior",): ("z_pres_prior_raw",),
    ("scale_mean", "scale_sd"): ("sides",),
}


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


def merge_new(saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a new run, but for the defaults.

    What is given goes before the nets, prior and likelihood of a model that is loaded, and these
    before the preset.

    Args:
        saved: The configuration in a checkpoint, empty for a file of weights alone or none.
        given: The flags given.
    """
    preset = PRESETS.get(given.get("preset") or "", {})
    loaded = {name: saved[name] for name in _OF_THE_MODEL if name in saved}
    below = {**preset, **loaded}
    for names, replaced in _INSTEAD_OF.items():
        if not given.keys().isdisjoint(names):
            below = {name: value for name, value in below.items() if name not in replaced}
    return {**below, **given}


def is_compiled(config: Mapping[str, Any]) -> bool:
    """Whether to compile the step: as asked for, or where the run is long enough to gain by it."""
    if config["compile"] is None:
        return bool(config["num_steps"] >= COMPILE_MIN_STEPS and not config["jit"])
    return bool(config["compile"])


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device of that name; "auto" is CUDA if it is there.

    Args:
        name: A device.
        local_rank: Of several processes on this machine each takes the GPU of its number, which
            becomes its current one.

    Raises:
        ValueError: If there is no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if local_rank is not None and name.startswith("cuda"):
        if name != "cuda":
            raise ValueError(f"--device: each process takes a GPU of its own; use cuda, not {name}")
        name = f"cuda:{local_rank}"
    if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
        wanted = "expected auto, cpu, cuda, cuda:1, ... or mps"
        raise ValueError(f"--device: cannot use {name!r}: {wanted}")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if local_rank is not None and device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:  # NotImplementedError is a RuntimeError
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device: cannot use {name!r} on this machine: {reason}") from error
    return device
