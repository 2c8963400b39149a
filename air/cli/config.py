"""The configuration of a run: its settings from all sources, in a part for each user of them."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from air.cli.flags import DEFAULTS, FLAGS, SETTINGS, ProgramSettings, settings_named_by_flag
from air.cli.presets import PRESETS, preset_settings
from air.data.user_images.preparation import ImageSettings
from air.storage.checkpoint import CheckpointError
from air.support.fields import from_config, settings_of
from air.support.model_settings import ModelSettings
from air.training.training_settings import TrainingSettings
from multi_mnist import FolderSettings, SceneSettings

COMPILE_MIN_STEPS = 5000  # some 2,500 steps save the time that compiling takes (tests/benchmarks)
FlatConfig = dict[str, Any]  # values by key, as JSON has them, in config.json and checkpoints
_IMAGE_SIZE = {"x_size", "channels"}


@dataclass(frozen=True)
class Config:
    """The settings of a run."""

    model: ModelSettings
    training: TrainingSettings
    program: ProgramSettings
    images: ImageSettings  # how images of --data are prepared
    scenes: SceneSettings | None  # the scenes to generate; None with --data
    folders: FolderSettings

    def with_image_size(self, x_size: int, channels: int) -> "Config":
        """The configuration of a run on images of this size."""
        return replace(self, model=replace(self.model, x_size=x_size, channels=channels))

    def flat(self) -> FlatConfig:
        """The values of all settings by key; x_size and channels are those of the images."""
        parts = [self.folders, self.scenes, self.images, self.program, self.training, self.model]
        return to_json_types(
            {
                spec.key: getattr(part, spec.name)
                for part in parts
                if part is not None
                for spec in settings_of(type(part))
            }
        )


def to_json_types(config: Mapping[str, Any]) -> FlatConfig:
    """The configuration as JSON has it, with lists for tuples."""
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in config.items()
    }


def resolve_config(
    cli_args: Mapping[str, Any], saved: Mapping[str, Any] = MappingProxyType({})
) -> Config:
    """Precedence: command line > resumed run > loaded model > preset > defaults.

    Args:
        cli_args: The flags on the command line.
        saved: The configuration of the run that --resume names, or the configuration that came
            with the weights that --load names; {} if there is none.

    Raises:
        ValueError: If a setting has a value it cannot have, or a flag has no effect or would turn
            the resumed run into another run.
    """
    run, model = (saved, {}) if "resume" in cli_args else (None, saved)
    preset = preset_settings(cli_args.get("preset"), cli_args)
    of_model = _settings_of_model(model)
    specs = [spec for cls in SETTINGS for spec in settings_of(cls)]
    forgotten = {spec.key for spec in specs if spec.about["on_resume"] == "forget"}
    of_run = {key: value for key, value in (run or {}).items() if key not in forgotten}
    overridden = {
        key for given in cli_args.keys() & FLAGS for key in FLAGS[given].about["overrides"]
    }
    below = {key: value for key, value in {**preset, **of_model}.items() if key not in overridden}
    flat = {**DEFAULTS, **below, **of_run, **cli_args}
    if flat["data"]:
        flat |= _image_settings(cli_args, of_run, model)
    if flat["compile"] is None:
        flat["compile"] = flat["num_steps"] >= COMPILE_MIN_STEPS
    most = flat["num_steps"] // 10  # most steps are for the objects
    flat.setdefault("background_steps", min(TrainingSettings.background_steps, most))
    _check_flags(flat, cli_args, run)
    parts = {
        "model": _part(ModelSettings, {k: v for k, v in flat.items() if k not in _IMAGE_SIZE}),
        "training": _part(TrainingSettings, flat),
        "program": _part(ProgramSettings, flat),
        "images": _part(ImageSettings, flat if flat["data"] else {}),
        "scenes": None if flat["data"] else _part(SceneSettings, flat),
        "folders": _part(FolderSettings, flat),
    }
    return Config(**parts)


def _part(cls: type, flat: Mapping[str, Any]) -> Any:  # noqa: ANN401
    with settings_named_by_flag(cls):
        return from_config(cls, flat)


def _settings_of_model(model: Mapping[str, Any]) -> FlatConfig:
    """The settings that loaded weights bring along, from the configuration of their run.

    Settings that an earlier program did not know have their defaults, not those of a preset.
    """
    if not model:
        return {}
    specs = [spec for cls in SETTINGS for spec in settings_of(cls) if spec.about["with_model"]]
    brought = {spec.key: model.get(spec.key, spec.plain_default) for spec in specs}
    return brought | {"background_steps": 0}  # the background was learnt


def _image_settings(
    cli_args: Mapping[str, Any], run: Mapping[str, Any], model: Mapping[str, Any]
) -> FlatConfig:
    """How to prepare images of --data: as for the run, as for the model, or by the flags.

    Without any of these, images keep their size (x_size None) and channels.
    """
    if model.get("crop") is None:  # its images kept their size, and so do these
        model = {key: value for key, value in model.items() if key != "x_size"}
    found = {"x_size": None, "channels": None, **model, **run, **cli_args}
    settings = {spec.key: found.get(spec.key, spec.default) for spec in settings_of(ImageSettings)}
    if settings["x_size"] is None and settings["crop"] is not None:
        raise ValueError("--crop: expected --x-size too, the side of the images")
    if "x_size" in cli_args and settings["crop"] is None and not run:
        settings["crop"] = False
    return settings


def _check_flags(
    flat: Mapping[str, Any], cli_args: Mapping[str, Any], run: Mapping[str, Any] | None
) -> None:
    """Refuses flags without effect, and flags that a resumed run cannot have."""
    before = run or DEFAULTS
    for key, value in cli_args.items():
        if run is not None and value != run.get(key, DEFAULTS[key]):
            # A cosine schedule decided the rates of the steps taken by the number of all steps.
            is_fixed = key == "num_steps" and run.get("lr_schedule") == "cosine"
            if FLAGS[key].about["on_resume"] == "keep" or is_fixed:
                raise ValueError(
                    f"--resume keeps the settings of the run, where {key} is {run.get(key)}, got "
                    f"{value}; leave this flag out, or begin a new run"
                )
        if value != before.get(key, DEFAULTS[key]):
            _check_effect(key, bool(flat["data"]))
    if flat["refine"] and flat["background_model"] != "none":
        raise ValueError("--refine does not support background models: expected none")
    path = flat["save"] and Path(flat["save"])
    if path and path.exists() and not (run and run.get("save") == flat["save"]):
        raise ValueError(f"--save never overwrites, and {path} exists; name another file")
    if path and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise ValueError(f"--save: there is no folder {path.parent} to write {path.name} into")


def _check_effect(key: str, has_data: bool) -> None:
    of_scenes, of_images = (
        {spec.key for spec in settings_of(cls)} for cls in (SceneSettings, ImageSettings)
    )
    if has_data and key in of_scenes - of_images:
        problem = "applies only to generated scenes and cannot be combined with --data"
    elif not has_data and key in of_images - of_scenes:
        problem = "applies only to images of --data, which is missing"
    else:
        return
    raise ValueError(f"{FLAGS[key].flags[-1]} {problem}")


def check_config(config: Mapping[str, Any], source: Path) -> None:
    """Checks a configuration that came from a file.

    Raises:
        CheckpointError: If a setting cannot have its value.
    """
    try:
        json.dumps(dict(config))
    except TypeError as error:  # a tensor, which would pass for a number
        raise CheckpointError(f"{source}: the settings are not all plain values") from error
    for cls in SETTINGS:
        if cls is SceneSettings and config.get("data"):  # no scenes were generated
            continue
        try:
            _part(cls, config)
        except ValueError as error:
            raise CheckpointError(f"{source}: {error}") from error


def config_hints(config: Config, cli_args: Mapping[str, Any]) -> list[str]:
    """Settings that probably do not do what the user means, one line each, with a remedy."""
    hints, training, preset = [], config.training, cli_args.get("preset")
    if training.added_scenes and 0 < training.num_steps <= training.added_scenes_from:
        source = f"of --preset {preset} " if "added_scenes" not in cli_args and preset else ""
        hints.append(
            f"--added-scenes {source}has no effect: it begins after step "
            f"{training.added_scenes_from}, and --num-steps is {training.num_steps}"
        )
    by_preset = PRESETS.get(preset or "", {}).keys() - cli_args
    if "z_pres_prior" in cli_args and "z_pres_prior_raw" in by_preset:
        hints.append(
            f"--z-pres-prior replaces the prior of --preset {preset}, which at first favours many "
            "objects and without which training may fail; --z-pres-prior 0.99 --z-pres-prior-raw "
            "restores it"
        )
    return hints
