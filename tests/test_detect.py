"""Detections in files of images are the model's inferences; unsuitable files are reported."""

import contextlib
import csv
import json
import sys
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import broken_pipe, count_on, exit_code, pixels_of, run, save_checkpoint, small_air
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from air import AIR
from air.data.user_images.preparation import ImageSettings
from air.data.user_images.sources import read_images
from air.data.user_images.tiles import best_views
from air.detect import DetectedObject, Detection, detect, detect_in_tiles, load_air, main
from air.evaluation.boxes import tight_boxes
from air.inference import infer


def write_png(path: Path, channels: int = 1, side: int = 12) -> torch.Tensor:
    shape = (side, side) if channels == 1 else (side, side, channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    Image.fromarray(pixels).save(path)
    return torch.from_numpy(pixels if channels == 1 else pixels.transpose(2, 0, 1).copy())


@pytest.fixture
def found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[Any]]:
    """Runs the command with a checkpoint of a model; returns the objects that it prints."""

    def run(air: AIR, line: str, code: int = 0, **config: object) -> list[Any]:
        path = save_checkpoint(air, tmp_path / "checkpoint.pt", **config)
        with contextlib.chdir(tmp_path):
            assert main(["--load", str(path), *line.split()]) == code
        return [json.loads(printed) for printed in capsys.readouterr().out.splitlines()]

    return run


def test_cut_objects_are_named_and_left_out_and_others_are_written_as_pictures(
    found: Callable[..., list[Any]], tmp_path: Path
) -> None:
    air = small_air(channels=3)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    images = torch.stack([write_png(pictures / f"{k}.png", 3) for k in range(6)])
    with torch.no_grad():
        air.predict.mlp.seq[-1].bias[0] += 9  # every step is used
    all_of_them = found(air, "pictures --kinds kinds.png")
    objects = [each for image in all_of_them for each in image["objects"]]
    assert len(objects) > 6
    assert not any("z_what" in each for each in objects)
    with Image.open(tmp_path / "kinds.png") as sheet:
        assert np.asarray(sheet).std() > 0
    for each in objects:
        assert each["cut"] == (min(each["box"]) <= 0 or max(each["box"]) >= 12)
    whole = found(air, "pictures --drop-cut --codes --crops crops")
    for before, after in zip(all_of_them, whole, strict=True):
        kept = [each for each in before["objects"] if not each["cut"]]
        assert after["count"] == len(kept)
        assert [each["box"] for each in after["objects"]] == [each["box"] for each in kept]
    codes = infer(air, images).z_what
    for k, image in enumerate(whole):
        for each in image["objects"]:
            expected = codes[k, each["step"] - 1].tolist()
            assert each["z_what"] == pytest.approx(expected, abs=1e-5)
            x0, y0, x1, y1 = map(round, each["box"])
            with Image.open(tmp_path / f"crops/pictures-{k}.png-{each['step']}.png") as crop:
                np.testing.assert_array_equal(
                    np.asarray(crop), images[k, :, y0:y1, x0:x1].permute(1, 2, 0)
                )
    with pytest.raises(SystemExit, match="2"):  # never overwrites
        found(air, "pictures --crops crops")


def test_pictures_whose_names_become_equal_have_all_their_crops(
    found: Callable[..., list[Any]], tmp_path: Path
) -> None:
    air = small_air(channels=3)
    count_on(air, 0, 9.0)
    names = ["a/b.png", "a-b.png", "a b.png", f"{'long' * 50}/{'name' * 50}.png"]
    for name in names:
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        write_png(tmp_path / "p" / name, 3)
    printed = found(air, "p --crops crops")
    boxes = [each["box"] for image in printed for each in image["objects"]]
    inside = [box for box in boxes if max(box[:2]) < 11.5 and min(box[2:]) > 0.5]
    assert len(inside) <= len([*(tmp_path / "crops").iterdir()]) <= len(boxes)


