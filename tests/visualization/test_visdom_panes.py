"""The messages to a visdom server are strict JSON, escaped, and contain the right numbers."""

import json
from base64 import b64decode
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import PANES, RECORDS, make_snapshot
from PIL import Image

from air.visualization.drawing import sheets
from air.visualization.snapshots import Snapshot
from air.visualization.visdom_client import Client
from air.visualization.visdom_panes import draw_page

Draw = Callable[..., dict[str, Any]]


def refuse_constant(name: str) -> None:
    raise AssertionError(f"a browser drops a message with {name} in it")


@pytest.fixture
def draw(tmp_path: Path) -> Draw:
    """Draws a page with a client that records its messages; returns them by pane."""

    def drawn(
        records: list[dict[str, Any]], snapshot: Snapshot, **settings: object
    ) -> dict[str, Any]:
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        client = Client(offline=True, log_to_filename=str(log))
        draw_page(client, "run", records, snapshot, settings)
        lines = log.read_text().splitlines()
        messages = [json.loads(line, parse_constant=refuse_constant)[1] for line in lines]
        assert {message["eid"] for message in messages} == {"run"}
        return {message["win"]: message for message in messages}

    return drawn


def test_every_pane_has_its_place_and_size_from_the_beginning(draw: Draw) -> None:
    before = draw([], make_snapshot(wrong=0))
    after = draw(RECORDS, make_snapshot(wrong=9), seed=1)
    assert list(before) == list(after)
    assert set(before) == PANES
    for name, pane in before.items():
        for side in ("width", "height"):
            assert pane["opts"][side] == after[name]["opts"][side], name
        assert pane["data"], name  # the server looks at the first


def test_without_true_counts_no_pane_is_about_them(draw: Draw) -> None:
    snapshot = make_snapshot()
    blind = snapshot._replace(scenes=snapshot.scenes._replace(true_counts=None))
    measured = [{"step": 1, "eval_elbo": 1.0, "accuracy_mode": None, "confusion": None}]
    for records in ([], measured):
        assert set(draw(records, blind)) == PANES - {"accuracy", "confusion"}


def test_plots_show_their_numbers(draw: Draw) -> None:
    panes = draw(RECORDS, make_snapshot())
    traces = {
        trace["name"]: trace for name in ("elbo", "grad_norm") for trace in panes[name]["data"]
    }
    steps = list(range(1, 21))
    assert traces["training"]["x"] == steps
    assert traces["training"]["y"] == [400.0 + step for step in steps]
    assert traces["held out"]["x"] == [10, 20] + 18 * [None]
    assert traces["held out"]["y"] == [410.5, 420.5] + 18 * [None]
    assert traces["model and guide"]["y"] == [None] * 20
    assert set(traces) == {"training", "held out", "model and guide"}
    assert panes["counts"]["data"][0]["x"] == [0, 1, 2]
    assert panes["counts"]["data"][0]["y"] == [3, 0, 1]
    assert panes["confusion"]["data"][0]["z"] == [[100.0, 0.0], [0.0, 100.0]]


def test_curves_have_their_colours_and_axes(draw: Draw) -> None:
    records = [{"step": step, "elbo": -1e6 if step == 0 else 400.0} for step in range(50)]
    records += [{"step": 50, "empty_elbo": 100.0, "eval_elbo": 410.0}]
    records += [{"step": step, "grad_norm": 10.0**-step} for step in range(5)]
    panes = draw(records, make_snapshot())
    lines = {trace["name"]: trace["line"] for trace in panes["elbo"]["data"]}
    assert lines["empty canvas"] == {"color": "#777777", "dash": "dot"}
    assert len({line["color"] for line in lines.values()}) == 3
    axis = panes["elbo"]["layout"]["yaxis"]
    assert axis["title"] == "nats per image"
    assert 0 < axis["range"][0] < 100
    assert 410 < axis["range"][1] < 450
    axis = panes["grad_norm"]["layout"]["yaxis"]
    assert axis["type"] == "log"
    assert "range" not in axis


@pytest.mark.parametrize("wrong", [0, 1, 30])
def test_pictures_are_sharp_sheets(draw: Draw, wrong: int) -> None:
    snapshot = make_snapshot(1500, wrong=wrong)
    panes = draw([], snapshot)
    expected = sheets(snapshot, 8, 2, 2, 5)
    for name in ("inferred", "reconstructions", "objects", "prior_samples", "errors"):
        png = BytesIO(b64decode(panes[name]["data"][0]["content"]["src"].partition(",")[2]))
        with Image.open(png) as picture:
            np.testing.assert_array_equal(picture, expected[name])
            assert picture.size == (panes[name]["opts"]["width"], panes[name]["opts"]["height"])
        assert "step 1,500" in panes[name]["opts"]["title"]


def test_settings_are_text_and_not_html(draw: Draw) -> None:
    settings = {"save": "<img src=x onerror=alert(1)>", "<b>": 'a"&b'}
    text = draw([], make_snapshot(), **settings)["settings"]["data"][0]["content"]
    assert "<img" not in text
    assert "<b>" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
