"""What is sent to a visdom server: strict JSON, escaped, drawn from the right numbers."""

import json
from base64 import b64decode
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from helpers import RECORDS, make_snapshot
from PIL import Image

from air.visualization.curves import History
from air.visualization.drawing import sheets
from air.visualization.visdom_panes import ORDER, picture_panes, plot_panes, settings_pane


def by_name(panes: Any) -> dict[str, Any]:  # noqa: ANN401
    found = list(panes)
    names = [pane["win"] for pane in found]
    assert len(set(names)) == len(names)
    assert set(names) <= set(ORDER)
    # A browser drops a message with NaN or Infinity in it.
    return {pane["win"]: json.loads(json.dumps(pane, allow_nan=False)) for pane in found}


def test_every_pane_has_its_place_and_is_there_from_the_beginning() -> None:
    before = by_name([*plot_panes(History()), *picture_panes(make_snapshot(wrong=0))])
    after = by_name([*plot_panes(History(RECORDS)), *picture_panes(make_snapshot(wrong=9))])
    assert set(before) | {"settings", "baseline"} == set(after) | {"settings"} == set(ORDER)
    for name, pane in before.items():
        sizes = [{**each[name]["opts"], "title": ""} for each in (before, after)]
        assert sizes[0] == sizes[1], name
        assert pane["data"], name  # the server looks at the first


def test_curves_hold_their_points() -> None:
    panes = by_name(plot_panes(History(RECORDS)))
    traces = {
        trace["name"]: trace for pane in panes.values() for trace in pane["data"] if "name" in trace
    }
    assert traces["training"]["x"] == list(range(1, 21))
    assert traces["training"]["y"] == [400.0 + step for step in range(1, 21)]
    assert traces["held out"]["y"] == [410.5, 420.5]
    assert traces["model and guide"]["y"] == [None] * 20
    assert traces["inferred"]["y"] == [75.0, 0.0, 25.0]
    assert traces["true"]["y"] == [75.0, 25.0]
    assert panes["confusion"]["data"][0]["z"] == [[1.0, 0.0], [0.0, 1.0]]
    numbers = {(a["x"], a["y"]): a["text"] for a in panes["confusion"]["layout"]["annotations"]}
    assert numbers == {(0, 0): "3", (1, 0): "0", (0, 1): "0", (1, 1): "1"}


@pytest.mark.parametrize("wrong", [0, 1, 30])
def test_pictures_are_sharp_sheets(wrong: int) -> None:
    snapshot = make_snapshot(1500, wrong=wrong)
    panes = by_name(picture_panes(snapshot))
    expected = sheets(snapshot, 8, 2, 2)
    for name in ("inferred", "reconstructions", "prior_samples", "errors"):
        png = BytesIO(b64decode(panes[name]["data"][0]["content"]["src"].partition(",")[2]))
        with Image.open(png) as picture:
            np.testing.assert_array_equal(picture, expected[name])
            assert picture.size == (panes[name]["opts"]["width"], panes[name]["opts"]["height"])
        assert "step 1,500" in panes[name]["opts"]["title"]


def test_text_cannot_run() -> None:
    pane = settings_pane({"save": "<img src=x onerror=alert(1)>", "<b>": 'a"&b'})
    text = pane["data"][0]["content"]
    assert "<img" not in text
    assert "<b>" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
