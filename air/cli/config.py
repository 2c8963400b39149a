"""The configuration of a run: the value of every flag by key, from all its sources."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from air.cli.flags import DEFAULTS, SETTINGS, Config, settings_named_by_flag
from air.cli.presets import preset_settings
from air.data.user_images.preparation import ImageSettings
from air.model_settings import ModelSettings
from air.settings import from_config, settings_of
from air.storage.checkpoint import CheckpointError
from multi_mnist import SceneSettings

COMPILE_MIN_STEPS = 5000  # some 2,500 steps save the time that compiling takes (tests/benchmarks)

# A resumed run may change these: they do not change what it learns.
_MAY_CHANGE_ON_RESUME = {
    "num_steps", "progress_every", "eval_every", "eval_scenes", "save_every", "save", "restarts",
    "alarm_after", "evaluate", "refine", "iwae_samples", "iwae_scenes", "device", "threads", "viz",
    "viz_every", "viz_log", "visdom_env", "visdom_server", "visdom_port", "verbose", "resume",
    "data", "mnist_dir", "cache_dir", "suggest",
}  # fmt: skip
# Files to write and servers to reach: no file may name them.
_NEVER_FROM_FILE = {
    "save", "output_dir", "cache_dir", "viz", "viz_log", "visdom_env", "visdom_server",
    "visdom_port",
}  # fmt: skip
# A model that is loaded brings these along: its nets, likelihood and priors.
_IMAGE_SIZE = {"x_size", "channels"}
_SAVED_WITH_MODEL = {spec.key for spec in settings_of(ModelSettings)} - _IMAGE_SIZE | {
    "z_pres_prior", "z_pres_prior_raw", "count_prior"
}  # fmt: skip
# A flag on the left makes those on the right, of a model or a preset, void.
_CONFLICTS = {
    ("z_pres_prior", "count_prior", "model_steps"): ("count_prior",),
    ("z_pres_prior",): ("z_pres_prior_raw",),
    ("scale_mean", "scale_sd"): ("sides",),
    ("count_prior",): ("anneal_prior",),
}
_SHARED = {"x_size"}  # of scenes made here and of images of one's own
SCENE_KEYS = [spec.key for spec in settings_of(SceneSettings) if spec.key not in _SHARED]
IMAGE_KEYS = [spec.key for spec in settings_of(ImageSettings)]


def to_json_types(config: Mapping[str, Any]) -> Config:
    """The configuration as JSON has it, with lists for tuples."""
    lists = {key: list(value) for key, value in config.items() if isinstance(value, tuple)}
    return {**config, **lists}


def resolve_config(
    cli_args: Mapping[str, Any],
    run: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
) -> Config:
    """Precedence: command line > resumed run > loaded model > preset > defaults.

    Args:
        cli_args: The flags on the command line.
        run: The configuration of the run to resume, if there is one.
        model: The configuration that came with the weights to load, if there is one.

    Raises:
        ValueError: If a flag would turn the resumed run into another run.
    """
    preset = preset_settings(cli_args.get("preset"), cli_args)
    of_model = {key: value for key, value in (model or {}).items() if key in _SAVED_WITH_MODEL}
    if of_model:  # a model that was saved before there were these settings has none of them
        older = {"embed_channels": None, "background_model": "none", "guide": "image"}
        of_model = {**older, **of_model}
        of_model["background_steps"] = 0  # its background was learnt
    of_run = {key: value for key, value in (run or {}).items() if key not in _NEVER_FROM_FILE}
    if run is not None:
        _check_unchanged(cli_args, run)
    below = {**preset, **of_model}
    for keys, void in _CONFLICTS.items():
        if not cli_args.keys().isdisjoint(keys):
            below = {key: value for key, value in below.items() if key not in void}
    config = {**DEFAULTS, **below, **of_run, **cli_args}
    if config["data"]:
        config |= _image_settings(cli_args, of_run, model or {})
    if config["compile"] is None:
        config["compile"] = config["num_steps"] >= COMPILE_MIN_STEPS and not config["jit"]
    return to_json_types(config)


def _image_settings(
    cli_args: Mapping[str, Any], run: Mapping[str, Any], model: Mapping[str, Any]
) -> Config:
    """How to prepare images of one's own: as for the run, the model, or by the flags.

    Without a word about it, images keep their size (x_size None) and channels.
    """
    if model.get("crop") is None:  # its images were as they are, and others are not made to fit
        model = {key: value for key, value in model.items() if key != "x_size"}
    if "crop" not in run:  # an earlier program recorded x_size and channels that had no effect
        run = {key: value for key, value in run.items() if key not in ("x_size", "channels")}
    settings = {"x_size": None, "channels": None, **model, **run, **cli_args}
    settings = {key: settings.get(key, DEFAULTS[key]) for key in IMAGE_KEYS}
    if settings["x_size"] is None and settings["crop"] is not None:
        raise ValueError("--crop: expected --x-size too, the side to cut out")
    if "x_size" in cli_args and settings["crop"] is None and not run:
        settings["crop"] = False
    return settings


def _check_unchanged(cli_args: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    # A cosine schedule decided the rates of the steps taken by the number of all steps.
    fixed = {"num_steps"} if run.get("lr_schedule") == "cosine" else set()
    for key, value in cli_args.items():
        if value != run.get(key, DEFAULTS.get(key)) and (
            key not in _MAY_CHANGE_ON_RESUME or key in fixed
        ):
            raise ValueError(
                f"--resume keeps the settings of the run, where {key} is {run.get(key)}, got "
                f"{value}; leave this flag out, or begin a new run"
            )


def check_config(config: Mapping[str, Any], source: Path) -> None:
    """Checks a configuration that came from a file.

    Raises:
        CheckpointError: If a setting cannot have its value.
    """
    try:
        json.dumps(dict(config))
    except TypeError as error:  # a tensor, which would pass for a number
        raise CheckpointError(f"{source}: the settings are not all plain values") from error
    # With --data no scenes were made, and x_size is the size of the data.
    skipped = SceneSettings if config.get("data") else None
    for cls in SETTINGS.values():
        if cls is skipped:
            continue
        try:
            with settings_named_by_flag(cls):
                from_config(cls, config)
        except ValueError as error:
            raise CheckpointError(f"{source}: {error}") from error


def with_image_size(config: Mapping[str, Any], x_size: int, channels: int) -> Config:
    """The configuration with the size of the images of the run.

    With --data it leaves out the settings of scenes, none of which were made.
    """
    made_up = SCENE_KEYS if config["data"] else []
    kept = {key: value for key, value in config.items() if key not in made_up}
    return {**kept, "x_size": x_size, "channels": channels}
