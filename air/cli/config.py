"""The configuration of a run: its settings from all sources, in a part for each user of them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from air.cli.flags import DEFAULTS, FLAGS, SETTINGS, ProgramSettings, settings_named_by_flag
from air.data.synthetic.scene_settings import FolderSettings, SceneSettings, with_own_defaults
from air.data.user_images.preparation import ImageSettings
from air.storage.checkpoint import CheckpointError
from air.storage.files import check_output_file
from air.storage.run_folder import RunFolder
from air.support.fields import from_config, settings_of
from air.support.model_settings import ModelSettings
from air.training.ranks import restarts
from air.training.training_settings import TrainingSettings

COMPILE_MIN_STEPS = 5000  # some 2,500 steps save the time that compiling takes (tests/benchmarks)
FlatConfig = dict[str, Any]  # values by key, as JSON has them, in config.json and checkpoints
_IMAGE_SIZE = {"x_size", "channels"}  # known when the images are loaded
_NEED_DECODER = "added_scenes", "spot_steps", "refine"
T = TypeVar("T")

_ALL = [spec for cls in SETTINGS for spec in settings_of(cls)]
_OF_SCENES, _OF_IMAGES = (
    {spec.key for spec in settings_of(cls)} for cls in (SceneSettings, ImageSettings)
)


@dataclass(frozen=True)
class Config:
    """The settings of a run."""

    model: ModelSettings
    training: TrainingSettings
    program: ProgramSettings
    images: ImageSettings  # how images of --data are prepared
    scenes: SceneSettings | None  # the scenes to generate; None with --data
    folders: FolderSettings
    found: tuple[str, ...] = ()  # keys of the settings that a survey found

    def with_image_size(self, x_size: int, channels: int) -> "Config":
        """The configuration of a run on images of this size."""
        return replace(self, model=replace(self.model, x_size=x_size, channels=channels))

    def flat(self) -> FlatConfig:
        """The values of all settings by key; x_size and channels are those of the images."""
        parts = [self.folders, self.scenes, self.images, self.program, self.training, self.model]
        values = {
            spec.key: getattr(part, spec.name)
            for part in filter(None, parts)
            for spec in settings_of(type(part))
        }
        values["found"] = self.found
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


def resolve_config(
    cli_args: Mapping[str, Any],
    saved: Mapping[str, Any] = MappingProxyType({}),
    found: Mapping[str, tuple[Any, str]] = MappingProxyType({}),
) -> Config:
    """Precedence: command line > resumed run > loaded model > survey > defaults.

    A loaded model brings its own settings and, without --data, the scenes of its training.

    Args:
        cli_args: The flags on the command line.
        saved: The configuration of the run that --resume names, or the configuration that came
            with the weights that --load names; {} if there is none.
        found: Settings that follow from a survey of the training images.

    Raises:
        ValueError: If a setting has a value it cannot have, or a flag has no effect or would turn
            the resumed run into another run.
    """
    run, model = (saved, {}) if "resume" in cli_args else ({}, saved)
    below: FlatConfig = {key: value for key, (value, _) in found.items()}
    if model:  # settings that an earlier program did not know have their defaults
        of_model = [spec for spec in _ALL if spec.with_model]
        below = below | {spec.key: model.get(spec.key, spec.plain_default) for spec in of_model}
        # The scenes of its training too, unless it was trained on users' images. Another recipe
        # makes other scenes.
        recipe = cli_args.get("recipe", model.get("recipe"))
        if not (model.get("data") or cli_args.get("data")) and recipe == model.get("recipe"):
            scenes = {*_OF_SCENES, "mnist_dir"} & model.keys()
            below = below | {key: model[key] for key in scenes}
    # A prior of the count, as found, may have the given number of steps already.
    fits = len(below.get("count_prior") or ()) == cli_args.get("model_steps", 0) + 1
    overridden = {
        key
        for given in (cli_args.keys() & FLAGS) - ({"model_steps"} if fits else set())
        for key in FLAGS[given].overrides
    }
    forgotten = {spec.key for spec in _ALL if spec.on_resume == "forget"}
    flat = {
        **DEFAULTS,
        **with_own_defaults(cli_args),
        **{key: value for key, value in below.items() if key not in overridden},
        **{key: value for key, value in run.items() if key not in forgotten},
        **cli_args,
    }
    if flat["data"]:
        flat |= _image_settings(cli_args, run, model, below)
    if flat["compile"] is None:
        flat["compile"] = flat["num_steps"] >= COMPILE_MIN_STEPS
    # Settings without a flag, such as `renderer`, are there only if they were found or saved.
    for key in _NEED_DECODER if flat.get("renderer", "none") != "none" else ():
        if flat.get(key):
            flag = "--" + key.replace("_", "-")
            raise ValueError(f"{flag}: expected without objects that are drawn by a renderer")
    if "resume" in cli_args:
        _check_resumed(cli_args, run)
    _check_flags(flat, cli_args, run)
    return Config(
        model=_part(ModelSettings, {k: v for k, v in flat.items() if k not in _IMAGE_SIZE}),
        training=_part(TrainingSettings, flat),
        program=_part(ProgramSettings, flat),
        images=_part(ImageSettings, flat if flat["data"] else {}),
        scenes=None if flat["data"] else _part(SceneSettings, flat),
        folders=_part(FolderSettings, flat),
        found=tuple(run.get("found", [key for key in found if key not in cli_args])),
    )


def as_restarted(cli_args: FlatConfig) -> FlatConfig:
    """The flags, with --resume if torchrun has restarted this command, which has saved its run."""
    folder = cli_args.get("output_dir")
    if restarts() and folder and RunFolder(Path(folder)).checkpoint.is_file():
        return {"resume": folder, **cli_args}
    return cli_args


def _part(cls: type[T], flat: Mapping[str, Any]) -> T:
    with settings_named_by_flag(cls):
        return from_config(cls, flat)


def _image_settings(
    cli_args: Mapping[str, Any],
    run: Mapping[str, Any],
    model: Mapping[str, Any],
    survey: Mapping[str, Any],
) -> FlatConfig:
    """How to prepare images of --data: as for the run or the model, by the flags, or the survey.

    Without any of these, images keep their size (x_size None) and channels.
    """
    # A model that was trained without resizing: nothing is resized here, unless it is asked for.
    if model.get("crop") is None and cli_args.get("crop") is None:
        model = {key: value for key, value in model.items() if key != "x_size"}
    # Originals are for the first phase of a new training, which a loaded model has behind it.
    model = {key: value for key, value in model.items() if key != "spot_size"}
    found = {"x_size": None, "channels": None, **survey, **model, **run, **cli_args}
    settings = {spec.key: found.get(spec.key, spec.default) for spec in settings_of(ImageSettings)}
    if settings["x_size"] is None and settings["crop"] is not None:
        flag = "--crop" if settings["crop"] else "--no-crop"
        raise ValueError(f"{flag}: expected --x-size too, the side of the images")
    is_set = "x_size" in cli_args or "x_size" in survey
    if is_set and settings["crop"] is None and not run:
        settings["crop"] = False
    return settings


def _check_resumed(cli_args: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Refuses flags that would turn the resumed run into another run."""
    for key, value in cli_args.items():
        # A cosine schedule decided the rates of the steps taken by the number of all steps.
        is_fixed = key == "num_steps" and run.get("lr_schedule") == "cosine"
        is_kept = FLAGS[key].on_resume == "keep" or is_fixed
        if is_kept and value != run.get(key, DEFAULTS[key]):
            raise ValueError(
                f"{FLAGS[key].flags[-1]}: --resume keeps the settings of the run, which has "
                f"{run.get(key)}, got {value}; leave this flag out, or begin a new run"
            )


def _check_flags(
    flat: Mapping[str, Any], cli_args: Mapping[str, Any], run: Mapping[str, Any]
) -> None:
    """Refuses flags without effect, and a file for --save that cannot be written."""
    for key, value in cli_args.items():
        if value == run.get(key, DEFAULTS[key]):
            continue
        flag = FLAGS[key].flags[-1]
        if flat["data"] and key in _OF_SCENES - _OF_IMAGES:
            raise ValueError(
                f"{flag} applies only to generated scenes and cannot be combined with --data"
            )
        if not flat["data"] and key in _OF_IMAGES - _OF_SCENES:
            raise ValueError(f"{flag} applies only to images of --data, which is missing")
    if flat["save"]:
        is_of_run = flat["save"] == run.get("save")
        check_output_file("--save", Path(flat["save"]), may_exist=is_of_run)


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


def config_hints(config: Config) -> list[str]:
    """Settings that probably do not do what the user means, one line each, with a remedy."""
    training = config.training
    if training.added_scenes and 0 < training.num_steps <= training.added_scenes_from:
        return [
            f"--added-scenes has no effect: it begins after step {training.added_scenes_from}, and "
            f"--num-steps is {training.num_steps}"
        ]
    return []
