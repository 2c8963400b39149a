"""The live page: its messages, and real visdom servers that are frozen, restarted or locked."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import visdom
from helpers import PANES, RECORDS, ROOT, ask, make_snapshot, panes, visdom_server
from PIL import Image

from air.visualization import visdom_client
from air.visualization.dashboard import Dashboard, connect, draw_page
from air.visualization.drawing import STEP_COLOURS, sheets
from air.visualization.snapshots import Snapshot

LOCAL = "http://127.0.0.1"
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
        client = visdom_client.Client(env="run", offline=True, log_to_filename=str(log))
        draw_page(client, records, snapshot, settings)
        lines = log.read_text().splitlines()
        messages = [json.loads(line, parse_constant=refuse_constant)[1] for line in lines]
        assert {message["eid"] for message in messages} == {"run"}
        return {message["win"]: message for message in messages}

    return drawn


def test_every_pane_has_its_place_and_size_from_the_beginning(draw: Draw) -> None:
    settings = {"save": "<img src=x onerror=alert(1)>", "<b>": 'a"&b'}
    snapshot = make_snapshot(1500, wrong=9)
    before, one, after = (
        draw([], make_snapshot(wrong=0)),
        draw([], make_snapshot(wrong=1)),  # a single error broke Pyro's example
        draw(RECORDS, snapshot, **settings),
    )
    assert list(before) == list(one) == list(after)
    assert set(before) == PANES
    for name, pane in before.items():
        for other in (one, after):
            for side in ("width", "height"):
                assert pane["opts"][side] == other[name]["opts"][side], name
        assert pane["data"], name  # the server looks at the first
    for name, sheet in sheets(snapshot, 8, 2, 2, 5).items():
        if name != "inputs":
            png = after[name]["data"][0]["content"]["src"].partition(",")[2]
            with Image.open(BytesIO(b64decode(png))) as picture:
                np.testing.assert_array_equal(picture, sheet)
                options = after[name]["opts"]
                assert picture.size == (options["width"], options["height"])
            assert "step 1,500" in options["title"]
    text = after["settings"]["data"][0]["content"]
    assert "<img" not in text
    assert "<b>" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;" in text


def test_without_true_counts_no_pane_is_about_them(draw: Draw) -> None:
    snapshot = make_snapshot()
    blind = snapshot._replace(scenes=snapshot.scenes._replace(true_counts=None))
    measured = [{"step": 1, "eval_elbo": 1.0, "accuracy_mode": None, "confusion": None}]
    for records in ([], measured):
        assert set(draw(records, blind)) == PANES - {"accuracy", "confusion", "errors"}


def test_plots_show_their_numbers_in_their_colours(draw: Draw) -> None:
    panes = draw([{"step": 0, "elbo": -1e6, "empty_elbo": 400.0}, *RECORDS], make_snapshot())
    traces = {
        trace["name"]: trace for name in ("elbo", "grad_norm") for trace in panes[name]["data"]
    }
    assert set(traces) == {"training", "held out", "empty canvas", "model and guide"}
    assert traces["training"]["x"] == list(range(21))
    assert traces["training"]["y"] == [-1e6, *range(401, 421)]
    assert traces["held out"]["x"] == [10, 20] + 19 * [None]
    assert traces["held out"]["y"] == [410.5, 420.5] + 19 * [None]
    assert traces["model and guide"]["y"] == [None] * 20
    assert traces["empty canvas"]["line"] == {"color": "#777777", "dash": "dot"}
    axis = panes["elbo"]["layout"]["yaxis"]
    assert axis["title"] == "nats per image"
    assert axis["range"][0] > -5e5  # above the first step
    assert panes["counts"]["data"][0]["x"] == [0, 1, 2]
    assert panes["counts"]["data"][0]["y"] == [3, 0, 1]
    assert panes["confusion"]["data"][0]["z"] == [[100.0, 0.0], [0.0, 100.0]]
    falling = [{"step": step, "grad_norm": 10.0**-step} for step in range(5)]
    axis = draw(falling, make_snapshot())["grad_norm"]["layout"]["yaxis"]
    assert axis["type"] == "log"
    assert "range" not in axis


def test_a_drawing_is_due_at_or_after_each_multiple() -> None:
    drawn: list[int] = []
    with Dashboard(mock.Mock(), "due", {}, every=15) as board:
        for step in range(0, 100, 10):
            if board.due(step):
                drawn.append(step)
                board.draw(make_snapshot(step, count=1))
    assert drawn == [0, 20, 30, 50, 60, 80, 90]


@pytest.mark.parametrize(
    ("address", "server", "port", "base"),
    [
        ("localhost", "http://localhost", 8097, ""),
        ("127.0.0.1:5/", "http://127.0.0.1", 5, ""),
        ("http://[::1]:5", "http://[::1]", 5, ""),
        ("https://box.lab:443/visdom/", "https://box.lab", 443, "/visdom"),
    ],
)
def test_addresses_may_be_short(address: str, server: str, port: int, base: str) -> None:
    with mock.patch.object(visdom_client, "Client") as client:
        connect(address)
    options = client.call_args.kwargs
    assert (options["server"], options["port"], options["base_url"]) == (server, port, base)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visdom_client, "TIMEOUT_SECONDS", 20.0)  # for a busy test machine
    monkeypatch.setenv("http_proxy", f"{LOCAL}:9")  # not for a server on this machine
    for name in ("USERNAME", "PASSWORD"):
        monkeypatch.delenv(f"VISDOM_{name}", raising=False)


def wait_for_title(port: int, env: str, step: int) -> dict[str, Any]:
    """Waits until all panes of that step are drawn; returns the panes."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = panes(port, env)
        if f"step {step}" in found.get("errors", {}).get("title", "") and "settings" in found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"step {step} was not drawn")


