"""A live visdom page of a run: curves, counts and pictures.

Each drawing sends every pane again, so that a resumed run continues its page, and a restarted
server shows all panes.
"""

import contextlib
import html
import logging
import os
import queue
import re
import threading
import urllib.parse
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from air.visualization.curves import PANELS, History, Panel, Record, shares
from air.visualization.drawing import sheets
from air.visualization.snapshots import Snapshot

DEFAULT_PORT = 8097  # of a visdom server
PICTURES = {  # names and titles
    "inferred": "Held-out scenes with the inferred boxes and counts",
    "reconstructions": "Reconstructions of the same scenes",
    "objects": "The window of each step, the probability that the step is used, and its object",
    "scan": "Where the windows of each step lie, and the number of scenes that use the step",
    "prior_samples": "Samples from the prior; all counts equally likely unless the prior is learnt",
    "errors": "Scenes counted wrongly in the last evaluation and by the present model",
    "backgrounds": "Backgrounds of the same scenes",
}
_ROWS, _COLUMNS, _OBJECT_ROWS = 2, 8, 5  # of scenes in a picture, and in the picture of objects
ON_PAGE = _ROWS * _COLUMNS  # scenes that a picture shows
_SCENE_SIDE = 100  # pixels, about
_PLOT = {"width": 410, "height": 330, "marginright": 20, "marginbottom": 45}
_WIDE = {**_PLOT, "width": 551}  # three are as wide as two pictures or four narrow plots


