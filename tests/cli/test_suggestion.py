"""The suggested command suits images that are known, and runs."""

import shlex
from pathlib import Path

import numpy as np
import pytest
from helpers import run, squares
from PIL import Image

from air.cli.config import resolve_config
from air.cli.flags import build_parser
from air.cli.suggestion import suggest
from air.data.user_images.picture_files import write_pictures
from multi_mnist import SceneSettings, load_scenes


def suggestion(path: Path, *words: str) -> tuple[dict[str, object], str]:
    """The flags of the suggested command by key, and the whole text."""
    given = ["--data", str(path), "--suggest", *words]
    text = suggest(vars(build_parser().parse_args(given)), given, "python main.py")
    command = shlex.split(text.splitlines()[-1])
    assert command[:2] == ["python", "main.py"]
    return vars(build_parser().parse_args(command[2:])), text


@pytest.mark.parametrize("channels", [1, 3])
def test_windows_fit_the_objects(channels: int, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=squares(200, (48, 48), 10, 3, channels))
    flags, text = suggestion(tmp_path / "x.npz")
    assert flags["window_size"] == 12  # 1.2 squares
    assert flags["scale_prior_mean"] == 4.0  # 48 / 12
    assert flags["model_steps"] == 3
    assert flags["preset"] == ("dsprites" if channels == 3 else "small-digits")
    assert "suggest" not in flags
    assert "x_size" not in flags
    reasons = text.splitlines()[:-1]
    assert all(line.startswith("# ") for line in reasons)
    for flag in ("--preset", "--window-size", "--scale-prior-mean", "-t "):
        assert sum(line.startswith(f"# {flag}") for line in reasons) == 1


def test_many_objects_get_their_preset(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=squares(200, (48, 48), 6, 4))
    flags, text = suggestion(tmp_path / "x.npz")
    assert (flags["preset"], flags["model_steps"]) == ("many", 4)
    assert "for up to 4 objects" in text


def test_given_flags_are_kept(tmp_path: Path) -> None:
    np.savez(tmp_path / "x y.npz", x=squares(200, (48, 48), 10, 3))
    flags, text = suggestion(tmp_path / "x y.npz", "-t", "5", "-n", "400", "--window-size", "20")
    assert (flags["model_steps"], flags["window_size"], flags["num_steps"]) == (5, 20, 400)
    assert flags["anneal_prior_duration"] == 200
    assert text.count("--window-size") == text.count("-t 5") == 1
    assert flags["data"] == f"{tmp_path}/x y.npz"


def test_light_large_and_odd_images_are_brought_into_shape(tmp_path: Path) -> None:
    images = 255 - squares(60, (150, 200), 24, 2, channels=3)[:, :1].repeat(3, 1)
    for k, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / f"{k}.png")
    flags, text = suggestion(tmp_path)
    assert flags["invert"] is True
    assert flags["x_size"] == 104  # 12 pixels for a square of 24 in 200
    assert flags["preset"] == "small-digits"
    assert "up to" not in text
    assert "Only 60 images: the model may overfit" in text
    np.savez(tmp_path / "x.npz", x=images[:, :, :, :150])
    assert suggestion(tmp_path / "x.npz")[0]["channels"] == 1


@pytest.mark.parametrize(("channels", "side"), [(1, 20), (1, 9), (3, 20)])
def test_a_background_that_is_not_black_is_modelled(
    channels: int, side: int, tmp_path: Path
) -> None:
    images = squares(80, (48, 48), side, 1, channels)
    np.savez(tmp_path / "x.npz", x=np.maximum(images, 80))
    flags, text = suggestion(tmp_path / "x.npz")
    assert flags["preset"] == "background"
    assert "the background is not black (80 of 255)" in text
    assert resolve_config(flags).model.background_model == "vae"


def test_images_are_looked_at_as_the_given_flags_prepare_them(tmp_path: Path) -> None:
    images = np.zeros((40, 3, 96, 96), np.uint8)
    images[:, :, 32:64, 32:64] = squares(40, (32, 32), 8, 2, channels=3)
    np.savez(tmp_path / "x.npz", x=images)
    given = ["--x-size", "32", "--crop", "--channels", "1"]
    flags, text = suggestion(tmp_path / "x.npz", *given)
    assert flags["scale_prior_mean"] == 3.3  # 32 / (1.2 * 8), not 96 / (1.2 * 8)
    assert "preset" not in flags  # no longer small, and grey
    assert "32 x 32 pixels, in grey" in text
    np.savez(tmp_path / "x.npz", x=255 - images)
    assert suggestion(tmp_path / "x.npz", *given, "--invert")[0] == {**flags, "invert": True}


def test_images_without_objects_and_single_images_have_a_suggestion(tmp_path: Path) -> None:
    for n in (1, 30):
        np.savez(tmp_path / "x.npz", x=np.zeros((n, 20, 20), np.uint8))
        assert suggestion(tmp_path / "x.npz")[0]["model_steps"] == 1


def test_images_with_many_different_numbers_of_spots_have_a_suggestion(tmp_path: Path) -> None:
    """As of stars or cells: no number of spots is seen in one of a hundred images."""
    x = np.zeros((500, 64, 64), np.uint8)
    for i, image in enumerate(x):
        for k in range(i % 400):
            row, column = 3 * (k // 21), 3 * (k % 21)
            image[row : row + 2, column : column + 2] = 255
    np.savez(tmp_path / "x.npz", x=x)
    flags, text = suggestion(tmp_path / "x.npz")
    assert flags["model_steps"] == 394  # 495 of 500 images have at most so many
    assert "99 % of the images have at most 394 separate spots" in text


@pytest.mark.parametrize("line", ["--suggest", "--suggest --data nothing", "--suggest --data ."])
def test_images_that_cannot_be_read_end_in_one_line(
    line: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    done = run(line, tmp_path, environment)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr


def test_the_suggestion_runs(tmp_path: Path, environment: dict[str, str]) -> None:
    settings = SceneSettings(recipe="dsprites", x_size=30, num_scenes=60, num_test_scenes=10)
    train, test, _ = load_scenes(settings, cache_dir=tmp_path / "cache")
    write_pictures(tmp_path / "pictures", {"": train, "test": test})
    said = run("--data pictures -n 2 -b 4 --suggest", tmp_path, environment)
    assert said.returncode == 0, said.stderr
    command = said.stdout.splitlines()[-1].removeprefix("python main.py ")
    done = run(f"{command} --output-dir run", tmp_path, environment)
    assert done.returncode == 0, done.stderr
    assert "count accuracy" in done.stdout
