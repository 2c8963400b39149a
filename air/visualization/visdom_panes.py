"""The panes of the live page: a run's curves, counts, pictures and settings, sent to visdom.

Each pane has a fixed name, under which the visdom server replaces the pane as a whole.
"""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np

from air.visualization.curves import PANELS, History, Panel
from air.visualization.drawing import Pictures, sheets
from air.visualization.snapshots import Snapshot

ORDER = (  # on the page: four plots are as wide as two pictures
    "elbo", "accuracy", "kl", "confusion",
    "inferred", "reconstructions", "backgrounds",
    "objects", "prior_samples", "errors",
    "counts", "grad_norm", "rates", "speed",
    "reliability", "calibration", "settings", "distance", "baseline",
)  # fmt: skip
_ROWS, _COLUMNS = 2, 8  # of scenes in a picture
ON_PAGE = _ROWS * _COLUMNS  # scenes that a picture shows
_OBJECT_ROWS = 4  # scenes in the picture of objects
_SCENE_SIDE = 100  # pixels, about
_BLUE, _GREY = "#0072B2", "#BBBBBB"
_TITLES = {
    "inferred": "Held-out scenes with the inferred boxes and counts",
    "reconstructions": "Reconstructions of the same scenes",
    "backgrounds": "Backgrounds of the same scenes",
    "objects": "What each step sees, with the probability that it is used, and what it paints",
    "prior_samples": "Samples from the prior; all counts equally likely unless the prior is learnt",
    "errors": "Scenes counted wrongly in the last evaluation, and still now",
}


