"""The configuration: precedence of its sources, and what a resumed run or a loaded model keeps."""

import inspect
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from air import AIR
from air.cli.config import (
    COMPILE_MIN_STEPS,
    check_config,
    resolve_config,
    with_image_size,
)
from air.cli.flags import DEFAULTS
from air.cli.presets import PRESETS
from air.model_settings import ModelSettings
from air.storage.checkpoint import CheckpointError
from air.training.settings import TrainingSettings
from multi_mnist import SceneSettings


@pytest.fixture
def saved() -> dict[str, Any]:
    return {**DEFAULTS, "seed": 4, "num_steps": 10, "likelihood_sd": 0.2, "counts": [1]}


def test_every_default_is_stated_once() -> None:
    signature = inspect.signature(AIR).parameters
    for name, value in asdict(ModelSettings()).items():
        assert signature[name].default == value
    assert {**DEFAULTS, **asdict(TrainingSettings())} == DEFAULTS


def test_no_two_settings_share_a_key_but_the_size_of_the_images() -> None:
    assert DEFAULTS["x_size"] == ModelSettings().x_size == SceneSettings().x_size
    assert (DEFAULTS["seed"], DEFAULTS["data_seed"]) == (TrainingSettings().seed, 0)


def test_precedence(saved: dict[str, Any]) -> None:
    preset = {"preset": "dsprites"}
    model = {**saved, "window_size": 30, "decoder_output_bias": -1.0}
    assert resolve_config({})["window_size"] == ModelSettings().window_size
    assert resolve_config(preset)["window_size"] == 18
    assert resolve_config(preset, model=model)["window_size"] == 30
    assert resolve_config({**preset, "window_size": 9}, model=model)["window_size"] == 9
    assert resolve_config({}, run=model)["window_size"] == 30
    older = {key: value for key, value in saved.items() if key != "embed_channels"}
    assert resolve_config({"preset": "close-digits"})["embed_channels"] == [16, 32, 32]
    assert resolve_config({"preset": "close-digits"}, model=older)["embed_channels"] is None
    assert resolve_config({"preset": "background"})["background_model"] == "vae"
    assert resolve_config({"preset": "background"}, model=older)["background_model"] == "none"
    learnt = {**older, "background_model": "vae", "background_steps": 100}
    assert resolve_config({}, model=learnt)["background_steps"] == 0
    assert resolve_config({"background_steps": 7}, model=learnt)["background_steps"] == 7


def test_a_resumed_run_keeps_its_settings(saved: dict[str, Any]) -> None:
    resolved = resolve_config({"resume": "run", "num_steps": 20, "seed": 4}, run=saved)
    assert (resolved["num_steps"], resolved["seed"], resolved["counts"]) == (20, 4, [1])
    with pytest.raises(ValueError, match=r"--resume keeps the settings .* where batch_size is 64"):
        resolve_config({"batch_size": 32}, run=saved)


def test_a_resumed_run_names_no_files_to_write_and_no_servers(saved: dict[str, Any]) -> None:
    saved |= {"save": "x.pt", "viz": True, "visdom_server": "http://elsewhere", "cache_dir": "x"}
    resolved = resolve_config({}, run=saved)
    for key in ("save", "viz", "visdom_server", "cache_dir"):
        assert resolved[key] == DEFAULTS[key]


def test_a_run_of_a_program_with_fewer_flags_is_resumed(saved: dict[str, Any]) -> None:
    del saved["lr_schedule"]
    resolved = resolve_config({"num_steps": 20}, run=saved)
    assert resolved["lr_schedule"] == TrainingSettings().lr_schedule


def test_the_number_of_steps_is_part_of_a_cosine_schedule(saved: dict[str, Any]) -> None:
    saved["lr_schedule"] = "cosine"
    resolve_config({"num_steps": 10}, run=saved)
    with pytest.raises(ValueError, match="where num_steps is 10, got 20"):
        resolve_config({"num_steps": 20}, run=saved)


def images(config: dict[str, Any]) -> list[Any]:
    return [config[key] for key in ("x_size", "channels", "crop", "invert")]


def test_images_of_ones_own_are_as_they_are_unless_flags_run_or_model_say_more(
    saved: dict[str, Any],
) -> None:
    data = {"data": "pictures"}
    assert images(resolve_config(data)) == [None, None, None, False]
    assert images(resolve_config({**data, "preset": "dsprites"})) == [None, None, None, False]
    assert images(resolve_config({**data, "x_size": 40})) == [40, None, False, False]
    assert images(resolve_config({**data, "x_size": 40, "crop": True}))[2] is True
    with pytest.raises(ValueError, match="--crop: expected --x-size too"):
        resolve_config({**data, "crop": True})
    saved |= {**data, "x_size": 30, "channels": 3, "crop": True, "invert": True}
    assert images(resolve_config({}, run=saved)) == [30, 3, True, True]
    assert images(resolve_config(data, model=saved)) == [30, 3, True, True]
    assert images(resolve_config({**data, "x_size": 40}, model=saved)) == [40, 3, True, True]
    saved["crop"] = None  # it was trained on images of its size
    assert images(resolve_config(data, model=saved)) == [None, 3, None, True]
    del saved["crop"], saved["invert"]  # of an earlier program
    assert images(resolve_config({}, run=saved)) == [None, None, None, False]


