"""Pictures, figures and the dashboard of viz.py."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from conftest import ask, visdom_server
from numpy.typing import NDArray
from PIL import Image

import viz
from viz import STEP_COLOURS, Dashboard, InferredScenes, draw_boxes, enlarge, tile

TRAIN = [{"step": step, "elbo": 400.0 + step} for step in range(1, 21)]
HELD_OUT = [
    {"step": 10, "eval_elbo": 410.5, "accuracy_mode": 0.5, "accuracy_sample": 0.25},
    {"step": 20, "eval_elbo": 420.5, "accuracy_mode": 0.75, "accuracy_sample": 0.5},
]


def make_scenes(count: int, steps: int = 3) -> InferredScenes:
    """Up to two rings in each scene, as busy as digits are."""
    rng = np.random.default_rng(0)
    images = np.zeros((count, 50, 50), np.float32)
    boxes = np.full((count, steps, 4), np.nan, np.float32)
    counts = rng.integers(0, min(steps, 2) + 1, count)
    for i, objects in enumerate(counts):
        for step in range(objects):
            x, y = rng.integers(0, 29, 2)
            radius = np.hypot(*np.mgrid[-10:11, -10:11] / rng.uniform(0.6, 1, (2, 1, 1)))
            images[i, y : y + 21, x : x + 21] += np.exp(-((radius - 8) ** 2) / 2)
            boxes[i, step] = np.array([x, y, x + 21, y + 21]) + rng.normal(0, 1, 4)
    return InferredScenes(np.clip(images, 0, 1), 1.3 * images, boxes, counts, counts.copy())


def mask(picture: NDArray[np.uint8], colour: tuple[int, int, int]) -> NDArray[np.bool_]:
    return np.array((picture == np.array(colour)).all(axis=-1))


def one_box(*box: float) -> NDArray[np.bool_]:
    """Where a single box is drawn on an empty 50x50 image at zoom 4."""
    pictures = draw_boxes(np.zeros((1, 50, 50)), np.array([[box]]), np.array([1]), zoom=4)
    return mask(pictures[0], STEP_COLOURS[0])


def frame(x0: int, y0: int, x1: int, y1: int) -> NDArray[np.bool_]:
    """A rectangle with lines two pixels wide, cut out of a larger plane."""
    plane = np.zeros((2200, 2200), bool)
    plane[1000 + y0 : 1000 + y1, 1000 + x0 : 1000 + x1] = True
    plane[1002 + y0 : 998 + y1, 1002 + x0 : 998 + x1] = False
    return plane[1000:1200, 1000:1200]


def load(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return picture.convert("RGB")


def test_enlarge_is_sharp_and_clips() -> None:
    images = np.array([[[0.0, 0.5], [1.7, np.nan]], [[-3.0, np.inf], [1.0, -np.inf]]])
    levels = np.array([[[0, 128], [255, 0]], [[0, 255], [255, 0]]], np.uint8)
    blocks = np.kron(levels, np.ones((1, 3, 3), np.uint8))
    for given in (images, images.astype(np.float32), levels):
        pictures = enlarge(given, zoom=3)
        assert pictures.dtype == np.uint8
        np.testing.assert_array_equal(pictures, np.stack([blocks] * 3, axis=-1))


def test_boxes_leave_the_input_and_the_other_pixels_alone() -> None:
    scenes = make_scenes(6)
    before = [np.array(field, copy=True) for field in scenes]
    pictures = draw_boxes(scenes.images, scenes.boxes, scenes.counts, zoom=4)
    for old, new in zip(before, scenes, strict=True):
        np.testing.assert_array_equal(old, new)
    touched = (pictures != enlarge(scenes.images, 4)).any(axis=-1)
    touched[:, :32, :32] = False  # the written count
    assert not (touched & ~mask(pictures, STEP_COLOURS[0]) & ~mask(pictures, STEP_COLOURS[1])).any()


@pytest.mark.parametrize("steps", [1, 3, 5, 8])
def test_only_steps_in_use_are_drawn(steps: int) -> None:
    counts = np.arange(-1, steps + 3)
    boxes = np.array([[[10, 12, 30, 32]]]) + 2 * np.arange(steps)[:, None]
    pictures = draw_boxes(np.zeros((len(counts), 50, 50)), boxes.repeat(len(counts), 0), counts)
    for count, picture in zip(counts, pictures, strict=True):
        for step, colour in enumerate(STEP_COLOURS):
            assert mask(picture, colour).any() == (step < min(int(count), steps)), (count, step)


@pytest.mark.parametrize(
    ("box", "lines"),
    [
        ((10.3, 5.6, 30.1, 40.9), (41, 22, 120, 164)),  # edges fall between image pixels
        ((30.1, 40.9, 10.3, 5.6), (41, 22, 120, 164)),  # as from a negative scale
        ((10.3, 40.9, 30.1, 5.6), (41, 22, 120, 164)),
        ((0.0, 0.0, 50.0, 50.0), (0, 0, 200, 200)),
        ((-5.0, 20.0, 20.0, 60.0), (-20, 80, 80, 240)),
        ((-1e30, 10.0, 20.0, 1e30), (-999, 40, 80, 999)),
    ],
)
def test_lines_are_where_the_box_is(box: tuple[float, ...], lines: tuple[int, ...]) -> None:
    np.testing.assert_array_equal(one_box(*box), frame(*lines))


@pytest.mark.parametrize(
    "box",
    [
        (-20, 10, -2, 30), (52, 10, 70, 30), (10, -30, 30, -1), (10, 50, 30, 70),
        (-1e9, -1e9, 1e9, 1e9), (1e300, 1e300, -1e300, -1e300), (1e9, 1e9, 2e9, 2e9),
        (math.nan, 1, 9, 9), (1, 1, 9, math.nan), (1, 1, math.inf, 9), (-math.inf, 1, 9, 9),
    ],
)  # fmt: skip
def test_boxes_out_of_sight_or_not_finite_draw_nothing(box: tuple[float, ...]) -> None:
    assert not one_box(*box).any()


@pytest.mark.parametrize("side", range(6))
def test_tiny_boxes_stay_tiny(side: int) -> None:
    drawn = one_box(20.0, 20.0, 20.0 + side / 4, 20.0 + side / 2)
    assert drawn[80 : 80 + 2 * side, 80 : 80 + side].sum() == drawn.sum()
    assert drawn.any() == (side > 0)


def test_a_wrong_count_says_so() -> None:
    images, _, boxes, _, _ = make_scenes(2)
    pictures = draw_boxes(images, boxes, np.array([1, 1]), true_counts=np.array([1, 2]))
    assert [mask(picture, viz._ORANGE).any() for picture in pictures] == [False, True]


def test_tile_pads_the_last_row_with_gaps() -> None:
    pictures = np.stack([np.full((5, 7, 3), value, np.uint8) for value in (10, 20, 30)])
    sheet = tile(pictures, 2)
    assert sheet.shape == (5 + viz._GAP + 5, 7 + viz._GAP + 7, 3)
    for value, y, x in ((10, 0, 0), (20, 0, -7), (30, -5, 0), (viz._GAP_COLOUR, -5, -7)):
        assert (sheet[y : y + 5 or None, x : x + 7 or None] == value).all()
    assert tile(pictures, 8).shape == (5, 3 * 7 + 2 * viz._GAP, 3)


@pytest.mark.parametrize(("count", "steps"), [(0, 3), (1, 1), (3, 5), (70, 3)])
def test_scene_figures(tmp_path: Path, count: int, steps: int) -> None:
    scenes = make_scenes(count, steps)
    folder = tmp_path / "made" / "here"
    for _ in range(2):  # the second time replaces
        viz.save_scene_figures(folder, scenes, scenes.reconstructions, scenes.boxes, scenes.counts)
    names = ["inferred", "inputs", "prior_samples", "reconstructions", "scenes"]
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.png" for name in names]
    assert all(min(load(path).size) >= 100 for path in folder.iterdir())
    assert (folder / "scenes.png").stat().st_size < 150_000


def test_the_overview_is_unblurred_whatever_matplotlibrc_says(tmp_path: Path) -> None:
    scenes = make_scenes(8)
    with mpl.rc_context({"savefig.dpi": 300, "savefig.bbox": "tight"}):
        viz.save_scene_figures(tmp_path, scenes, scenes.images, scenes.boxes, scenes.counts)
    row = tile(enlarge(scenes.images, 4), 8)
    sheet = np.asarray(load(tmp_path / "scenes.png"))
    top = len(sheet) - 8 - 3 * 200 - 2 * viz._GAP
    np.testing.assert_array_equal(sheet[top : top + 200, 54 : 54 + row.shape[1]], row)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "curves.png"
    viz.save_curves(path, TRAIN)
    before = path.read_bytes()
    monkeypatch.delattr(os, "replace")
    with pytest.raises(AttributeError, match="replace"):
        viz.save_curves(path, HELD_OUT)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]


@pytest.mark.parametrize(
    "records",
    [
        [], TRAIN[:1], HELD_OUT, [{"version": 1}], [{"step": 0, "elbo": -math.inf}],
        [*TRAIN, {"step": 20, "eval_elbo": 410.0, "accuracy_mode": None, "confusion": None}],
        [*TRAIN, {"step": 21, "elbo": math.nan}, {"step": 22, "elbo": math.inf}],
        [*TRAIN, *HELD_OUT, {"step": 20, "empty_elbo": 300.0, "confusion": [[3, 0], [1, 2]]}],
        [{"step": 5, "confusion": np.arange(12).reshape(3, 4)}],
    ],
)  # fmt: skip
def test_curves_draw_what_is_there(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    viz.save_curves(tmp_path / "curves.png", records)
    picture = load(tmp_path / "curves.png")
    assert picture.size == (1800, 570)
    assert len(picture.getcolors(1 << 20) or []) > 1


def test_importing_viz_imports_neither_visdom_nor_pyplot() -> None:
    code = "import sys, viz; print({'visdom', 'matplotlib.pyplot', 'torch'} & set(sys.modules))"
    run = [sys.executable, "-W", "error", "-c", code]
    assert subprocess.check_output(run, cwd=Path(viz.__file__).parent, text=True) == "set()\n"


def show_all(dashboard: Dashboard, scenes: InferredScenes) -> float:
    """Returns the seconds that it took."""
    begin = time.monotonic()
    dashboard.curves([*TRAIN, *HELD_OUT])
    dashboard.scenes(scenes)
    dashboard.samples(scenes.reconstructions, scenes.boxes, scenes.counts)
    dashboard.errors(scenes)
    return time.monotonic() - begin


def test_dashboard_without_a_server(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConnectionError, match=r"^no .* http://localhost:1; .*python -m visdom.*$"):
        Dashboard("run", port=1)
    assert capfd.readouterr() == ("", "")


def test_dashboard_on_a_server_that_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        begin = time.monotonic()
        with pytest.raises(ConnectionError, match="no visdom server"):
            Dashboard("run", "http://127.0.0.1", listener.getsockname()[1])
        assert time.monotonic() - begin < 4


def test_dashboard_on_a_server_that_freezes_wakes_and_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scenes = make_scenes(20)
    monkeypatch.setattr(viz, "_PATIENCE", 20.0)  # for a busy test machine
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # not for a server on this machine
    with visdom_server(tmp_path) as (port, server):
        dashboard = Dashboard("runs/one", port=port)
        for step in range(10):
            for wrong in ([3, 4], [], [3]):  # exactly one error broke Pyro's example
                scenes.counts[:] = make_scenes(20).counts + np.isin(range(20), wrong)
                dashboard.errors(scenes)
            show_all(dashboard, scenes)
            dashboard.curves([{"step": 21 + step, "elbo": 421.0 + step}])
        many = Dashboard("long", port=port)
        for end in (9001, 9001, 12001):  # the same records may come again
            many.curves([{"step": step, "elbo": step} for step in range(end)])
        monkeypatch.undo()
        server.send_signal(signal.SIGSTOP)
        assert show_all(dashboard, scenes) < 4
        dashboard.curves([{"step": 30, "eval_elbo": math.inf}])  # is not lost
        assert show_all(dashboard, scenes) < 0.5  # not even tried
        server.send_signal(signal.SIGCONT)
        monkeypatch.setattr(viz, "_PATIENCE", 20.0)
        monkeypatch.setattr(dashboard, "_retry_at", 1.0)  # as if the time had come
        assert "runs_one" in ask(f"{port}/")  # tornado 6.6 would answer 403
        show_all(dashboard, scenes)
        long = json.loads(ask(f"{port}/win_data", b'{"win": "elbo", "eid": "long"}'))["content"]
        found = json.loads(ask(f"{port}/win_data", b'{"win": null, "eid": "runs_one"}'))
        assert len(caplog.messages) == 1
        monkeypatch.setattr(viz, "_RETRY", 0.0)  # tries again and stays silent
        server.kill()
        server.wait()
        assert show_all(dashboard, scenes) + show_all(dashboard, scenes) < 4
        assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert " ".join(sorted(found)) == "accuracy elbo errors inferred reconstructions samples"
    traces = {t["name"]: t for win in ("elbo", "accuracy") for t in found[win]["content"]["data"]}
    assert traces["training batches"]["y"] == [400.0 + step for step in range(1, 31)]
    assert long["data"][0]["x"] == long["data"][0]["y"] == list(range(0, 12001, 12))
    assert traces["held-out scenes"]["y"] == [410.5, 420.5, None]
    assert traces["sampled count"]["x"] == [10, 20]
    assert found["errors"]["title"] == "errors: 1 of 20"
    _, rebuilt, boxes, counts, true = scenes.pick(slice(16))
    png = BytesIO(b64decode(found["reconstructions"]["content"]["src"].partition(",")[2]))
    with Image.open(png) as picture:
        np.testing.assert_array_equal(picture, tile(draw_boxes(rebuilt, boxes, counts, 3, true), 4))