def training_steps(found: dict[str, Any]) -> list[int]:
    return list(found["elbo"]["content"]["data"][0]["x"])


def test_connecting_without_a_server_fails_with_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for address, place in ((f"{LOCAL}:1", f"{LOCAL}:1"), ("nonsense:1", "http://nonsense:1")):
        with pytest.raises(ConnectionError, match=rf"^no .* {place}; .*python -m visdom.*port 1$"):
            connect(address)
    for wrong in ("http://localhost:99999", "http://localhost:x", "http://:8097"):
        with pytest.raises(ValueError, match=rf"^--visdom-server: expected .*8097, got {wrong}$"):
            connect(wrong)
    assert connect(None) is None
    monkeypatch.setattr(visdom_client, "TIMEOUT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()
        with pytest.raises(ConnectionError, match="no visdom server"):
            connect(f"{LOCAL}:{silent.getsockname()[1]}")
        assert time.monotonic() - begin < 10
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
def test_a_run_and_its_continuation_draw_on_one_page(tmp_path: Path) -> None:
    with visdom_server(tmp_path) as (port, _):
        assert "visdom" in ask(f"{port}/")  # tornado 6.6 would answer 403
        client = connect(f"http://localhost:{port}")
        board = Dashboard(client, "runs/one", {"seed": 7}, RECORDS[:5])
        assert str(board) == f"Live plots: http://localhost:{port}/env/runs_one"
        board.draw(make_snapshot(0, wrong=0))
        first = wait_for_title(port, "runs_one", 0)
        for record in RECORDS[5:]:
            board.record(record)
        board.draw(make_snapshot(1))
        board.close()
        resumed = Dashboard(client, "runs/one", {"seed": 7}, RECORDS)
        resumed.record({"step": 21, "elbo": 421.0})
        resumed.draw(make_snapshot(30))
        resumed.close()
        last = panes(port, "runs_one")
        places = [{name: pane["i"] for name, pane in page.items()} for page in (first, last)]
        assert places[0] == places[1]
        assert set(last) == PANES
        assert training_steps(last) == list(range(1, 22))
        assert "<td>seed</td><td>7</td>" in last["settings"]["content"]


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
def test_training_never_waits_for_a_server_and_one_that_comes_back_gets_every_pane(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with visdom_server(tmp_path / "one") as (port, server):
        board = Dashboard(connect(f"{LOCAL}:{port}"), "phoenix", {}, RECORDS[:3])
        board.draw(make_snapshot(1))
        wait_for_title(port, "phoenix", 1)
        monkeypatch.setattr(visdom_client, "TIMEOUT_SECONDS", 0.5)
        os.kill(server.pid, signal.SIGSTOP)
        begin = time.monotonic()
        for record in RECORDS[3:20]:
            board.record(record)
            board.draw(make_snapshot(record["step"], count=4))
            time.sleep(0.1)  # several drawings fail
        assert time.monotonic() - begin < 6
    board.draw(make_snapshot(20, count=4))
    time.sleep(1)  # a drawing fails without a server
    monkeypatch.setattr(visdom_client, "TIMEOUT_SECONDS", 20.0)
    with visdom_server(tmp_path / "two", port):
        board.draw(make_snapshot(21))
        board.close(60)
        found = panes(port, "phoenix")
        assert set(found) == PANES
        assert training_steps(found) == list(range(1, 21))
    assert (tmp_path / "two" / "phoenix.json").is_file()  # for the next start of that server
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    begin = time.monotonic()
    with Dashboard(board.client, "gone", {}) as gone:
        gone.draw(make_snapshot(1))
    assert time.monotonic() - begin < 5


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
def test_a_login_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with visdom_server(tmp_path, login="ada") as (port, server):
        for password in (None, "wrong"):
            if password:
                monkeypatch.setenv("VISDOM_USERNAME", "ada")
                monkeypatch.setenv("VISDOM_PASSWORD", password)
            with pytest.raises(ConnectionError, match=r"refuses: .*VISDOM_USERNAME and VISDOM_PA"):
                connect(f"{LOCAL}:{port}")
        monkeypatch.setenv("VISDOM_PASSWORD", "ada")
        client = connect(f"{LOCAL}:{port}")
        board = Dashboard(client, "safe", {})
        board.draw(make_snapshot(3))
        board.close(60)
        assert "step 3" in (tmp_path / "safe.json").read_text()
        server.kill()
        server.join()
    with visdom_server(tmp_path, port, login="ada"):  # it does not know the old cookie
        board = Dashboard(client, "safe", {})
        board.draw(make_snapshot(4))
        time.sleep(2)  # the first drawing finds that out
        board.draw(make_snapshot(5))
        board.close(60)
        saved = json.loads((tmp_path / "safe.json").read_text())
        assert "step 5" in saved["jsons"]["inferred"]["title"]


def lacking(what: str) -> None:
    """Skips the test, or fails it if AIR_BROWSER_TESTS is set, as in .ci/run."""
    if os.environ.get("AIR_BROWSER_TESTS"):
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture
def visdom_site(tmp_path: Path) -> Path:
    """A copy of the package visdom with the files of its page."""
    if not shutil.which("npm"):
        lacking("no npm")
    shutil.copytree(Path(visdom.__file__).parent, tmp_path / "site" / "visdom")
    script = ROOT / "tests" / "visdom_files.py"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    if done.returncode:
        lacking(f"no files of visdom's page from the npm registry: {done.stderr[-300:]}")
    return tmp_path / "site"


@pytest.fixture
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        lacking("no chromium with its chromedriver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run",
        "disable-component-update", "disable-sync", "disable-quic", "window-size=1760,1600",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    service = webdriver.ChromeService(driver)
    with mock.patch.dict(os.environ, {"no_proxy": "localhost,127.0.0.1"}):  # to the driver
        opened = webdriver.Chrome(options, service)
        try:
            yield opened
        finally:
            opened.quit()
            service.stop()


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
@pytest.mark.browser
def test_a_browser_shows_every_pane_and_its_changes(
    tmp_path: Path,
    visdom_site: Path,
    browser: Any,  # noqa: ANN401
) -> None:
    with visdom_server(tmp_path / "server", site=visdom_site) as (port, _):
        board = Dashboard(connect(f"{LOCAL}:{port}"), "seen", {"save": "<b>bold</b>"}, RECORDS)
        board.draw(make_snapshot(7))
        wait_for_title(port, "seen", 7)
        browser.get(f"{LOCAL}:{port}/env/seen")

        def shown(selector: str) -> list[Any]:
            return list(browser.find_elements("css selector", selector))

        deadline = time.monotonic() + 60
        while len(shown(".window")) < len(PANES) or "step 7" not in browser.page_source:
            assert time.monotonic() < deadline, f"{len(shown('.window'))} panes are shown"
            time.sleep(0.5)
        assert len(shown(".window")) == len(PANES)
        assert len(shown(".js-plotly-plot")) == 8
        widths = [picture.get_property("naturalWidth") for picture in shown(".window img")]
        # Decoded, and not stretched except by rounding; fourth is the map of the steps.
        assert widths == [828, 828, 828, 758, 828, 828]
        sizes = [picture.size["width"] for picture in shown(".window img")]
        assert np.allclose(sizes, widths, atol=9), sizes
        assert not shown(".window td b")  # text stays text
        board.record({"step": 25, "elbo": 444.0})
        board.draw(make_snapshot(25))
        while "step 25" not in browser.page_source:  # without reloading
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert len(shown(".window")) == len(PANES)
        errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert not errors
        with Image.open(BytesIO(browser.get_screenshot_as_png())) as screenshot:
            colours = {colour for _, colour in screenshot.convert("RGB").getcolors(1 << 24) or []}
        for colour in ((213, 94, 0), (0, 114, 178), STEP_COLOURS[0]):
            assert colour in colours
        board.close()
