"""The dashboard draws on real visdom servers: live, frozen, restarted, with a login."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import visdom
from helpers import PANES, RECORDS, ROOT, ask, make_snapshot, panes, visdom_server
from PIL import Image

from air.visualization import visdom_client
from air.visualization.dashboard import Dashboard, connect
from air.visualization.drawing import STEP_COLOURS

pytestmark = pytest.mark.slow

LOCAL = "http://127.0.0.1"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visdom_client, "TIMEOUT_SECONDS", 20.0)  # for a busy test machine
    for name in ("USERNAME", "PASSWORD"):
        monkeypatch.delenv(f"VISDOM_{name}", raising=False)


@pytest.fixture(scope="module")
def live(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[int, "subprocess.Popen[bytes]"]]:
    """One server for tests that do not stop it; each test uses its own environment."""
    with visdom_server(tmp_path_factory.mktemp("live")) as (port, server):
        yield port, server


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


def test_many_drawings_leave_one_pane_each(
    live: tuple[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"{LOCAL}:9")  # not for a server on this machine
    port, _ = live
    address = f"http://localhost:{port}"
    board = Dashboard(connect(address), "runs/one", {"seed": 7}, RECORDS[:5])
    assert str(board) == f"Live plots: {address}/env/runs_one"
    first: dict[str, Any] = {}
    for step in range(5):
        for record in RECORDS[5 + 3 * step : 8 + 3 * step]:
            board.record(record)
        board.draw(make_snapshot(step, wrong=step % 3))  # one error broke Pyro's example
        first = first or wait_for_title(port, "runs_one", step)
    board.close()
    resumed = Dashboard(connect(address), "runs/one", {"seed": 7}, RECORDS)
    resumed.record({"step": 21, "elbo": 421.0})
    resumed.draw(make_snapshot(30))
    resumed.close()
    last = panes(port, "runs_one")
    assert set(last) == PANES
    assert {name: pane["i"] for name, pane in last.items()} == {
        name: pane["i"] for name, pane in first.items()
    }  # each where it was
    assert training_steps(last) == list(range(1, 22))
    assert "<td>seed</td><td>7</td>" in last["settings"]["content"]


def test_the_page_itself_is_served(live: tuple[int, Any]) -> None:
    assert "visdom" in ask(f"{live[0]}/")  # tornado 6.6 would answer 403


def test_training_never_waits_for_a_frozen_server(
    live: tuple[int, "subprocess.Popen[bytes]"],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    port, server = live
    board = Dashboard(connect(f"{LOCAL}:{port}"), "frozen", {})
    board.draw(make_snapshot(0))
    wait_for_title(port, "frozen", 0)
    monkeypatch.setattr(visdom_client, "TIMEOUT_SECONDS", 0.5)
    server.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    for record in RECORDS:
        board.record(record)
        board.draw(make_snapshot(record["step"], count=4))
        time.sleep(0.1)  # several drawings fail
    assert time.monotonic() - begin < 6
    server.send_signal(signal.SIGCONT)
    monkeypatch.setattr(visdom_client, "TIMEOUT_SECONDS", 20.0)
    board.draw(make_snapshot(21))
    assert training_steps(wait_for_title(port, "frozen", 21)) == list(range(1, 21))
    board.close(60)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_server_that_comes_back_gets_every_pane(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with visdom_server(tmp_path / "one") as (port, server):
        board = Dashboard(connect(f"{LOCAL}:{port}"), "phoenix", {}, RECORDS[:3])
        board.draw(make_snapshot(1))
        wait_for_title(port, "phoenix", 1)
        server.kill()
        server.wait()
    for record in RECORDS[3:10]:
        board.record(record)
        board.draw(make_snapshot(record["step"], count=1))
        time.sleep(0.1)  # several drawings fail
    with visdom_server(tmp_path / "two", port):
        board.draw(make_snapshot(11))
        board.close(60)
        found = panes(port, "phoenix")
        assert set(found) == PANES
        assert training_steps(found) == list(range(1, 11))
    assert (tmp_path / "two" / "phoenix.json").is_file()  # for the next start of that server
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_closing_is_quick_without_a_server(live: tuple[int, Any]) -> None:
    client = connect(f"{LOCAL}:{live[0]}")
    client.port = 1  # as if the server were gone
    board = Dashboard(client, "gone", {})
    board.draw(make_snapshot(1))
    begin = time.monotonic()
    board.close()
    assert time.monotonic() - begin < 5


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


def test_a_login_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"{LOCAL}:9")  # not for a server on this machine
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
        server.wait()
    with visdom_server(tmp_path, port, login="ada"):  # it does not know the old cookie
        board = Dashboard(client, "safe", {})
        board.draw(make_snapshot(4))
        time.sleep(2)  # the first drawing finds that out
        board.draw(make_snapshot(5))
        board.close(60)
        saved = json.loads((tmp_path / "safe.json").read_text())
        assert "step 5" in saved["jsons"]["inferred"]["title"]


def test_a_drawing_is_due_at_or_after_each_multiple() -> None:
    steps = {15: range(0, 100, 10), None: range(0, 400, 30)}
    drawn: dict[int | None, list[int]] = {}
    for every, trained in steps.items():
        with Dashboard(mock.Mock(), "due", {}, every=every) as board:
            drawn[every] = []
            for step in trained:
                if board.due(step):
                    drawn[every].append(step)
                    board.draw(make_snapshot(step, count=1))
    assert drawn == {15: [0, 20, 30, 50, 60, 80, 90], None: [0, 120, 210, 300]}


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
    opened = webdriver.Chrome(options, service)
    try:
        yield opened
    finally:
        opened.quit()
        service.stop()


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
        assert widths == [828] * 5  # decoded, and not stretched except by rounding
        sizes = [picture.size["width"] for picture in shown(".window img")]
        assert all(abs(size - 828) < 9 for size in sizes), sizes
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
