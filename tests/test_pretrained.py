"""The models in the package do on fresh scenes what their cards say, and are loaded by name."""

import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Run, small_air
from PIL import Image

from air.cli.recipe import unlike_training
from air.data.synthetic.scene_settings import SceneSettings
from air.detect import detect, load_air, main
from air.multi_mnist import load_scenes
from air.storage.checkpoint import CheckpointError, read_weights, save_weights
from air.storage.pretrained import FOLDER, card, names
from air.support.fields import from_config

FRESH = 300  # scenes


def fresh_scenes(name: str, number: int) -> SceneSettings:
    settings = from_config(SceneSettings, read_weights(name)[1])
    return replace(settings, seed=settings.seed + 1000, num_scenes=2, num_test_scenes=number)


@pytest.mark.parametrize("name", names())
def test_a_model_counts_fresh_scenes_as_its_card_says(name: str) -> None:
    """Whatever changes between pixels and counts shows here, in the loader or in the nets."""
    scenes = load_scenes(fresh_scenes(name, FRESH)).test
    air = load_air(name)
    assert {p.dtype for p in air.parameters()} == {torch.float32}  # halves only in the file
    counts = np.array([found.count for found in detect(air, scenes.x)])
    p = card(name)["held_out"]["accuracy_mode"] / 100
    assert p > 0.9
    right = float((counts == scenes.counts).mean())
    assert right >= p - 4 * math.sqrt(p * (1 - p) / FRESH)


def test_the_models_are_few_small_and_have_cards() -> None:
    assert {"digits", "many-digits", "sprites"} == {*names()}
    assert sum(path.stat().st_size for path in FOLDER.glob("*.pt")) <= 8_500_000
    for name in names():
        weights, config = read_weights(name)
        assert not {"output_dir", "mnist_dir", "cache_dir", "data"} & config.keys()  # no paths
        assert not any(key.startswith("bl_") for key in weights)
        about = card(name)
        assert about["held_out"].keys() == about["held_out_in_single_precision"].keys()
        lost = about["held_out_in_single_precision"]["accuracy_mode"]
        assert lost - about["held_out"]["accuracy_mode"] <= 0.1
        assert all(about[key] for key in ("for", "fails_at", "command", "commit", "versions"))


@pytest.mark.slow
def test_main_evaluates_a_model_on_the_scenes_of_its_training(
    tmp_path: Path, succeeds: Run
) -> None:
    few = "--num-scenes 100 --num-test-scenes 60 --iwae-samples 2"
    done = succeeds(f"--load many-digits -n 0 --evaluate {few} --output-dir a")
    assert "--load many-digits is a pretrained model; its card is" in done.stdout
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert (config["x_size"], config["counts"]) == (84, [*range(10)])
    evaluation = json.loads((tmp_path / "a/evaluation.json").read_text())
    assert evaluation["accuracy_mode"] >= 0.85

    succeeds(f"--load digits -n 0 --evaluate {few} --counts 1 --output-dir b")
    assert json.loads((tmp_path / "b/config.json").read_text())["counts"] == [1]


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--estimator score"])
def test_a_model_is_tuned_to_a_folder_of_larger_pictures(
    flags: str, tmp_path: Path, succeeds: Run
) -> None:
    (tmp_path / "mine").mkdir()
    for k, pixels in enumerate(load_scenes(fresh_scenes("digits", 30)).test.x):
        Image.fromarray(pixels).convert("RGB").resize((75, 75)).save(tmp_path / f"mine/{k}.png")
    line = f"--load digits --data mine -n 2 -b 8 --eval-every 1 --output-dir tuned {flags}"
    succeeds(line)
    before, after = read_weights("digits")[0], read_weights(tmp_path / "tuned/checkpoint.pt")[0]
    drift = max(
        (after[name] - w.float()).abs().max().item()
        for name, w in before.items()
        if w.is_floating_point()
    )
    assert 0 < drift < 0.01  # two steps from the weights of the package


def test_a_file_comes_before_a_model_of_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    air = small_air(x_size=50, window_size=28)
    with contextlib.chdir(tmp_path):
        assert main(["--load", "digits", str(FOLDER / "pictures/digits")]) == 0
        assert "--load digits is a pretrained model" in capsys.readouterr().err
        Path("many-digits").mkdir()  # which cannot be weights
        assert load_air("many-digits").x_size == 84
        save_weights(air, "digits")
        with pytest.raises(SystemExit, match="2"):
            main(["--load", "digits", str(FOLDER / "pictures/digits")])
        assert "is the file here, not the pretrained model" in capsys.readouterr().err
        with pytest.raises(CheckpointError, match="do not fit"):
            load_air("digits")
        assert load_air(FOLDER / "digits.pt").x_size == 50


def test_an_unknown_name_lists_the_models() -> None:
    with pytest.raises(CheckpointError, match="pretrained models are digits, many-digits, sprites"):
        load_air("digit")
    with pytest.raises(CheckpointError, match=r"missing\.pt$"):
        load_air("runs/missing.pt")


def test_images_unlike_those_of_training_are_told() -> None:
    """By what the survey of training found: the settings of a user say nothing of the images."""
    config, settings = read_weights("digits")[1], fresh_scenes("digits", 100)

    def told(config: dict[str, Any] = config, **others: Any) -> str:  # noqa: ANN401
        return "; ".join(unlike_training(load_scenes(replace(settings, **others)).test.x, config))

    assert told() == ""
    assert "show more than 2 spots" in told(counts=(3,))
    assert "cut out parts" in told(sides=(10, 12))
    assert "pad the images" in told(sides=(28, 30))
    assert told(config | {"found": []}, sides=(10, 12)) == ""
    assert unlike_training(np.zeros((0, 50, 50), np.uint8), config) == []