def test_a_loaded_model_brings_its_own_settings(saved: dict[str, Any]) -> None:
    resolved = resolve_config({"batch_size": 32, "z_pres_prior": 0.1}, model=saved)
    assert resolved["likelihood_sd"] == 0.2
    assert (resolved["batch_size"], resolved["z_pres_prior"]) == (32, 0.1)
    for key in ("seed", "num_steps", "counts"):  # they are not the model's
        assert resolved[key] == DEFAULTS[key]


def test_a_model_is_loaded_with_its_prior_at_the_saved_step_unless_another_is_given(
    saved: dict[str, Any],
) -> None:
    saved |= {"anneal_prior": "exp", "z_pres_prior": 0.9, "z_pres_prior_raw": True}
    saved |= {"count_prior": [4, 3, 2, 1]}  # as read from a checkpoint
    assert resolve_config({}, model=saved)["count_prior"] == [4, 3, 2, 1]
    assert resolve_config({}, model=saved)["anneal_prior"] == "none"
    for given in ({"z_pres_prior": 0.1}, {"model_steps": 6}, {"count_prior": [1, 1, 1, 1]}):
        resolved = resolve_config(given, model=saved)
        assert resolved["count_prior"] == given.get("count_prior")
        assert resolved["z_pres_prior_raw"] == ("z_pres_prior" not in given)
    assert resolve_config({"preset": "dsprites"})["sides"] == [9, 18]
    assert resolve_config({"preset": "dsprites", "scale_mean": 2.0})["sides"] is None


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_stands_for_flags_that_are_not_given(name: str) -> None:
    assert PRESETS[name].keys() <= DEFAULTS.keys()
    check_config(PRESETS[name], Path("preset"))
    resolved = resolve_config({"preset": name, "window_size": 9})
    follows = {"model_steps": 6, "scale_prior_mean": 3.48, "pos_prior_sd": 2.01}
    assert resolved == {
        **DEFAULTS, **PRESETS[name], **(follows if name == "many" else {}), "preset": name,
        "window_size": 9, "compile": resolved["compile"],
    }  # fmt: skip


def test_steps_and_windows_follow_from_many_objects() -> None:
    many = resolve_config({"preset": "many", "x_size": 84, "counts": [0, 9, 4], "sides": [20, 40]})
    assert (many["model_steps"], many["window_size"]) == (10, 28)
    assert 84 / many["scale_prior_mean"] == pytest.approx(46, rel=0.01)
    # so that windows of the prior have their centres as uniform ones would, within the image
    assert many["pos_prior_sd"] / many["scale_prior_mean"] == pytest.approx(3**-0.5, rel=0.01)
    small = resolve_config({"preset": "many", "sides": [4, 5], "scale_prior_mean": 6.0})
    assert (small["window_size"], small["pos_prior_sd"]) == (10, 3.46)
    large = resolve_config({"preset": "many", "scale_mean": 0.5, "model_steps": 4})
    assert (large["sides"], large["scale_prior_mean"], large["model_steps"]) == (None, 1.0, 4)


def test_long_runs_are_compiled_unless_told_otherwise() -> None:
    def compiles(**cli_args: Any) -> bool:  # noqa: ANN401
        return bool(resolve_config(cli_args)["compile"])

    assert compiles(num_steps=COMPILE_MIN_STEPS)
    assert not compiles(num_steps=COMPILE_MIN_STEPS - 1)
    assert not compiles(num_steps=COMPILE_MIN_STEPS, jit=True)
    assert not compiles(num_steps=COMPILE_MIN_STEPS, compile=False)
    assert compiles(num_steps=1, compile=True)


def test_a_run_on_data_of_ones_own_records_their_size_and_no_scenes_that_were_not_made() -> None:
    made = with_image_size(resolve_config({"x_size": 64}), 64, 1)
    assert (made["x_size"], made["channels"], made["recipe"]) == (64, 1, "air")
    own = with_image_size(resolve_config({"data": "mine.npz"}), 12, 3)
    assert (own["x_size"], own["channels"]) == (12, 3)
    assert not {"recipe", "counts", "num_scenes", "data_seed"} & own.keys()
    check_config(own, Path("file"))


def test_configurations_in_files_are_checked() -> None:
    for whole in (DEFAULTS, {}):
        check_config(whole, Path("file"))
    for key, value in [
        ("batch_size", "8"), ("batch_size", 8.5), ("counts", [1, "x"]), ("counts", 3), ("viz", 1),
        ("device", 5), ("estimator", "no"), ("learning_rate", -1.0), ("use_masking", "yes"),
        ("seed", True), ("window_size", None), ("non_linearity", "Nonsense"), ("cache_dir", 3),
        ("preset", "none"),
    ]:  # fmt: skip
        with pytest.raises(CheckpointError, match=r"^file: --\S+: expected .*, got "):
            check_config({key: value}, Path("file"))


def test_a_tensor_does_not_pass_for_a_number_in_a_file() -> None:
    """It could not be written again."""
    with pytest.raises(CheckpointError, match="file: the settings are not all plain values"):
        check_config({**DEFAULTS, "alarm_after": torch.tensor(7)}, Path("file"))
