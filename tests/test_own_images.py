"""Runs on users' images, from --data to the record of how they were read."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Run, write_pictures, write_scenes

import air.detect
from air.storage.checkpoint import load_air

TINY = (
    "-n 2 -b 8 --lr-schedule constant --rnn-hidden-size 16 --encoder-net 12 --decoder-net 12 "
    "--predict-net 8"
)


@pytest.mark.slow
def test_a_run_on_users_data_records_their_size(tmp_path: Path, succeeds: Run) -> None:
    write_scenes(tmp_path / "mine.npz", size=30)
    succeeds(f"{TINY} --data mine.npz --output-dir run")
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    for config in (json.loads((tmp_path / "run" / "config.json").read_text()), state["config"]):
        assert (config["x_size"], config["channels"], config["data"]) == (30, 1, "mine.npz")
        assert not {"recipe", "counts", "num_scenes", "sides", "data_seed"} & config.keys()
    (tmp_path / "moved").mkdir()
    (tmp_path / "mine.npz").rename(tmp_path / "moved" / "mine.npz")
    succeeds("--resume run -n 4 --data moved/mine.npz")
    assert load_air(tmp_path / "run" / "checkpoint.pt").x_size == 30


@pytest.mark.slow
def test_a_run_on_pictures_records_how_they_are_read(
    tmp_path: Path,
    succeeds: Run,
    refused: Callable[[str], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_pictures(tmp_path / "pictures")
    flags = "--data pictures --x-size 32 --channels 1 --alpha-over white"
    done = succeeds(f"{TINY} {flags} --output-dir run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["x_size"], config["channels"], config["crop"]) == (32, 1, False)
    assert "inferred count" in done.stdout  # without true counts
    succeeds("--resume run -n 3")
    load = "--load run/checkpoint.pt --data pictures -n 0 --output-dir evaluated"
    succeeds(load)
    found = json.loads((tmp_path / "evaluated" / "config.json").read_text())
    for key in ("x_size", "channels", "crop", "alpha_over"):
        assert found[key] == config[key]
    (tmp_path / "pictures").rename(tmp_path / "moved")
    assert "if it has moved, give its new path by --data" in refused("--resume run -n 4")
    succeeds("--resume run -n 4 --data moved")
    capsys.readouterr()
    assert air.detect.main(["--load", "run/checkpoint.pt", "moved"]) == 0
    assert capsys.readouterr().out.count("\n") == 20


@pytest.mark.slow
def test_a_model_of_images_of_another_size_is_refused_with_both_sizes(
    tmp_path: Path, succeeds: Run, refused: Callable[[str], str]
) -> None:
    for size in (20, 30):
        write_scenes(tmp_path / f"{size}.npz", size=size)
    line = f"{TINY} --data 30.npz --output-dir run --save weights.pt"
    succeeds(line)
    said = refused(f"--load run/checkpoint.pt --data 20.npz {TINY}")
    assert "trained on images of [1, 30, 30]" in said
    assert "these images are [1, 20, 20]" in said
    said = refused(f"--load weights.pt --data 20.npz {TINY}")  # weights alone do not tell the size
    assert "the weights in weights.pt do not fit" in said


def test_probable_mistakes_are_reported(
    tmp_path: Path, succeeds: Run, caplog: pytest.LogCaptureFixture
) -> None:
    x = np.random.default_rng(0).integers(0, 2, (60, 20, 20), np.uint8)
    np.savez(tmp_path / "mine.npz", x=x, counts=np.sort(np.arange(60) % 5))
    succeeds("--data mine.npz --no-survey -n 1 -b 8 --no-compile")
    for hint in ("largest value in the images is 1", "some scenes have 4", "shuffle them"):
        assert caplog.text.count(hint) == 1
