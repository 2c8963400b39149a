"""The configuration: precedence of its sources, and what a resumed run or a loaded model keeps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from air.cli.config import COMPILE_MIN_STEPS, check_config, config_hints, resolve_config
from air.cli.flags import DEFAULTS, SETTINGS
from air.storage.checkpoint import CheckpointError
from air.support.fields import settings_of
from air.support.model_settings import ModelSettings
from air.training.training_settings import TrainingSettings

RESUME = {"resume": "run"}


def flat(
    cli_args: dict[str, Any], saved: dict[str, Any] | None = None, **found: object
) -> dict[str, Any]:
    reasons = {key: (value, "because") for key, value in found.items()}
    return resolve_config(cli_args, saved or {}, reasons).flat()


@pytest.fixture
def saved() -> dict[str, Any]:
    changes = {"seed": 4, "num_steps": 10, "likelihood_sd": 0.2, "counts": [1]}
    return {**flat({}), **changes, "compile": False}


def test_every_default_is_stated_once() -> None:
    config = flat({})
    own = {key: config[key] for key in DEFAULTS}
    assert own == {**DEFAULTS, "compile": True, "channels": 1}
    keys = [spec.key for cls in SETTINGS for spec in settings_of(cls)]
    assert {key for key in keys if keys.count(key) > 1} == {"x_size", "channels"}


def test_each_part_has_its_settings_and_a_file_has_all() -> None:
    config = resolve_config({"seed": 3, "data_seed": 4, "num_steps": 7, "model_steps": 2})
    assert (config.training.seed, config.training.num_steps) == (3, 7)
    assert (config.scenes.seed, config.model.num_steps) == (4, 2)
    written = json.loads(json.dumps(config.with_image_size(20, 3).flat()))
    assert (written["x_size"], written["channels"]) == (20, 3)
    assert resolve_config(RESUME, {**written, "x_size": 50}).flat()["data_seed"] == 4
    own = resolve_config({"data": "mine.npz"}).with_image_size(12, 3)
    assert own.scenes is None
    written = own.flat()
    assert (written["x_size"], written["channels"]) == (12, 3)
    assert not {"recipe", "counts", "num_scenes", "data_seed"} & written.keys()
    check_config(written, Path("file"))


def test_precedence(saved: dict[str, Any]) -> None:
    model = {**saved, "window_size": 30, "decoder_output_bias": -1.0}
    assert flat({})["window_size"] == ModelSettings().window_size
    assert flat({}, window_size=18)["window_size"] == 18
    assert flat({}, model, window_size=18)["window_size"] == 30
    assert flat({"window_size": 9}, model, window_size=18)["window_size"] == 9
    assert flat({"window_size": 9}, window_size=18)["window_size"] == 9
    assert flat(RESUME, model)["window_size"] == 30
    older = {key: value for key, value in saved.items() if key != "embed_channels"}
    assert flat({}, embed_channels=[16])["embed_channels"] == [16]
    assert flat({}, older, embed_channels=[16])["embed_channels"] is None


def test_a_resumed_run_keeps_its_settings(saved: dict[str, Any]) -> None:
    resolved = flat({**RESUME, "num_steps": 20, "seed": 4}, saved)
    assert (resolved["num_steps"], resolved["seed"], resolved["counts"]) == (20, 4, [1])
    with pytest.raises(ValueError, match=r"--batch-size: --resume keeps .* has 64, got 32"):
        flat({**RESUME, "batch_size": 32}, saved)
    saved["lr_schedule"] = "cosine"  # of which the number of steps is a part
    flat({**RESUME, "num_steps": 10}, saved)
    with pytest.raises(ValueError, match=r"--num-steps: --resume keeps .* has 10, got 20"):
        flat({**RESUME, "num_steps": 20}, saved)
    del saved["lr_schedule"]  # of a program with fewer flags
    assert flat(RESUME, saved)["lr_schedule"] == TrainingSettings().lr_schedule


def test_a_resumed_run_names_no_files_to_write_and_no_servers(saved: dict[str, Any]) -> None:
    saved |= {"save": "x.pt", "viz": True, "visdom_server": "http://elsewhere", "cache_dir": "x"}
    resolved, default = flat(RESUME, saved), flat({})
    for key in ("save", "viz", "visdom_server", "cache_dir"):
        assert resolved[key] == default[key]


def images(cli_args: dict[str, Any], saved: dict[str, Any] | None = None) -> list[Any]:
    found = resolve_config({"data": "pictures", **cli_args}, saved or {}).images
    return [found.x_size, found.channels, found.crop, found.invert]


def test_images_of_your_own_are_as_they_are_unless_flags_run_or_model_say_more(
    saved: dict[str, Any],
) -> None:
    assert images({}) == [None, None, None, False]
    surveyed = {"x_size": (48, ""), "channels": (1, ""), "invert": (True, "")}
    found = resolve_config({"data": "pictures", "channels": 3}, {}, surveyed).images
    assert (found.x_size, found.channels, found.crop, found.invert) == (48, 3, False, True)
    assert images({"x_size": 40}) == [40, None, False, False]
    assert images({"x_size": 40, "crop": True})[2] is True
    with pytest.raises(ValueError, match="--crop: expected --x-size too"):
        images({"crop": True})
    with pytest.raises(ValueError, match="--no-crop: expected --x-size too"):
        images({"crop": False})
    saved |= {"data": "pictures", "x_size": 30, "channels": 3, "crop": True, "invert": True}
    assert images(RESUME, saved) == images({}, saved) == [30, 3, True, True]
    assert images({"x_size": 40}, saved) == [40, 3, True, True]
    large = {**saved, "spot_size": 90}  # for the beginning of a new training
    assert resolve_config({"data": "others", "load": "w"}, large).images.spot_size is None
    assert resolve_config(RESUME, large).images.spot_size == 90
    with pytest.raises(ValueError, match=r"--x-size: --resume keeps .* has 30, got 40"):
        images({**RESUME, "x_size": 40}, saved)
    saved["crop"] = None  # it was trained on images of its size
    assert images({}, saved) == [None, 3, None, True]
    assert images({"crop": False}, saved) == [30, 3, False, True]


def test_a_loaded_model_brings_its_settings_and_its_prior_at_the_saved_step(
    saved: dict[str, Any],
) -> None:
    resolved = flat({"batch_size": 32, "z_pres_prior": 0.1}, saved)
    assert resolved["likelihood_sd"] == 0.2
    assert (resolved["batch_size"], resolved["z_pres_prior"]) == (32, 0.1)
    for key in ("seed", "num_steps"):  # they are not the model's
        assert resolved[key] == DEFAULTS[key]
    for given, counts in (
        ({}, [0, 1]),
        ({"counts": [2]}, [2]),
        ({"recipe": "dsprites"}, DEFAULTS["counts"]),
    ):
        assert flat(given, saved | {"counts": [0, 1]})["counts"] == counts
    of_pictures = saved | {"data": "pictures", "counts": [0, 1]}
    assert flat({}, of_pictures)["counts"] == DEFAULTS["counts"]
    saved |= {"anneal_prior": "exp", "z_pres_prior": 0.9, "z_pres_prior_raw": True}
    saved["count_prior"] = [4, 3, 2, 1]
    resolved = flat({}, saved)
    assert (resolved["count_prior"], resolved["anneal_prior"]) == ([4, 3, 2, 1], "none")
    for given in ({"z_pres_prior": 0.1}, {"model_steps": 6}, {"count_prior": [1, 1, 1, 1]}):
        resolved = flat(given, saved)
        assert resolved["count_prior"] == given.get("count_prior")
        assert resolved["z_pres_prior_raw"] == ("z_pres_prior" not in given)


@pytest.mark.parametrize(
    ("cli_args", "compile"),
    [
        ({"num_steps": COMPILE_MIN_STEPS}, True),
        ({"num_steps": COMPILE_MIN_STEPS - 1}, False),
        ({"num_steps": COMPILE_MIN_STEPS, "compile": False}, False),
        ({"num_steps": 1, "compile": True}, True),
    ],
)
def test_long_trainings_are_compiled(cli_args: dict[str, Any], compile: bool) -> None:
    assert resolve_config(cli_args).training.compile == compile


def test_added_scenes_that_would_never_begin_are_hinted_at() -> None:
    (hint,) = config_hints(resolve_config({"added_scenes": 9.0, "num_steps": 4}))
    assert hint.startswith("--added-scenes has no effect: it begins after step 2000, and")
    assert config_hints(resolve_config({"added_scenes": 9.0})) == []
    assert config_hints(resolve_config({"num_steps": 4})) == []


def test_configurations_in_files_are_checked() -> None:
    for whole in (flat({}), {}):
        check_config(whole, Path("file"))
    for key, value in [
        ("batch_size", "8"), ("batch_size", 8.5), ("counts", [1, "x"]), ("counts", 3), ("viz", 1),
        ("device", 5), ("estimator", "no"), ("learning_rate", -1.0), ("use_masking", "yes"),
        ("seed", True), ("window_size", None), ("non_linearity", "Nonsense"), ("cache_dir", 3),
    ]:  # fmt: skip
        with pytest.raises(CheckpointError, match=r"^file: --\S+: expected .*, got "):
            check_config({key: value}, Path("file"))
    # It would pass for a number, and could not be written again.
    with pytest.raises(CheckpointError, match="file: the settings are not all plain values"):
        check_config({**DEFAULTS, "alarm_after": torch.tensor(7)}, Path("file"))