@pytest.mark.parametrize("channels", [1, 3])
def test_detections_are_the_models_inferences(channels: int) -> None:
    air = small_air(channels=channels)
    images = torch.rand(7, *pixels_of(air))
    found, detections = infer(air, images), detect(air, images)
    painted = found.objects if channels == 1 else found.objects.amax(2)
    for i, detection in enumerate(detections):
        assert detection.count == found.counts[i] == len(detection.objects)
        assert detection.probability == pytest.approx(found.count_probs[i].max().item())
        for t, each in enumerate(detection.objects):
            assert each.step == t + 1
            assert each.window == found.boxes[i, t].tolist()
            assert each.box == tight_boxes(painted[i, t]).tolist()
            assert each.probability == pytest.approx(found.count_probs[i, t + 1 :].sum().item())
    assert detect(air, images[:0]) == []
    assert detect(air, images.numpy()) == detections


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"channels": 3},
        {"embed_net": [10, 6]},
        {"decoder_net": [4] * 6},
        {"decoder_net": [], "guide_input": "difference"},
        {"channels": 3, "guide_input": "glimpse", "z_pres_bias": -3.0},
        {"channels": 3, "embed_channels": [2, 3]},
        {"background_model": "pca", "z_background_size": 4},
    ],
    ids=str,
)
def test_a_checkpoint_knows_its_settings_and_the_size_of_its_images(
    settings: dict[str, object], tmp_path: Path
) -> None:
    air = small_air(**settings)
    flags = {{"guide_input": "guide"}.get(name, name): value for name, value in settings.items()}
    loaded = load_air(save_checkpoint(air, tmp_path / "checkpoint.pt", **flags))
    assert (loaded.x_size, loaded.channels) == (12, air.channels)
    images = torch.rand(5, *pixels_of(air))
    assert torch.equal(infer(loaded, images).count_probs, infer(air, images).count_probs)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_command_prints_a_line_for_each_image_and_draws(
    channels: int, tmp_path: Path, found: Callable[..., list[Any]]
) -> None:
    air = small_air(channels=channels)
    count_on(air, 2, 9.0)
    image = write_png(tmp_path / "a.png", channels)
    np.savez(tmp_path / "b.npz", x=np.stack([image.numpy()] * 2))
    printed = found(air, "a.png b.npz --figure found.png --csv found.csv")
    assert [each["image"] for each in printed] == ["a.png", "b.npz[0]", "b.npz[1]"]
    (detection,) = detect(air, image[None])
    for each in printed:
        assert each["count"] == detection.count == 3
        assert [found["box"] for found in each["objects"]] == [o.box for o in detection.objects]
    with Image.open(tmp_path / "found.png") as drawn:
        assert drawn.mode == "RGB"
        assert drawn.width > 3 * 192
    with (tmp_path / "found.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    objects = [(each["image"], item) for each in printed for item in each["objects"]]
    assert len(objects) == 9
    for row, (name, item) in zip(rows, objects, strict=True):
        assert (row["image"], row["count"], int(row["step"])) == (name, "3", item["step"])
        assert [float(row[edge]) for edge in ("x0", "y0", "x1", "y1")] == item["box"]
        assert float(row["window_x1"]) == item["window"][2]
        assert float(row["object_probability"]) == item["probability"]


def test_detections_are_refined_where_asked_for(
    tmp_path: Path, found: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("air.refinement.NUM_STEPS", 5)
    air, image = small_air(), write_png(tmp_path / "a.png")
    (printed,) = found(air, "a.png --refine")
    (refined,), (plain,) = detect(air, image[None], refine=True), detect(air, image[None])
    assert printed["probability"] == refined.probability != plain.probability


def test_an_image_without_an_object_has_a_line_and_a_row(
    tmp_path: Path, found: Callable[..., list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    air = small_air()
    count_on(air, 2, -9.0)
    np.savez(tmp_path / "a.npz", x=np.ones((1, 12, 12), np.uint8))
    (printed,) = found(air, "a.npz --csv a.csv")
    assert (printed["count"], printed["objects"]) == (0, [])
    header, row = (tmp_path / "a.csv").read_text().splitlines()
    assert header.count(",") == row.count(",")
    assert row.startswith("a.npz[0],0,")
    assert "largest value in the images is 1 of 255" in caplog.text


@pytest.mark.parametrize("crop", [True, False])
def test_boxes_are_in_pixels_of_the_original(
    crop: bool, tmp_path: Path, found: Callable[..., list[Any]]
) -> None:
    """A picture of 36 x 24 is cut, or is halved and more, to the model's 12 x 12."""
    air = small_air()
    count_on(air, 2, 9.0)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 36), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (printed,) = found(air, "a.png", crop=crop)
    ((_, prepared, _),) = read_images(
        tmp_path / "a.png", ImageSettings(x_size=12, channels=1, crop=crop)
    )
    (detection,) = detect(air, prepared[None])
    for item, expected in zip(printed["objects"], detection.objects, strict=True):
        x0, y0, x1, y1 = expected.box
        if crop:
            box = [x0 + 12, y0 + 6, x1 + 12, y1 + 6]
        else:  # a third of the size, with two black rows above
            box = [3 * x0, 3 * (y0 - 2), 3 * x1, 3 * (y1 - 2)]
        assert item["box"] == pytest.approx(box)


def test_unreadable_images_are_reported_and_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_checkpoint(small_air(), tmp_path / "c.pt")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("1.png", "3.png"):
        write_png(pictures / name)
    (pictures / "2.png").write_text("no image")
    line = f"--load {path} {pictures} {tmp_path}/missing.npz --csv {tmp_path}/found.csv"
    assert main(line.split()) == 2
    said = capsys.readouterr()
    assert (tmp_path / "found.csv").read_text().count(".png,") == said.out.count(".png")
    assert [Path(each["image"]).name for each in map(json.loads, said.out.splitlines())] == [
        "1.png",
        "3.png",
    ]
    first, second = said.err.splitlines()
    assert "2.png" in first
    assert "missing.npz" in second


def test_a_command_that_fails_leaves_no_csv_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_checkpoint(small_air(), tmp_path / "c.pt")
    for name in ("a.png", "b.png"):
        write_png(tmp_path / name)
    results: list[Any] = [detect(small_air(), torch.rand(1, 12, 12)), OSError("no more")]
    with monkeypatch.context() as patch:
        patch.setattr("air.detect.BATCH", 1)
        patch.setattr("air.detect.detect", mock.Mock(side_effect=results))
        with pytest.raises(SystemExit):
            main(f"--load {path} {tmp_path}/a.png {tmp_path}/b.png --csv {tmp_path}/a.csv".split())
    assert capsys.readouterr().out.count("\n") == 1
    assert main(f"--load {path} {tmp_path}/missing.png --csv {tmp_path}/a.csv".split()) == 2
    assert not (tmp_path / "a.csv").exists()
    assert main(f"--load {path} {tmp_path}/a.png --csv {tmp_path}/a.csv".split()) == 0
    assert (tmp_path / "a.csv").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize(
    ("kind", "expected_code", "reason"), [("pipe", 141, ""), ("full", 2, "No space left")]
)
def test_a_failure_of_standard_output_ends_the_command(
    kind: str, expected_code: int, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_checkpoint(small_air(), tmp_path / "c.pt")
    write_png(tmp_path / "a.png")
    with (
        broken_pipe() if kind == "pipe" else open("/dev/full", "w") as stream,
        contextlib.redirect_stdout(stream),
    ):
        code = exit_code(main, f"--load {path} {tmp_path}/a.png".split())
    complaint = capsys.readouterr().err
    assert (code, complaint.count("\n")) == (expected_code, 1 if reason else 0)
    assert reason in complaint


def test_memory_does_not_grow_with_the_number_of_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("air.detect.BATCH", 3)
    path = save_checkpoint(small_air(x_size=200), tmp_path / "c.pt")  # 40 kB of pixels
    write_png(tmp_path / "large.png", side=600)
    peaks = []
    for number in (3, 6, 12):  # the first loads what is loaded once
        pictures = [f"{tmp_path}/large.png"] * number
        tracemalloc.start()
        assert main(["--load", str(path), "--crop", *pictures]) == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 150_000, peaks


def test_errors_are_one_line(tmp_path: Path) -> None:
    grey = save_checkpoint(small_air(), tmp_path / "grey.pt")
    two = save_checkpoint(small_air(channels=2), tmp_path / "two.pt")
    write_png(tmp_path / "a.png")
    write_png(tmp_path / "large.png", side=13)
    (tmp_path / "text.png").write_text("no image")
    np.savez(tmp_path / "ints.npz", x=np.zeros((2, 12, 12), int))
    for model, line, problem in [
        (two, "a.png", "1 channels, expected 2"),
        (grey, "large.png", "13 x 13 pixels, expected 12 x 12: --no-crop resizes them"),
        (grey, "text.png", "text.png: cannot be read as a picture"),
        (grey, "missing.png", "missing.png"),
        (grey, "missing.npz", "missing.npz: No such file"),
        (grey, "ints.npz", "is int64: expected bool, uint8, uint16, or floats in [0, 1]"),
        (grey, f"a.png --figure {tmp_path}/a.png", "--figure never overwrites"),
        (grey, f"a.png --csv {tmp_path}/a.png", "--csv never overwrites"),
        (grey, f"a.png --csv {tmp_path}/no/a.csv", "--csv: there is no folder"),
        (grey, f"a.png --figure {tmp_path}/no/a.png", "--figure: there is no folder"),
        (grey, "a.png --device toaster", "--device"),
        (grey, "a.png --tile 0", "--tile: expected a whole number of at least 1, got 0"),
        (grey, "a.png --tile -3", "--tile: expected a whole number of at least 1, got -3"),
        (grey, "a.png --tile 2.5", "--tile: invalid int value: '2.5'"),
        (grey, "a.png --tile 12 --crop", "--crop cannot be used with --tile"),
        (two, "large.png --tile 12", "1 channels, expected 2"),
        (tmp_path / "text.png", "a.png", "text.png cannot be read as weights"),
    ]:
        done = run(f"--load {model} {tmp_path}/{line}", tmp_path, program=main)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert problem in done.stderr


def test_a_checkpoint_with_bad_settings_is_refused(tmp_path: Path) -> None:
    for name, value in [
        ("window_size", 0), ("model_steps", "3"), ("model_steps", 0), ("non_linearity", "Linear"),
        ("decoder_output_bias", "x"), ("guide", 5), ("rnn_hidden_size", 12), ("window_size", 9),
    ]:  # fmt: skip
        path = save_checkpoint(small_air(), tmp_path / "foreign.pt", **{name: value})
        with pytest.raises(ValueError, match=f"{path}"):
            load_air(path)


# Large pictures, cut into tiles.


def find_parts(images: NDArray[np.uint8]) -> list[Detection]:
    """Finds what is bright and connected, as a perfect model would."""
    found = []
    for image in images:
        parts = ndimage.find_objects(ndimage.label(image > 127)[0])
        boxes = [[float(e) for e in (c.start, r.start, c.stop, r.stop)] for r, c in parts]
        cut = [min(box) <= 0 or max(box) >= len(image) for box in boxes]
        objects = [DetectedObject(1, 1.0, b, b, c) for b, c in zip(boxes, cut, strict=True)]
        found.append(Detection(len(objects), 1.0, objects))
    return found


def draw_squares(
    height: int, width: int, side: int, seed: int
) -> tuple[NDArray[np.uint8], list[list[int]]]:
    """Bright squares of less than half a tile at random, at seams and at the border.

    They are 4 pixels apart, or more in a low picture, whose padding is the median of its border.
    """
    rng, gap = np.random.default_rng(seed), 4 if height >= side else 20
    image, boxes = np.zeros((height, width), np.uint8), []
    for k in range(400):
        size = int(rng.integers(6, side // 2))
        x, y = (int(rng.integers(0, length - size + 1)) for length in (width, height))
        if k < 50:  # at the corner of a tile or beside it
            x, y = (start // (side // 2) * (side // 2) for start in (x, y))
            x, y = x - k % 5 * size // 4, y - k % 7 * size // 6
        elif k < 80:  # at the border of the picture
            x, y = [(x, 0), (width - size, y), (k % 2 * (width - size), height - size)][k % 3]
        x, y = (min(max(start, 0), length - size) for start, length in ((x, width), (y, height)))
        if not image[max(y - gap, 0) : y + size + gap, max(x - gap, 0) : x + size + gap].any():
            image[y : y + size, x : x + size] = 255
            boxes.append([x, y, x + size, y + size])
    return image, sorted(boxes)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize(
    ("height", "width", "side", "x_size"),
    [
        (300, 410, 64, 64),
        (333, 200, 61, 61),
        (300, 410, 96, 48),
        (50, 300, 64, 64),
        (97, 65, 64, 64),
    ],
)
def test_every_object_of_a_large_picture_is_found_once(
    height: int, width: int, side: int, x_size: int, invert: bool, seed: int
) -> None:
    image, expected = draw_squares(height, width, side, seed)
    settings = ImageSettings(x_size=x_size, channels=1, crop=True, invert=invert)
    detection = detect_in_tiles(find_parts, ~image if invert else image, side, settings)
    assert detection.probability is None
    assert detection.count == len(detection.objects) == len(expected)
    assert [each.step for each in detection.objects] == [*range(1, detection.count + 1)]
    tolerance = 0 if side == x_size else side / x_size
    left = detection.objects
    for box in expected:
        off = [np.abs(np.subtract(each.box, box)).max() for each in left]
        each = left.pop(int(np.argmin(off)))
        assert min(off) <= tolerance + 1e-9
        if side == x_size:
            assert each.cut == (min(box) == 0 or box[2] == width or box[3] == height)
    assert not left


def test_a_guess_at_a_cut_object_gives_way_to_the_whole_one() -> None:
    """A model may paint all of an object beside the border, of which it sees a part."""
    tiles = np.array([[0, 0, 64, 64], [32, 0, 96, 64], [64, 0, 128, 64]])
    whole, guess = [60, 20, 72, 32], [51, 20, 64, 32]
    assert best_views(np.array([guess, whole]), tiles, np.array([0, 1])) == [(1, False)]
    other = [48, 20, 61, 32]  # not at the side of the tile, so another object
    assert len(best_views(np.array([other, whole]), tiles, np.array([0, 1]))) == 2
    assert best_views(np.array([guess]), tiles, np.array([0])) == [(0, True)]  # seen nowhere else
    at_border = [116, 20, 128, 32]
    assert best_views(np.array([at_border]), tiles, np.array([2])) == [(0, True)]
    near_border = np.array([[40, 0, 52, 12], [49, 2, 61, 14]])  # not cut by an inner side
    assert best_views(near_border, tiles, np.array([0, 1])) == [(0, True), (1, False)]
    tall, taller = [26, 10, 38, 64], [26, 10, 52, 66]  # nearer to the middle of its tile, and whole
    below = np.array([[0, 0, 64, 64], [0, 8, 64, 72]])
    assert best_views(np.array([tall, taller]), below, np.array([0, 1])) == [(1, False)]
    beside = [whole, [61, 20, 73, 32]]
    assert len(best_views(np.array(beside), tiles, np.array([1, 1]))) == 2  # of one tile


def test_a_picture_without_an_object_has_none_in_tiles() -> None:
    settings = ImageSettings(x_size=12, channels=1)
    nothing = detect_in_tiles(find_parts, np.zeros((3, 40, 50), np.uint8), 12, settings)
    assert nothing == Detection(0, None, [])


@pytest.mark.parametrize("invert", [False, True])
def test_pictures_no_larger_than_a_tile_are_seen_as_without_tiles(
    invert: bool,
    tmp_path: Path,
    found: Callable[..., list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("air.detect.BATCH", 1)  # as the tiles of a picture
    for k, shape in enumerate([(12, 12), (24, 36), (9, 5), (36, 20, 3)]):
        pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{k}.png")
    air, line = small_air(), "0.png 1.png 2.png 3.png --codes"
    count_on(air, 2, 9.0)
    plain = found(air, line, crop=False, invert=invert)
    assert [each["count"] for each in plain] == [3] * 4
    for side in (36, 50):
        assert found(air, f"{line} --tile {side}", crop=False, invert=invert) == plain


@pytest.mark.parametrize("channels", [1, 3])
def test_the_command_finds_objects_in_tiles_and_writes_them(
    channels: int, tmp_path: Path, found: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("air.refinement.NUM_STEPS", 2)
    monkeypatch.setattr("air.detect.BATCH", 4)  # fewer than tiles
    air = small_air(channels=channels)
    count_on(air, 2, 9.0)
    rng = np.random.default_rng(0)
    sizes = {"a.png": (30, 50, 3), "b.png": (61, 20)}
    pictures = {name: rng.integers(0, 256, size, np.uint8) for name, size in sizes.items()}
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(tmp_path / name)
    line = "a.png b.png --tile 24 --codes --refine"
    printed = found(air, f"{line} --csv a.csv --figure f.png --crops crops", crop=True)
    settings = ImageSettings(x_size=12, channels=channels)
    find = partial(detect, air, refine=True, codes=True)
    for image, (name, pixels) in zip(printed, pictures.items(), strict=True):
        planes = np.moveaxis(np.atleast_3d(pixels), 2, 0)
        expected = detect_in_tiles(find, planes, 24, settings).record()
        assert image == json.loads(json.dumps({"image": name, **expected}))
        assert image["count"] == len(image["objects"]) > 3
        assert image["probability"] is None
        kind = "L" if channels == 1 else "RGB"
        with Image.open(tmp_path / name) as opened:
            seen = np.asarray(opened.convert(kind))
        for each in image["objects"]:
            x0, y0, x1, y1 = (max(round(edge), 0) for edge in each["box"])
            with Image.open(tmp_path / f"crops/{name}-{each['step']}.png") as crop:
                np.testing.assert_array_equal(np.asarray(crop), seen[y0:y1, x0:x1])
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], int(row["step"]), row["probability"]) for row in rows] == [
        (image["image"], each["step"], "") for image in printed for each in image["objects"]
    ]
    with Image.open(tmp_path / "f.png") as drawn:  # both enlarged, one below the other
        assert drawn.width == 50 * 4
        assert drawn.height > 30 * 4 + 61 * 2
    whole = found(air, f"{line} --drop-cut", crop=True)
    for image, before in zip(whole, printed, strict=True):
        kept = [each for each in before["objects"] if not each["cut"]]
        assert (image["count"], image["objects"]) == (len(kept), kept)
