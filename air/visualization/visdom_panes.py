"""The panes of the dashboard: messages to a visdom server, made of curves and pictures.

Each pane has a name of its own, so that the server replaces it as a whole.
"""

import base64
import html
import io
from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image

from air.visualization.curves import PANELS, History, Panel
from air.visualization.drawing import sheets
from air.visualization.snapshots import Snapshot

Pane = dict[str, Any]  # a message to visdom's server

ORDER = (  # on the page: four plots are as wide as two pictures
    "elbo", "accuracy", "kl", "confusion",
    "inferred", "reconstructions",
    "objects", "prior_samples", "errors",
    "counts", "grad_norm", "rates", "speed", "baseline", "settings",
)  # fmt: skip
_PLOT = 410, 280  # width and height of a plot
_CELL, _ROWS, _COLUMNS = 100, 2, 8  # side of a scene in pixels, and their number in a picture
ON_PAGE = _ROWS * _COLUMNS  # scenes that a picture shows
_DECOMPOSED_ROWS = 4  # rows in the picture of objects
_TITLES = {
    "inferred": "Held-out scenes with what is found in them",
    "reconstructions": "The same, painted again",
    "objects": "Step by step: what it sees (and how surely it is in use), what it paints; the sum",
    "prior_samples": "Samples from the prior, all counts equally likely unless that is learnt",
    "errors": "Scenes of the last evaluation that are still counted wrongly",
}


def plot_panes(history: History) -> Iterator[Pane]:
    """All curves, and the counts of the last evaluation."""
    for panel in PANELS:
        if panel.name != "baseline" or history.points("baseline_error")[0]:
            yield _curves(panel, history)
    yield _histogram(history.latest)
    yield _confusion(history.latest.get("confusion", [[0]]))


def settings_pane(settings: Mapping[str, Any]) -> Pane:
    """The configuration as a table. A pane of text is HTML, and would run what is not escaped."""
    rows = (
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in sorted(settings.items())
    )
    table = f"<table border=1 cellpadding=2>{''.join(rows)}</table>"
    return _pane("settings", "Settings", [{"content": table, "type": "text"}], 410, 420)


def picture_panes(snapshot: Snapshot) -> Iterator[Pane]:
    """Pictures of a snapshot, always of the same size: a page stretches what is not."""
    zoom = max(1, _CELL // snapshot.scenes.images.shape[-1])
    drawn = sheets(snapshot, _COLUMNS, zoom, _ROWS, _DECOMPOSED_ROWS)
    for name, title in _TITLES.items():
        height, width, _ = drawn[name].shape
        png = io.BytesIO()
        Image.fromarray(drawn[name]).save(png, "PNG")
        source = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
        picture = {"type": "image", "content": {"src": source, "caption": None}}
        yield _pane(name, f"{title} (step {snapshot.step:,})", [picture], width, height)


def _pane(name: str, title: str, data: list[Any], width: int, height: int, **more: Any) -> Pane:  # noqa: ANN401
    opts = {"title": html.escape(title), "width": width, "height": height}
    return {"win": name, "data": data, "opts": opts, **more}


def _plot(name: str, title: str, data: list[Any], x: Any, y: Any, **layout: Any) -> Pane:  # noqa: ANN401
    axes = {"xaxis": {"automargin": True, **x}, "yaxis": {"automargin": True, **y}}
    margin = {"l": 55, "r": 15, "t": 15, "b": 55}
    return _pane(
        name, title, data, *_PLOT, layout={"margin": margin, "showlegend": True} | axes | layout
    )


def _curves(panel: Panel, history: History) -> Pane:
    traces, shown = [], []
    for curve in panel.curves:
        steps, values = history.points(curve.key)
        shown.append(values)
        dash = "dot" if curve.style == "dotted" else "solid"
        traces.append(
            {"x": steps, "y": values, "name": curve.label, "type": "scatter"}
            | {"mode": "lines+markers" if curve.style == "points" else "lines"}
            # The page's smoothing reads marker.line.
            | {"line": {"color": curve.colour, "dash": dash}, "marker": {"size": 5, "line": {}}}
        )
    scale, limits = panel.y_axis(shown)
    y: dict[str, Any] = {"title": {"text": panel.unit}, "type": scale, "exponentformat": "power"}
    if limits:
        y["range"] = limits
    legend = {"orientation": "h", "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom"}
    x = {"title": {"text": "step"}, "rangemode": "tozero"}
    return _plot(panel.name, panel.title, traces, x, y, legend=legend)


def _histogram(latest: Mapping[str, Any]) -> Pane:
    """Scenes by count: inferred, and in truth where it is known."""
    found = latest.get("count_histogram", [])
    total = max(sum(found), 1)
    bars = [_bar("inferred", found, total, "#0072B2")]
    if "confusion" in latest:
        bars.append(_bar("true", [sum(row) for row in latest["confusion"]], total, "#BBBBBB"))
    x, y = {"title": {"text": "objects"}, "dtick": 1}, {"title": {"text": "scenes (%)"}}
    return _plot("counts", "Held-out scenes by count", bars, x, y, barmode="group")


def _bar(name: str, scenes: list[int], total: int, colour: str) -> dict[str, Any]:
    heights = [100 * number / total for number in scenes]
    bars = {"x": [*range(len(scenes))], "y": heights, "marker": {"color": colour}}
    return {"type": "bar", "name": name, **bars}


def _confusion(matrix: list[list[int]]) -> Pane:
    shares = [[number / max(sum(row), 1) for number in row] for row in matrix]
    cells = {"type": "heatmap", "z": shares, "zmin": 0, "zmax": 1, "showscale": False}
    numbers = [
        {"x": inferred, "y": true, "text": f"{number:,}", "showarrow": False}
        | {"font": {"color": "white" if shares[true][inferred] > 0.5 else "black"}}
        for true, row in enumerate(matrix)
        for inferred, number in enumerate(row)
    ]
    x = {"title": {"text": "inferred count"}, "dtick": 1}
    y = {"title": {"text": "true count"}, "dtick": 1, "autorange": "reversed"}
    data = [cells | {"colorscale": [[0, "#FFFFFF"], [1, "#0072B2"]]}]
    return _plot("confusion", "Held-out scenes", data, x, y, annotations=numbers, showlegend=False)
