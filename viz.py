"""Pictures of what AIR infers: boxes on scenes, PNG figures, and a live visdom dashboard.

Draws NumPy arrays and computes no geometry. A box is (x0, y0, x1, y1) in pixels, x to the right, y
down, pixel i reaching from i to i + 1. Only `Dashboard` imports visdom. M counts samples.
"""

import logging
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Array = NDArray[Any]
Pictures = NDArray[np.uint8]  # [N, height, width, 3], or one picture without the N
Record = Mapping[str, Any]  # one line of metrics.jsonl

STEP_COLOURS = (  # of steps 1, 2, 3: red, green, blue as in Pyro's pictures, bright on black
    (255, 60, 60), (40, 220, 70), (80, 140, 255), (255, 215, 40), (235, 90, 235), (50, 220, 230)
)  # fmt: skip
_GREY, _ORANGE = (170, 170, 170), (255, 190, 90)  # a written count, a wrong one
_GAP, _GAP_COLOUR = 4, 235  # between tiled pictures
_PATIENCE, _RETRY = 1.5, 30.0  # seconds to wait for visdom's answer, and after a failure


class InferredScenes(NamedTuple):
    """Scenes beside what was inferred in them."""

    images: Array  # [N, H, H] floats in [0, 1], or uint8
    reconstructions: Array  # [N, H, H] floats, above 1 where objects add
    boxes: Array  # [N, T, 4], may lie outside the image
    counts: Array  # [N] steps in use: later boxes are not drawn
    true_counts: Array | None = None  # [N]

    def pick(self, index: slice | Array) -> "InferredScenes":
        return InferredScenes._make(None if field is None else field[index] for field in self)