class Dashboard:
    """Draws a run in one visdom environment.

    A thread of its own sends the drawings, so that training never waits for the server. If the
    server goes down, the thread logs one warning, and the next drawing tries again.

    Args:
        client: From `connect`.
        env: The environment; each character that visdom does not accept becomes "_".
        settings: Shown as a table.
        records: The lines of metrics.jsonl so far.
        every: Steps between drawings; None means 100.
    """

    def __init__(
        self,
        client: Any,  # noqa: ANN401  # visdom is imported only if used
        env: str,
        settings: Mapping[str, Any],
        records: Iterable[Record] = (),
        every: int | None = None,
    ) -> None:
        self.client = client
        client.env = re.sub(r"[^\w.-]", "_", env)  # visdom would split a name at a slash
        self.every = every or 100
        self._settings = dict(settings)
        self._records = list(records)
        self._drawn_at = -1
        # At most one drawing waits here; None ends the thread.
        self._drawings = queue.SimpleQueue[tuple[list[Record], Snapshot] | None]()
        self._thread = threading.Thread(target=self._send, name="visdom", daemon=True)
        self._thread.start()

    def __str__(self) -> str:
        """Tells the user where the page is."""
        address = f"{self.client.server}:{self.client.port}{self.client.base_url}"
        return f"Live plots: {address}/env/{self.client.env}"

    def record(self, record: Record) -> None:
        """Adds a line of metrics.jsonl, for the next drawing."""
        self._records.append(record)

    def due(self, step: int) -> bool:
        """Whether to draw at this step: the first one at or past a multiple of `every`."""
        return step // self.every != self._drawn_at // self.every

    def draw(self, snapshot: Snapshot) -> None:
        """Draws the snapshot and the records so far, in place of a drawing that still waits."""
        self._drawn_at = snapshot.step
        with contextlib.suppress(queue.Empty):
            self._drawings.get_nowait()
        self._drawings.put((self._records.copy(), snapshot))

    def close(self, patience: float = 10.0) -> None:
        """Waits until the last drawing is sent, at most `patience` seconds."""
        self._drawings.put(None)
        self._thread.join(patience)

    def __enter__(self) -> "Dashboard":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes; does not wait after a keyboard interrupt."""
        self.close(0.0 if kind is KeyboardInterrupt else 10.0)

    def _send(self) -> None:
        is_down = False
        for records, snapshot in iter(self._drawings.get, None):
            try:
                draw_page(self.client, records, snapshot, self._settings)
                self.client.save([self.client.env])  # a restarted server will load the page
                is_down = False
            except Exception as error:  # training must go on whatever visdom does
                if not is_down:
                    text = "no live plots for now, training continues: %s"
                    logging.getLogger("air").warning(text, error)
                is_down = True


def draw_page(
    client: Any,  # noqa: ANN401
    records: Iterable[Record],
    snapshot: Snapshot,
    settings: Mapping[str, Any],
) -> None:
    """Draws every pane in the environment of the client.

    A pane has a fixed name, under which a later drawing replaces it. All panes are drawn from the
    beginning, before they have anything to show, so that no pane moves later. The accuracy, the
    confusion matrix and the errors are left out if the true counts are unknown.
    """
    history, panels = History(records), {panel.name: panel for panel in PANELS}
    has_truth = snapshot.scenes.true_counts is not None
    for name in ("elbo", "kl", "accuracy") if has_truth else ("elbo", "kl"):
        _draw_curves(client, panels[name], history, _WIDE)
    zoom = max(1, _SCENE_SIDE // snapshot.scenes.images.shape[-1])
    pictures = sheets(snapshot, _COLUMNS, zoom, _ROWS, _OBJECT_ROWS)
    for name, title in PICTURES.items():
        if name == "errors":  # beside the picture before
            _draw_counts(client, history.latest, has_truth)
        if name in pictures and (has_truth or name != "errors"):
            options = {"title": f"{title} (step {snapshot.step:,})"}
            client.image(pictures[name].transpose(2, 0, 1), win=name, opts=options)
    for name in ("grad_norm", "rates", "speed"):
        _draw_curves(client, panels[name], history, _PLOT)
    # visdom shows text as HTML, and a browser would run scripts in unescaped text.
    rows = (
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in sorted(settings.items())
    )
    table = f"<table border=1 cellpadding=2>{''.join(rows)}</table>"
    client.text(table, win="settings", opts={"title": "Settings", **_PLOT})


def _draw_curves(
    client: Any,  # noqa: ANN401
    panel: Panel,
    history: History,
    size: Mapping[str, int],
) -> None:
    curves = history.shown(panel) or panel.curves[:1]
    points = [history.points(curve.key) for curve in curves]
    # visdom takes columns of one length, at least 1; it sends NaN as null, which no browser draws.
    longest = max(1, *(len(steps) for steps, _ in points))
    x, y = np.full((2, longest, len(curves)), np.nan)
    for column, (steps, values) in enumerate(points):
        x[: len(steps), column], y[: len(steps), column] = steps, values
    scale, limits = panel.y_axis([values for _, values in points])
    low, high = limits or (None, None)
    options = {
        "title": panel.title, "xlabel": "step", "ylabel": panel.unit,
        "ytype": scale, "ytickmin": low, "ytickmax": high,
        "legend": [curve.label for curve in curves], "showlegend": len(curves) > 1,
        "linecolor": np.array([curve.colour for curve in curves]),
        "dash": np.array(["dot" if curve.style == "dotted" else "solid" for curve in curves]),
        "markers": True, "markersymbol": "circle", "markersize": 4, "markerborderwidth": 0,
    }  # fmt: skip
    client.line(y, x, win=panel.name, opts={**options, **size})


def _draw_counts(client: Any, latest: Record, has_truth: bool) -> None:  # noqa: ANN401
    scenes = np.array(latest.get("count_histogram", [0, 0]))
    options = {"title": "Held-out scenes by inferred count", "xlabel": "objects", **_PLOT}
    client.bar(scenes, np.arange(len(scenes)), win="counts", opts=options)
    if has_truth:
        options = {
            "title": "Inferred counts (% of a true count)",
            "xlabel": "inferred count", "xtickstep": 1, "ylabel": "true count", "ytickstep": 1,
            "xmin": 0, "xmax": 100, "colormap": "Reds",
        }  # fmt: skip
        percent = 100 * shares(latest.get("confusion", [[0, 0]]))
        client.heatmap(percent, win="confusion", opts={**options, **_PLOT})


def connect(address: str | None) -> Any:  # noqa: ANN401
    """Makes a visdom client; None without an address.

    The environment variables VISDOM_USERNAME and VISDOM_PASSWORD are the login, if the server needs
    one.

    Args:
        address: Of the server, such as ``http://localhost:8097``; the scheme and the port may be
            left out.

    Raises:
        ConnectionError: If no server answers, or the server refuses; the message is one line for
            the user.
        ModuleNotFoundError: If visdom is not installed.
        ValueError: If the address has no host, or its port is not a number up to 65535.
    """
    if address is None:
        return None
    try:
        parts = urllib.parse.urlsplit(address if "://" in address else f"http://{address}")
        port = parts.port or DEFAULT_PORT
        if not parts.hostname:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"--visdom-server: expected an address such as http://localhost:{DEFAULT_PORT}, "
            f"got {address}"
        ) from None
    from air.visualization.visdom_client import Client

    server = f"{parts.scheme}://{parts.netloc.removesuffix(f':{parts.port}')}"
    try:
        return Client(
            server=server,
            port=port,
            base_url=parts.path.rstrip("/"),
            username=os.environ.get("VISDOM_USERNAME"),
            password=os.environ.get("VISDOM_PASSWORD"),
        )
    except (PermissionError, AssertionError) as error:  # visdom asserts that there is a password
        raise ConnectionError(
            f"the visdom server at {server}:{port} refuses: {error}; a login is taken from "
            "VISDOM_USERNAME and VISDOM_PASSWORD"
        ) from None
    except (OSError, ValueError):
        raise ConnectionError(
            f"no visdom server answers at {server}:{port}; start one with: "
            f"python -m visdom.server -port {port}"
        ) from None
