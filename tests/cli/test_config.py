"""The configuration: where defaults come from, what a run that goes on or a model keeps."""

import inspect
from dataclasses import fields
from typing import Any

import pytest

import main
from air import AIR
from air.cli import config
from air.training.settings import TrainingSettings


def test_defaults_are_those_of_the_code() -> None:
    signature = inspect.signature(AIR).parameters
    for name, flag in config.AIR_ARGUMENTS.items():
        assert config.DEFAULTS[flag] == signature[name].default
    for field in fields(TrainingSettings):
        assert config.DEFAULTS[field.name] == field.default


@pytest.fixture
def saved() -> dict[str, Any]:
    return {**config.DEFAULTS, "seed": 4, "num_steps": 10, "likelihood_sd": 0.2, "counts": [1]}


def test_a_run_that_goes_on_keeps_its_settings(saved: dict[str, Any]) -> None:
    merged = config.merge_resumed(saved, {"resume": "run", "num_steps": 20, "seed": 4})
    assert (merged["num_steps"], merged["seed"], merged["counts"]) == (20, 4, [1])
    with pytest.raises(ValueError, match=r"--resume keeps the settings .* where batch_size is 64"):
        config.merge_resumed(saved, {"batch_size": 32})


def test_a_run_of_a_program_with_fewer_flags_goes_on(saved: dict[str, Any]) -> None:
    del saved["lr_schedule"]
    merged = config.merge_resumed(saved, {"num_steps": 20})
    assert merged["lr_schedule"] == TrainingSettings().lr_schedule


def test_the_number_of_steps_is_part_of_a_cosine_schedule(saved: dict[str, Any]) -> None:
    saved["lr_schedule"] = "cosine"
    config.merge_resumed(saved, {"num_steps": 10})
    with pytest.raises(ValueError, match="where num_steps is 10, got 20"):
        config.merge_resumed(saved, {"num_steps": 20})


def test_a_model_that_is_loaded_brings_its_own_settings(saved: dict[str, Any]) -> None:
    merged = config.merge_new(saved, {"batch_size": 32, "z_pres_prior": 0.1})
    assert merged["likelihood_sd"] == 0.2
    assert (merged["batch_size"], merged["z_pres_prior"]) == (32, 0.1)
    assert not {"seed", "num_steps", "counts"} & merged.keys()
    assert config.merge_new({}, {"batch_size": 32}) == {"batch_size": 32}


def test_a_model_is_loaded_with_its_prior_as_it_stood_unless_another_is_given(
    saved: dict[str, Any],
) -> None:
    saved |= {"anneal_prior": "exp", "z_pres_prior": 0.9, "z_pres_prior_raw": True}
    saved |= {"count_prior": [4, 3, 2, 1]}  # as the checkpoint has it
    assert config.merge_new(saved, {})["count_prior"] == [4, 3, 2, 1]
    assert "anneal_prior" not in config.merge_new(saved, {})
    for given in ({"z_pres_prior": 0.1}, {"model_steps": 6}, {"count_prior": [1, 1, 1, 1]}):
        merged = config.merge_new(saved, given)
        assert merged.get("count_prior") == given.get("count_prior")
        assert ("z_pres_prior_raw" in merged) == ("z_pres_prior" not in given)
    merged = config.merge_new({}, {"preset": "dsprites", "scale_mean": 2.0})
    assert "sides" not in merged


@pytest.mark.parametrize("preset", config.PRESETS)
def test_a_preset_stands_for_what_is_not_given(preset: str, saved: dict[str, Any]) -> None:
    assert config.PRESETS[preset].keys() <= main.DEFAULTS.keys()
    merged = config.merge_new({}, {"preset": preset, "window_size": 9})
    assert merged == {**config.PRESETS[preset], "preset": preset, "window_size": 9}
    loaded = config.merge_new({**saved, "window_size": 30}, {"preset": preset})
    assert (loaded["window_size"], loaded["x_size"]) == (30, 64)


def test_long_runs_are_compiled_unless_told_otherwise(saved: dict[str, Any]) -> None:
    long = {**saved, "num_steps": config.COMPILE_MIN_STEPS}
    assert config.is_compiled(long)
    assert not config.is_compiled({**long, "num_steps": config.COMPILE_MIN_STEPS - 1})
    assert not config.is_compiled({**long, "jit": True})
    assert not config.is_compiled({**long, "compile": False})
    assert config.is_compiled({**saved, "compile": True})


@pytest.mark.parametrize("name", ["toaster", "cuda:77", "meta", ""])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(ValueError, match="--device: cannot use"):
        config.pick_device(name)
