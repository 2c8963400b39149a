"""The messages to a visdom server are strict JSON, escaped, and hold the right numbers."""

import json
from base64 import b64decode
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import RECORDS, make_snapshot
from PIL import Image

from air.visualization.curves import History
from air.visualization.dashboard import connect
from air.visualization.drawing import sheets
from air.visualization.snapshots import Snapshot
from air.visualization.visdom_panes import ORDER, Page

Draw = Callable[[list[dict[str, Any]], Snapshot, dict[str, Any]], dict[str, Any]]


def refuse_constant(name: str) -> None:
    raise AssertionError(f"a browser drops a message with {name} in it")


@pytest.fixture
def draw(tmp_path: Path) -> Draw:
    """Draws a page with a client that records its messages; returns them by pane."""

    def drawn(
        records: list[dict[str, Any]], snapshot: Snapshot, settings: dict[str, Any]
    ) -> dict[str, Any]:
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        page = Page(connect(None, 8097, str(log)), "run")
        page.draw(History(records), snapshot, settings)
        lines = log.read_text().splitlines()
        messages = [json.loads(line, parse_constant=refuse_constant)[1] for line in lines]
        names = [message["win"] for message in messages]
        assert names == [name for name in ORDER if name in names]
        assert {message["eid"] for message in messages} == {"run"}
        return {message["win"]: message for message in messages}

    return drawn


def test_every_pane_is_there_from_the_beginning_and_keeps_its_size(draw: Draw) -> None:
    before = draw([], make_snapshot(wrong=0), {})
    after = draw(RECORDS, make_snapshot(wrong=9), {"seed": 1})
    assert {*before, "baseline", "distance"} == set(after) == set(ORDER) - {"backgrounds"}
    for name, pane in before.items():
        for side in ("width", "height"):
            assert pane["opts"][side] == after[name]["opts"][side], name
        assert pane["data"], name  # the server looks at the first


def test_curves_hold_their_points(draw: Draw) -> None:
    panes = draw(RECORDS, make_snapshot(), {})
    traces = {
        trace["name"]: trace for pane in panes.values() for trace in pane["data"] if "name" in trace
    }
    assert traces["training"]["x"] == list(range(1, 21))
    assert traces["training"]["y"] == [400.0 + step for step in range(1, 21)]
    assert traces["held out"]["y"] == [410.5, 420.5]
    assert traces["model and guide"]["y"] == [None] * 20
    assert traces["inferred"]["y"] == [75.0, 0.0, 25.0]
    assert traces["true"]["y"] == [75.0, 25.0, 0.0]
    assert (traces["below 11 px"]["x"], traces["below 11 px"]["y"]) == ([10], [25.0])
    assert traces["11 to 17 px"]["y"] == [None]
    assert panes["calibration"]["data"][0]["y"] == [25.0]
    assert panes["confusion"]["data"][0]["z"] == [[1.0, 0.0], [0.0, 1.0]]
    numbers = {(a["x"], a["y"]): a["text"] for a in panes["confusion"]["layout"]["annotations"]}
    assert numbers == {(0, 0): "3", (1, 0): "0", (0, 1): "0", (1, 1): "1"}


def test_reliability_shows_the_bins_that_hold_scenes(draw: Draw) -> None:
    before = draw([], make_snapshot(), {})["reliability"]["data"]
    diagonal, scenes = draw(RECORDS, make_snapshot(), {})["reliability"]["data"]
    for line in (before[0], diagonal):
        assert (line["x"], line["y"], line["mode"]) == ([0.0, 1.0], [0.0, 1.0], "lines")
    assert before[1]["y"] == [None]
    assert (scenes["x"], scenes["y"]) == ([0.85, 0.95], [1.0, 0.5])
    assert scenes["text"] == ["1", "2"]
    assert scenes["marker"]["size"][0] < scenes["marker"]["size"][1]


def test_without_true_counts_no_pane_is_about_them(draw: Draw) -> None:
    snapshot = make_snapshot()
    blind = snapshot._replace(scenes=snapshot.scenes._replace(true_counts=None))
    measured = [{"step": 1, "eval_elbo": 1.0, "accuracy_by_distance": None, "reliability": None}]
    about_truth = {"accuracy", "distance", "calibration", "confusion", "reliability"}
    for records in ([], measured):
        assert set(draw(records, blind, {})) == set(ORDER) - about_truth - {
            "baseline",
            "backgrounds",
        }


def test_curves_have_their_style_and_axes(draw: Draw) -> None:
    records = [{"step": step, "elbo": -1e6 if step == 0 else 400.0} for step in range(50)]
    records += [{"step": 50, "empty_elbo": 100.0, "eval_elbo": 410.0}]
    panes = draw(records, make_snapshot(), {})
    traces = {trace["name"]: trace for trace in panes["elbo"]["data"]}
    assert traces["training"]["mode"] == "lines"
    assert traces["held out"]["mode"] == "lines+markers"
    assert traces["empty canvas"]["line"] == {"color": "#777777", "dash": "dot"}
    assert len({trace["line"]["color"] for trace in traces.values()}) == 4
    axis = panes["elbo"]["layout"]["yaxis"]
    assert axis["title"] == "nats per image"
    assert 0 < axis["range"][0] < 100
    assert 410 < axis["range"][1] < 450
    falling = [{"step": step, "grad_norm": 10.0**-step} for step in range(5)]
    axis = draw(falling, make_snapshot(), {})["grad_norm"]["layout"]["yaxis"]
    assert axis["type"] == "log"
    assert "range" not in axis


def test_counts_are_drawn_where_the_true_counts_are_unknown(draw: Draw) -> None:
    pane = draw([{"step": 1, "count_histogram": [1, 0, 3]}], make_snapshot(), {})["counts"]
    assert [bars["y"] for bars in pane["data"]] == [[25.0, 0.0, 75.0]]
    assert pane["data"][0]["x"] == [0, 1, 2]
    assert pane["opts"]["title"] == "Held-out scenes by inferred count"


@pytest.mark.parametrize("wrong", [0, 1, 30])
def test_pictures_are_sharp_sheets(draw: Draw, wrong: int) -> None:
    snapshot = make_snapshot(1500, wrong=wrong)
    panes = draw([], snapshot, {})
    expected = sheets(snapshot, 8, 2, 2, 4)
    for name in ("inferred", "reconstructions", "objects", "prior_samples", "errors"):
        png = BytesIO(b64decode(panes[name]["data"][0]["content"]["src"].partition(",")[2]))
        with Image.open(png) as picture:
            np.testing.assert_array_equal(picture, expected[name])
            assert picture.size == (panes[name]["opts"]["width"], panes[name]["opts"]["height"])
        assert "step 1,500" in panes[name]["opts"]["title"]


def test_text_cannot_run(draw: Draw) -> None:
    settings = {"save": "<img src=x onerror=alert(1)>", "<b>": 'a"&b'}
    text = draw([], make_snapshot(), settings)["settings"]["data"][0]["content"]
    assert "<img" not in text
    assert "<b>" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
