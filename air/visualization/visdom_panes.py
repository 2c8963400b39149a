"""The panes of the live page: a run's curves, pictures, counts and settings, sent to visdom.

Each pane has a fixed name, under which a later drawing replaces it. Every pane is drawn from the
beginning, before it has anything to show, so that no pane moves later.
"""

import html
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from air.visualization.curves import PANELS, History, Panel, Record
from air.visualization.drawing import sheets
from air.visualization.snapshots import Snapshot

PICTURES = {  # names and titles
    "inferred": "Held-out scenes with the inferred boxes and counts",
    "reconstructions": "Reconstructions of the same scenes",
    "objects": "The window of each step, the probability that the step is used, and its object",
    "prior_samples": "Samples from the prior; all counts equally likely unless the prior is learnt",
    "errors": "Scenes counted wrongly in the last evaluation, and still now",
    "backgrounds": "Backgrounds of the same scenes",
}
_ROWS, _COLUMNS, _OBJECT_ROWS = 2, 8, 5  # of scenes in a picture, and in the picture of objects
ON_PAGE = _ROWS * _COLUMNS  # scenes that a picture shows
_SCENE_SIDE = 100  # pixels, about
_PLOT = {"width": 410, "height": 330, "marginright": 20, "marginbottom": 45}
_WIDE = {**_PLOT, "width": 551}  # three are as wide as two pictures or four narrow plots


def draw_page(
    client: Any,  # noqa: ANN401  # of visdom
    env: str,
    records: Iterable[Record],
    snapshot: Snapshot,
    settings: Mapping[str, Any],
) -> None:
    """Draws every pane in the visdom environment `env`.

    The accuracy and the confusion matrix are left out if the true counts are unknown.
    """
    history, panels = History(records), {panel.name: panel for panel in PANELS}
    has_truth = snapshot.scenes.true_counts is not None
    for name in ("elbo", "kl", "accuracy") if has_truth else ("elbo", "kl"):
        _draw_curves(client, env, panels[name], history, _WIDE)
    zoom = max(1, _SCENE_SIDE // snapshot.scenes.images.shape[-1])
    pictures = sheets(snapshot, _COLUMNS, zoom, _ROWS, _OBJECT_ROWS)
    for name, title in PICTURES.items():
        if name == "errors":  # beside the picture before
            _draw_counts(client, env, history.latest, has_truth)
        if name in pictures:
            options = {"title": f"{title} (step {snapshot.step:,})"}
            client.image(pictures[name].transpose(2, 0, 1), win=name, env=env, opts=options)
    for name in ("grad_norm", "rates", "speed"):
        _draw_curves(client, env, panels[name], history, _PLOT)
    # visdom shows text as HTML, and a browser would run scripts in unescaped text.
    rows = (
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in sorted(settings.items())
    )
    table = f"<table border=1 cellpadding=2>{''.join(rows)}</table>"
    client.text(table, win="settings", env=env, opts={"title": "Settings", **_PLOT})


def _draw_curves(
    client: Any,  # noqa: ANN401
    env: str,
    panel: Panel,
    history: History,
    size: Mapping[str, int],
) -> None:
    """Draws the curves that have points; visdom refuses a plot without points."""
    curves = history.shown(panel) or panel.curves[:1]
    points = [history.points(curve.key) for curve in curves]
    # visdom wants columns of the same length; it sends null for NaN, which a browser leaves out.
    longest = max(1, *(len(steps) for steps, _ in points))
    x, y = np.full((2, longest, len(curves)), np.nan)
    for column, (steps, values) in enumerate(points):
        x[: len(steps), column] = steps
        y[: len(steps), column] = values
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
    client.line(y, x, win=panel.name, env=env, opts={**options, **size})


def _draw_counts(client: Any, env: str, latest: Record, has_truth: bool) -> None:  # noqa: ANN401
    """Draws the number of scenes with each inferred count, and the confusion matrix."""
    scenes = np.array(latest.get("count_histogram", [0, 0]))
    options = {"title": "Held-out scenes by inferred count", "xlabel": "objects", **_PLOT}
    client.bar(scenes, np.arange(len(scenes)), win="counts", env=env, opts=options)
    if not has_truth:
        return
    matrix = np.array(latest.get("confusion", [[0, 0]]))
    shares = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    options = {
        "title": "Inferred counts (% of a true count)",
        "xlabel": "inferred count", "xtickstep": 1, "ylabel": "true count", "ytickstep": 1,
        "xmin": 0, "xmax": 100, "colormap": "Reds",
    }  # fmt: skip
    client.heatmap(shares, win="confusion", env=env, opts={**options, **_PLOT})