class Page:
    """The panes of one run.

    Args:
        client: Of visdom.
        env: The visdom environment that holds the panes.
    """

    def __init__(self, client: Any, env: str) -> None:  # noqa: ANN401
        self._client = client
        self._env = env

    def draw(self, history: History, snapshot: Snapshot, settings: Mapping[str, Any]) -> None:
        """Draws every pane that has something to show, and those that will (see `Panel`)."""
        has_truth = snapshot.scenes.true_counts is not None
        latest = history.latest
        zoom = max(1, _SCENE_SIDE // snapshot.scenes.images.shape[-1])
        pictures = sheets(snapshot, _COLUMNS, zoom, _ROWS, _OBJECT_ROWS)
        panes: dict[str, Callable[[], None]] = {
            name: partial(self._draw_picture, name, pictures[name], snapshot.step)
            for name in _TITLES
            if name in pictures
        }
        panes["counts"] = partial(self._draw_counts, latest)
        panes["settings"] = partial(self._draw_settings, settings)
        for panel in PANELS:
            at_once = panel.appears == "from_start" or (panel.appears == "with_truth" and has_truth)
            if at_once or history.has_points(panel):
                panes[panel.name] = partial(self._draw_curves, panel, history)
        if has_truth or "confusion" in latest:
            panes["confusion"] = partial(self._draw_confusion, latest.get("confusion", [[0]]))
        if has_truth or "reliability" in latest:
            panes["reliability"] = partial(self._draw_reliability, latest.get("reliability", []))
        for name in ORDER:
            if name in panes:
                panes[name]()

    def _draw_curves(self, panel: Panel, history: History) -> None:
        points: list[tuple[float, float | None]] = []
        numbers: list[int] = []  # of the curve of each point, from 1
        styles = {}
        shown = [c for c in panel.curves if not c.optional or any(history.points(c.key))]
        for number, curve in enumerate(shown, start=1):
            # visdom refuses a plot without points; a point without a value is not visible.
            found = list(zip(*history.points(curve.key), strict=True)) or [(0, None)]
            points += found
            numbers += [number] * len(found)
            dash = "dot" if curve.style == "dotted" else "solid"
            styles[curve.label] = {
                "mode": "lines+markers" if curve.style == "points" else "lines",
                "line": {"color": curve.colour, "dash": dash},
            }
        scale, limits = panel.y_axis([history.points(curve.key)[1] for curve in shown])
        legend = {"orientation": "h", "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom"}
        y_axis = {"title": panel.unit, "type": scale, "range": limits, "exponentformat": "power"}
        x_axis = {"title": "step", "rangemode": "tozero"}
        options = _plot_options(panel.title, x_axis, y_axis, legend=legend)
        options["legend"] = [curve.label for curve in shown]
        options["traceopts"] = {"plotly": styles}
        options |= {"markersize": 5, "markersymbol": "circle", "markerborderwidth": 0}
        positions = np.array(points, float)  # None becomes NaN, and visdom sends null for NaN
        self._client.scatter(
            positions, np.array(numbers), win=panel.name, env=self._env, opts=options
        )

    def _draw_counts(self, latest: Mapping[str, Any]) -> None:
        """Scenes by count: inferred, and true where the true counts are known."""
        inferred = latest.get("count_histogram", [0, 0])
        scenes = {"inferred": inferred}
        if "confusion" in latest:
            scenes["true"] = [sum(row) for row in latest["confusion"]]
        rows = list(zip_longest(*scenes.values(), fillvalue=0))
        percent = 100 * np.array(rows) / max(sum(inferred), 1)
        names = list(scenes)
        options = _plot_options(
            f"Held-out scenes by {' and '.join(names)} count",
            {"title": "objects", "dtick": 1},
            {"title": "scenes (%)"},
            colorway=[_BLUE, _GREY],
        )
        if len(names) > 1:  # visdom would turn a single column with a name into a row
            options["legend"] = names
        self._client.bar(percent, np.arange(len(rows)), win="counts", env=self._env, opts=options)

    def _draw_confusion(self, matrix: Sequence[Sequence[int]]) -> None:
        scenes = np.array(matrix)
        shares = scenes / np.maximum(scenes.sum(axis=1, keepdims=True), 1)
        numbers = [
            {"x": inferred, "y": true, "text": f"{number:,}", "showarrow": False}
            | {"font": {"color": "white" if shares[true, inferred] > 0.7 else "black"}}
            for (true, inferred), number in np.ndenumerate(scenes)
        ]
        options = _plot_options(
            "Held-out scenes (colour: share of the true count)",
            {"title": "inferred count", "dtick": 1},
            {"title": "true count", "dtick": 1, "autorange": "reversed"},
            annotations=numbers,
        )
        options |= {"xmin": 0, "xmax": 1, "colormap": "Reds"}
        self._client.heatmap(shares, win="confusion", env=self._env, opts=options)

    def _draw_reliability(self, bins: Sequence[Sequence[float]]) -> None:
        """Accuracy against confidence in each bin, labelled by its scenes, and the diagonal."""
        used = [each for each in bins if each[0]]
        points = [(confidence, accuracy) for _, confidence, accuracy in used] or [(0, math.nan)]
        options = _plot_options(
            "Reliability of the count, with numbers of held-out scenes",
            {"title": "confidence: greatest q(n)", "dtick": 0.2, "range": [0, 1.06]},
            {"title": "counted right (fraction)", "dtick": 0.2, "range": [-0.12, 1.06]},
            showlegend=False,
        )
        options["legend"] = ["calibrated", "scenes"]
        options["traceopts"] = {
            "plotly": {
                "calibrated": {"mode": "lines", "line": {"color": _GREY, "dash": "dash"}},
                "scenes": {
                    "mode": "markers+text",
                    "text": [f"{scenes:,.0f}" for scenes, *_ in used],
                    "textposition": "bottom center",
                    "marker": {
                        "color": _BLUE,
                        "size": [4 + 3 * math.log10(scenes) for scenes, *_ in used],
                    },
                },
            }
        }
        positions = np.array([(0, 0), (1, 1), *points], float)
        numbers = np.array([1, 1] + [2] * len(points))  # of the trace of each point
        self._client.scatter(positions, numbers, win="reliability", env=self._env, opts=options)

    def _draw_picture(self, name: str, picture: Pictures, step: int) -> None:
        options = {"title": f"{_TITLES[name]} (step {step:,})"}
        self._client.image(picture.transpose(2, 0, 1), win=name, env=self._env, opts=options)

    def _draw_settings(self, settings: Mapping[str, Any]) -> None:
        # visdom shows text as HTML, and a browser would run scripts in unescaped text.
        rows = (
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
            for name, value in sorted(settings.items())
        )
        table = f"<table border=1 cellpadding=2>{''.join(rows)}</table>"
        options = {"title": "Settings", "width": 410, "height": 420}
        self._client.text(table, win="settings", env=self._env, opts=options)


def _plot_options(
    title: str, x_axis: Mapping[str, Any], y_axis: Mapping[str, Any], **layout: object
) -> dict[str, Any]:
    """The options of visdom for a plot; visdom passes `layoutopts` on to plotly."""
    layout |= {
        "title": None,  # the bar of the pane shows the title
        "margin": {"l": 55, "r": 15, "t": 15, "b": 55},
        "xaxis": {"automargin": True, **x_axis},
        "yaxis": {"automargin": True, **y_axis},
    }
    return {"title": title, "width": 410, "height": 280, "layoutopts": {"plotly": layout}}