def enlarge(images: Array, zoom: int = 4) -> Pictures:
    """Turn images [N, H, W] into RGB pictures of sharp squares; floats are clipped to [0, 1]."""
    if images.dtype != np.uint8:
        images = (np.clip(np.nan_to_num(images), 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return np.stack([images.repeat(zoom, axis=1).repeat(zoom, axis=2)] * 3, axis=-1)


def draw_boxes(
    images: Array, boxes: Array, counts: Array, zoom: int = 4, true_counts: Array | None = None
) -> Pictures:
    """Enlarge images [N, H, W], outline the objects in use in `STEP_COLOURS`, write the counts.

    Lines lie just inside their box at the enlarged resolution. Corners may come in any order, what
    is outside the image is cut off, and a box with NaN or infinity is left out.
    """
    pictures = enlarge(images, zoom)
    truth = counts if true_counts is None else true_counts
    for picture, outlines, count, true in zip(pictures, boxes, counts, truth, strict=True):
        canvas = Image.fromarray(picture)
        draw = ImageDraw.Draw(canvas)
        for step, box in enumerate(outlines[: max(int(count), 0)]):
            # Edges far outside move to where they are still invisible but small integers.
            corners = np.floor(np.clip(zoom * box.astype(float), -9, max(picture.shape) + 9) + 0.5)
            (x0, y0), (x1, y1) = np.sort(corners.reshape(2, 2), axis=0) - [[0, 0], [1, 1]]
            if np.isfinite(box).all() and x0 <= x1 and y0 <= y1:
                line = 1 + int(min(zoom, x1 - x0, y1 - y0) > 2)
                draw.rectangle((x0, y0, x1, y1), None, STEP_COLOURS[step % len(STEP_COLOURS)], line)
        size = max(picture.shape[0] // 8, 10)
        text, colour = (f"{count}", _GREY) if count == true else (f"{count}, not {true}", _ORANGE)
        draw.text((size // 3, 0), text, colour, ImageFont.load_default(size))
        picture[:] = np.asarray(canvas)
    return pictures


def tile(pictures: Pictures, columns: int) -> Pictures:
    """Lay pictures [N, h, w, 3] out in rows with light gaps, as one picture [height, width, 3]."""
    count, height, width, _ = pictures.shape
    columns = max(1, min(columns, count))
    rows = max(1, math.ceil(count / columns))  # no pictures make one blank cell
    cells = np.full((rows * columns, height + _GAP, width + _GAP, 3), _GAP_COLOUR, np.uint8)
    cells[:count, :height, :width] = pictures
    grid = cells.reshape(rows, columns, height + _GAP, width + _GAP, 3).swapaxes(1, 2)
    return grid.reshape(rows * (height + _GAP), columns * (width + _GAP), 3)[:-_GAP, :-_GAP]


def save_scene_figures(
    folder: Path, scenes: InferredScenes, samples: Array, sample_boxes: Array, sample_counts: Array
) -> None:
    """Write PNG files into `folder`, made if missing; each is replaced as a whole or not at all.

    `inputs`, `inferred`, `reconstructions` and `prior_samples` show up to 64 pictures; `scenes`
    sets eight scenes, those that are not empty first, beside what is inferred in them.
    `samples` [M, H, H] come with `sample_boxes` [M, T, 4] and `sample_counts` [M].
    """
    images, reconstructions, boxes, counts, true_counts = scenes.pick(slice(64))
    sheets = {
        "inputs": enlarge(images),
        "inferred": draw_boxes(images, boxes, counts, true_counts=true_counts),
        "reconstructions": enlarge(reconstructions),
        "prior_samples": draw_boxes(samples[:64], sample_boxes[:64], sample_counts[:64]),
    }
    for name, pictures in sheets.items():
        _save(Path(folder, f"{name}.png"), Image.fromarray(tile(pictures, 8)).save)
    eight = scenes.pick(np.argsort(~scenes.images.any((1, 2)), kind="stable")[:8])
    _save(Path(folder, "scenes.png"), FigureCanvasAgg(_overview(eight)).print_png)


def _save(path: Path, write: Callable[..., object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _overview(scenes: InferredScenes) -> Figure:
    """Rows of inputs, boxes and reconstructions, meant to be shown at half its size."""
    images, reconstructions, boxes, counts, true_counts = scenes
    zoom = max(1, 200 // images.shape[-1])
    inferred = draw_boxes(images, boxes, counts, zoom, true_counts)
    rows = [enlarge(images, zoom), inferred, enlarge(reconstructions, zoom)]
    sheet = tile(np.concatenate(rows), len(images))
    width, height = max(sheet.shape[1], 1000) + 62, sheet.shape[0] + 92
    figure = Figure((width / 100, height / 100), dpi=100)
    figure.figimage(sheet, 54, 8, origin="upper")
    for row, name in enumerate(("reconstruction", "inferred", "input")):
        centre = (20 / width, (8 + sheet.shape[0] * (2 * row + 1) / 6) / height)
        figure.text(*centre, name, size=17, rotation=90, va="center", ha="center")
    top = 1 - 42 / height
    figure.text(54 / width, top, "Attend, Infer, Repeat", size=22, weight="bold", va="center")
    used = STEP_COLOURS[: boxes.shape[1]]
    for t, colour in enumerate(used):
        x, name = 1 - (8 + 130 * (len(used) - 1 - t)) / width, f"\u25a0 step {t + 1}"
        figure.text(x, top, name, color=np.divide(colour, 255), size=17, va="center", ha="right")
    return figure


_PANELS = {
    "elbo": {"title": "ELBO (higher is better)", "ylabel": "nats per image"},
    "accuracy": {"title": "Held-out count accuracy", "ylabel": "scenes counted right (%)"},
}
_CURVES = {  # key in a record -> panel, label, colour of Okabe and Ito's colour-blind-safe set
    "elbo": ("elbo", "training batches", "#56B4E9"),
    "eval_elbo": ("elbo", "held-out scenes", "#D55E00"),
    "empty_elbo": ("elbo", "empty canvas", "#777777"),
    "accuracy_mode": ("accuracy", "most probable count", "#0072B2"),
    "accuracy_sample": ("accuracy", "sampled count", "#E69F00"),
}


def _points(records: Sequence[Record], key: str) -> dict[float, float | None]:
    """{step: value}, accuracies in percent; None, a gap in the curve, for what is not finite."""
    scale = 100.0 if key.startswith("accuracy") else 1.0
    found = {float(r["step"]): scale * float(r[key]) for r in records if r.get(key) is not None}
    return {step: value if math.isfinite(value) else None for step, value in found.items()}


def save_curves(path: Path, records: Sequence[Record]) -> None:
    """Draw the records of metrics.jsonl as a PNG file: ELBO, count accuracy, confusion matrix.

    Beside its `step` a record may hold `elbo`, `eval_elbo`, `empty_elbo` (nats per image),
    `accuracy_mode`, `accuracy_sample` (fractions) and `confusion` (true x inferred), or None.
    """
    figure = Figure((12, 3.8), dpi=150, layout="constrained")
    elbo, accuracy, axes = figure.subplots(1, 3, width_ratios=[5, 5, 4])
    _draw_panel(elbo, records, "elbo")
    _draw_panel(accuracy, records, "accuracy")
    axes.set(title="Last confusion matrix (scenes)", xlabel="inferred count", ylabel="true count")
    matrices = [r["confusion"] for r in records if r.get("confusion") is not None]
    matrix = np.asarray(matrices[-1] if matrices else [[0]], float)
    axes.set_visible(bool(matrices))
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set(xticks=range(matrix.shape[1]), yticks=range(matrix.shape[0]))
    size = min(10.0, 70 / matrix.shape[1])
    for (true, inferred), scenes in np.ndenumerate(matrix):
        ink = "white" if shares[true, inferred] > 0.55 else "black"
        axes.text(inferred, true, f"{scenes:,.0f}", color=ink, ha="center", va="center", size=size)
    _save(path, FigureCanvasAgg(figure).print_png)


def _draw_panel(axes: Axes, records: Sequence[Record], panel: str) -> None:
    drawn: list[Array] = []
    for key, (place, label, colour) in _CURVES.items():
        points = _points(records, key) if place == panel else {}
        values = np.array([*points.values()], float)
        finite = values[np.isfinite(values)]
        if finite.size:
            line = {"elbo": "-", "empty_elbo": ":"}.get(key, "o-") if finite.size > 1 else "o"
            label = f"{label}: {finite[-1]:.1f}"
            axes.plot([*points], values, line, color=colour, label=label, markersize=4, lw=0.9)
            drawn.append(finite)
    axes.set(xlabel="step", xlim=(0, None), ylim=(0, 102), **_PANELS[panel])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.93")
    if drawn:
        axes.legend(loc="lower right", title="last value", fontsize="small")
    if drawn and panel == "elbo":  # the first steps, far below, shall not flatten the rest
        low = min(np.percentile(np.concatenate(drawn), 4), *(finite[-1] for finite in drawn))
        high = max(finite.max() for finite in drawn)
        axes.set_ylim(1.05 * low - 0.05 * high - 1, 1.05 * high - 0.05 * low + 1)


class Dashboard:
    """Plots on a visdom server, in windows that are made once and then updated in place.

    A server that fails later on costs one warning and about 3 s in every 30 s; it never raises.
    Curves are kept here and sent whole, so they survive a restart of the server.

    Raises:
        ConnectionError: No server answers.
        ModuleNotFoundError: visdom is not installed.
    """

    def __init__(self, env: str, server: str = "http://localhost", port: int = 8097) -> None:
        self._address, self._retry_at = f"{server}:{port}", 0.0
        self._curves: dict[str, dict[float, float | None]] = {key: {} for key in _CURVES}
        logging.getLogger("visdom").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from visdom import Visdom

            class Client(Visdom):
                session: Any

                def _handle_post(self, url: str, data: str | None = None) -> str:
                    self.session.trust_env = not re.match(r"https?://(localhost|127\.|\[::1)", url)
                    response = self.session.post(url, data=data, timeout=_PATIENCE)
                    response.raise_for_status()
                    return str(response.text)

            try:  # visdom would split the name of an environment at a slash
                env = re.sub(r"[^\w.-]", "_", env)
                self._client = Client(
                    server, port=port, env=env, raise_exceptions=True, use_incoming_socket=False
                )
            except ConnectionError:
                what = f"no visdom server answers at {self._address}; start one with:"
                raise ConnectionError(f"{what} python -m visdom.server -port {port}") from None

    def curves(self, records: Sequence[Record]) -> None:
        """Add records (see `save_curves`) to windows `elbo` and `accuracy`, thinned if many."""
        for key, points in self._curves.items():
            ordered = sorted((points | _points(records, key)).items())
            self._curves[key] = dict(ordered[:: -max(1, len(ordered) // 1000)][::-1])
        for panel in _PANELS:
            self._try(self._draw_curves, panel)

    def scenes(self, scenes: InferredScenes) -> None:
        """Show the first scenes in the windows `inferred` and `reconstructions`."""
        self._try(self._show, "inferred", scenes)
        self._try(self._show, "reconstructions", scenes._replace(images=scenes.reconstructions))

    def samples(self, samples: Array, boxes: Array, counts: Array) -> None:
        """Show scenes [M, H, H] drawn from the prior with their boxes in the window `samples`."""
        self._try(self._show, "samples", InferredScenes(samples, samples, boxes, counts))

    def errors(self, scenes: InferredScenes) -> None:
        """Show the wrongly counted ones of these scenes in the window `errors`."""
        if scenes.true_counts is not None:
            bad = scenes.pick(scenes.counts != scenes.true_counts)
            self._try(self._show, "errors", bad, f"errors: {len(bad.counts)} of {len(scenes[0])}")

    def _show(self, win: str, scenes: InferredScenes, title: str = "") -> None:
        images, _, boxes, counts, true_counts = scenes.pick(slice(16))
        zoom = max(1, 150 // images.shape[-1])
        sheet = tile(draw_boxes(images, boxes, counts, zoom, true_counts), 4)
        self._client.image(sheet.transpose(2, 0, 1), win=win, opts={"title": title or win})

    def _draw_curves(self, panel: str) -> None:
        traces = [  # the page's smoothing reads marker.line
            {"x": [*self._curves[key]], "y": [*self._curves[key].values()], "name": label}
            | {"type": "scatter", "line": {"color": colour}, "marker": {"line": {}}}
            | {"mode": "lines" if key == "elbo" else "lines+markers"}
            for key, (place, label, colour) in _CURVES.items()
            if place == panel
        ]
        opts, unit = {"title": _PANELS[panel]["title"]}, {"text": _PANELS[panel]["ylabel"]}
        layout = {"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": unit}}
        self._client._send({"data": traces, "win": panel, "layout": layout, "opts": opts})

    def _try(self, draw: Callable[..., None], *arguments: object) -> None:
        try:
            if time.monotonic() >= self._retry_at:
                draw(*arguments)
                self._retry_at = 0.0
        except Exception as error:
            if not self._retry_at:
                logging.getLogger("air").warning("no plots: visdom at %s: %s", self._address, error)
            self._retry_at = time.monotonic() + _RETRY
