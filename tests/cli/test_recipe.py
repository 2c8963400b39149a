"""The settings that follow from images suit images that are known; flags win."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Run, run, squares
from PIL import Image

from air.cli import recipe
from air.cli.config import resolve_config
from air.cli.recipe import (
    MAX_STEPS,
    RARE,
    Found,
    describe,
    find_image_settings,
    find_recipe_settings,
    find_settings,
)
from air.data.scenes import Array, Scenes, SceneSplits
from air.data.survey import survey
from air.data.user_images.picture_files import write_pictures
from air.multi_mnist import SceneSettings, load_scenes
from air.training.from_spots import MARGIN


def settings(x: Array, counts: Array | None = None, **given: object) -> dict[str, Any]:
    scenes = SceneSplits(Scenes(x, counts), Scenes(x, counts), "")
    found = find_settings(survey(x), scenes, given)
    assert all(reason for _, reason in found.values())
    return {key: value for key, (value, _) in found.items()}


def image_settings(path: Path, **given: object) -> dict[str, Any]:
    return {key: value for key, (value, _) in find_image_settings(path, given).items()}


def test_windows_steps_and_worth_follow_from_the_objects() -> None:
    x = squares(200, (48, 48), 12, 2)[:, 0]
    found = settings(x)
    assert found["model_steps"] == 3
    assert found["window_size"] == round(1.2 * 12)
    assert found["scale_prior_mean"] == pytest.approx(48 / (MARGIN * 12), abs=0.01)
    assert "background_model" not in found
    worths = np.square(x / 255).sum((1, 2))[1::3]  # of one square each
    assert np.median(worths) / (2 * found["likelihood_sd"] ** 2) == pytest.approx(500, rel=0.05)
    assert found["spot_steps"] == found["added_scenes_from"] > 0


def test_true_counts_set_the_steps() -> None:
    x = squares(90, (48, 48), 12, 2)[:, 0]
    assert settings(x, np.arange(90) % 6)["model_steps"] == 6
    assert settings(np.zeros((9, 20, 20), np.uint8))["model_steps"] == 2


def test_a_model_of_the_background_is_chosen_where_it_is_not_black() -> None:
    x = squares(120, (48, 48), 12, 2)[:, 0]
    assert settings(np.maximum(x, 80))["background_model"] == "pca"
    ramp = np.linspace(0, 120, 48).astype(np.uint8)
    assert settings(np.maximum(x, ramp))["background_model"] == "pca"


def test_glimpses_see_the_threshold_and_weigh_colours_where_the_background_varies() -> None:
    x = squares(120, (48, 48), 12, 2, channels=3)
    found = settings(x)
    assert 0 < found["glimpse_threshold"] < 1
    assert "glimpse_colours" not in found
    stones = np.random.default_rng(0).integers(40, 160, (120, 1, 48, 48), np.uint8)
    assert len(settings(np.where(x > 0, x, stones))["glimpse_colours"]) == 9
    assert not {*settings(x, guide="image")} & {"glimpse_threshold", "glimpse_colours"}
    tiny = squares(60, (48, 48), 4, 2, channels=3)  # what is left of the others would hide them
    assert "glimpse_threshold" not in settings(np.concatenate((x, tiny)))


@pytest.mark.parametrize("side", [24, 48, 96])
def test_users_pictures_train_for_a_quarter_of_an_hour(side: int) -> None:
    x = squares(60, (side, side), side // 4, 2, channels=3)
    number, text = find_settings(survey(x), SceneSplits(Scenes(x), Scenes(x), ""), {"data": "x"})[
        "num_steps"
    ]
    minutes = re.match(r"some (\d+) minutes", text)
    assert minutes
    assert int(minutes[1]) <= 15
    assert number % 100 == 0


def test_given_flags_win() -> None:
    x = squares(90, (48, 48), 12, 2)[:, 0]
    found = settings(x, window_size=20, spot_steps=0, estimator="score", num_steps=100)
    assert not found.keys() & {"window_size", "spot_steps", "added_scenes", "num_steps"}
    assert settings(x, num_steps=100)["spot_steps"] == 50
    assert settings(x, model_steps=6)["guide"] == "glimpse"


def test_few_large_objects_are_seen_in_the_whole_image_if_there_are_many_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = squares(90, (48, 48), 12, 2)[:, 0]
    monkeypatch.setattr(recipe, "MANY_IMAGES", 91)
    assert settings(x)["guide"] == "glimpse"
    monkeypatch.setattr(recipe, "MANY_IMAGES", 90)
    assert settings(x)["guide"] == "image"
    assert settings(x, np.arange(90) % 6)["guide"] == "glimpse"
    assert settings(np.maximum(x, 80))["guide"] == "image"
    assert settings(squares(90, (64, 64), 6, 2)[:, 0])["guide"] == "glimpse"
    given = settings(x, guide="glimpse")
    assert "guide" not in given
    assert "embed_channels" not in given
    assert given["z_pres_bias"] < 0


def test_crowds_have_as_many_steps_as_are_bearable() -> None:
    x = squares(122, (64, 64), 4, 60)[:, 0]
    assert settings(x)["model_steps"] == MAX_STEPS


def test_light_large_and_odd_images_are_brought_into_shape(tmp_path: Path) -> None:
    images = 255 - squares(30, (150, 200), 24, 2, channels=3)[:, :1].repeat(3, 1)
    for k, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / f"{k}.png")
    found = image_settings(tmp_path)
    assert found["invert"] is True
    assert found["x_size"] == 96  # the greatest side: a square of 24 in 200 has 12 pixels then
    assert found["spot_size"] == 192  # a threshold sees more in larger images
    assert image_settings(tmp_path, x_size=40, invert=False) == {"spot_size": 192}
    np.savez(tmp_path / "grey.npz", x=255 - images)
    assert image_settings(tmp_path / "grey.npz", x_size=40) == {"channels": 1, "spot_size": 192}
    np.savez(tmp_path / "x.npz", x=squares(60, (48, 48), 12, 2))
    assert image_settings(tmp_path / "x.npz") == {}  # small black squares stay as they are


@pytest.mark.parametrize(("gap", "side"), [(20, 48), (3, 64), (2, 64)])
def test_images_are_as_small_as_a_threshold_sees_the_same_in_them(
    gap: int, side: int, tmp_path: Path
) -> None:
    x = np.zeros((30, 128, 128), np.uint8)
    for k, image in enumerate(x):
        y, left = 10 + 2 * k, 5 + k % 20
        image[y : y + 40, left : left + 30] = 255
        image[y : y + 40, left + 30 + gap : left + 60 + gap] = 255
    np.savez(tmp_path / "x.npz", x=x)
    assert image_settings(tmp_path / "x.npz")["x_size"] == side


def test_images_are_looked_at_as_flags_prepare_them(tmp_path: Path) -> None:
    """Of 150 x 200 pixels, so that they can be cropped to 100, but not to their longer side."""
    images = squares(30, (150, 200), 24, 2)
    np.savez(tmp_path / "x.npz", x=255 - images)
    assert image_settings(tmp_path / "x.npz", x_size=100, crop=True) == {"invert": True}
    assert "x_size" not in image_settings(tmp_path / "x.npz", crop=True)  # which is then refused


def test_what_was_seen_and_set_is_said() -> None:
    x = squares(60, (48, 48), 12, 2)[:, 0]
    seen = survey(x)
    found: Found = find_settings(seen, SceneSplits(Scenes(x), Scenes(x), ""), {})
    first, *lines = describe(seen, found)
    assert "60 training images" in first
    assert "0: 20, 1: 20, 2: 20" in first
    assert len(lines) == len(found)
    assert any("  embed_net = [200]: " in line for line in lines)


@pytest.mark.parametrize("line", ["--suggest --data nothing", "--suggest --data ."])
def test_images_that_cannot_be_read_end_in_one_line(
    line: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    done = run(line, tmp_path, environment)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr


@pytest.fixture
def suggested(tmp_path: Path, succeeds: Run) -> tuple[str, str]:
    """Flags of a run on pictures, and what is suggested."""
    scenes = SceneSettings(recipe="dsprites", x_size=30, num_scenes=60, num_test_scenes=10)
    train, test, _ = load_scenes(scenes, cache_dir=tmp_path / "cache")
    write_pictures(tmp_path / "pictures", {"": train, "test": test})
    line = "--data pictures -n 3 -b 4 --window-size 11"
    return line, succeeds(f"{line} --suggest").stdout


def test_a_suggestion_begins_no_run(tmp_path: Path, suggested: tuple[str, str]) -> None:
    assert "likelihood_sd = " in suggested[1]
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_pictures_train_by_what_follows_from_them(
    tmp_path: Path, succeeds: Run, suggested: tuple[str, str]
) -> None:
    line, said = suggested
    done = succeeds(f"{line} --output-dir run")
    assert done.stdout.startswith(said)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["window_size"] == 11
    assert "window_size" not in config["found"]
    assert {"likelihood_sd", "scale_prior_mean"} <= set(config["found"]) <= config.keys()
    again = succeeds("--resume run -n 3")
    assert "Survey" not in again.stdout


@pytest.mark.parametrize(
    ("recipe", "steps", "renderer"), [("solids", 1, "solids"), ("table-top", 3, "solids")]
)
def test_a_recipe_of_solids_brings_its_settings(recipe: str, steps: int, renderer: str) -> None:
    found = find_recipe_settings({"recipe": recipe, "likelihood_sd": 0.5})
    assert found["model_steps"][0] == steps
    assert found["renderer"][0] == renderer
    assert "likelihood_sd" not in found  # a flag wins
    for prior in ({"z_pres_prior": 0.5}, {"z_pres_prior_raw": True}):
        assert "count_prior" not in find_recipe_settings({"recipe": recipe, **prior})
    config = resolve_config({"recipe": recipe}, found=found)
    assert config.model.renderer == renderer
    assert max(config.scenes.counts) == steps
    given = {"recipe": recipe, "counts": (0, 1, 2)}  # as by default, but given
    assert find_recipe_settings(given)["model_steps"][0] == 2
    scenes = resolve_config(given).scenes
    assert (scenes.counts, scenes.x_size) == ((0, 1, 2), 32)
    given = {"recipe": recipe, "counts": (2,), "model_steps": 3}
    found = find_recipe_settings(given)
    prior = [RARE, RARE, 1.0, RARE]
    assert found["count_prior"][0] == prior
    assert resolve_config(given, found=found).training.count_prior == prior


@pytest.mark.parametrize(
    ("key", "value"), [("added_scenes", 1.0), ("spot_steps", 5), ("refine", True)]
)
def test_what_needs_a_decoder_is_refused_with_a_renderer(key: str, value: object) -> None:
    given = {"recipe": "solids", key: value}
    with pytest.raises(ValueError, match=f"--{key.replace('_', '-')}: .* by a renderer"):
        resolve_config(given, found=find_recipe_settings(given))


def test_a_problem_with_a_recipe_names_the_flag() -> None:
    with pytest.raises(ValueError, match=r"^--digits: expected embedded for solids"):
        find_recipe_settings({"recipe": "solids", "digits": "mnist"})


def test_other_recipes_are_surveyed_but_for_strokes() -> None:
    assert find_recipe_settings({}) == find_recipe_settings({"recipe": "omniglot"}) == {}
    assert find_recipe_settings({"recipe": "strokes"})["model_steps"][0] == 6
