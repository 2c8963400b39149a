"""Draws the figures of a run from its folder alone: inferred scenes, curves, an animation.

    python viz.py runs/RUN          draws the figures again
    python viz.py runs/RUN --gif    also draws learning.gif: the same scenes during training

The live page is in `air.visualization.dashboard`.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from air.data.scenes import Array
from air.storage.files import write_atomically
from air.storage.run_folder import RunFolder
from air.terminal.streams import steady_streams
from air.visualization.curves import BLUE, PANELS, History, Panel
from air.visualization.drawing import (
    LABEL_COLOURS,
    STEP_COLOURS,
    Pictures,
    draw_scenes,
    enlarge,
    sheets,
    tile,
)
from air.visualization.snapshots import (
    InferredScenes,
    Snapshot,
    SnapshotError,
    load_snapshot,
    snapshot_files,
)

DPI = 300  # for printing
FRAMES = 40  # of an animation, at most
FRAME_MS, LAST_MS = 250, 3000  # duration of a frame, and of the last frame


def draw_run(run: RunFolder, gif: bool = False) -> None:
    """Draws all figures of a run; a figure that cannot be written leaves its old file as it was.

    `inputs`, `inferred`, `reconstructions` and `prior_samples` show up to 64 scenes, `errors` the
    scenes counted wrongly, `objects` the window and the object of each step, `scenes` eight scenes
    with their reconstructions, and `curves` the metrics. With a model of the background,
    `backgrounds` shows the inferred backgrounds. Figures have matplotlib's default style, whatever
    the user's matplotlibrc says: its fonts or its LaTeX may be missing.

    Args:
        run: The folder of the run.
        gif: Whether to draw ``learning.gif`` too.

    Raises:
        SnapshotError: If the run has no snapshot yet, or one cannot be read.
    """
    files = snapshot_files(run.snapshots)
    if not files:
        raise SnapshotError(f"{run.path} contains no snapshots; is it a run folder?")
    paths = list(files.values())
    snapshot = load_snapshot(paths[-1])
    run.figures.mkdir(exist_ok=True)
    zoom = max(1, 200 // snapshot.scenes.images.shape[-1])
    for name, sheet in sheets(snapshot, 8, zoom).items():
        save_picture(run.figures / f"{name}.png", sheet)
    with style.context("default"):
        save_figure(run.figures / "scenes.png", overview(snapshot.scenes.pick(slice(8))), dpi=100)
    with style.context(["default", {"font.size": 6.5}]):
        save_figure(run.figures / "curves.png", curves(History(run.read_metrics())), dpi=DPI)
    if gif:
        chosen = np.unique(np.linspace(0, len(paths) - 1, FRAMES).round().astype(int))
        save_animation(run.figures / "learning.gif", [load_snapshot(paths[i]) for i in chosen])


def save_picture(path: Path, picture: Pictures) -> None:
    """Writes an RGB picture [height, width, 3] as PNG, for printing at `DPI`."""
    image = Image.fromarray(picture)
    write_atomically(path, lambda file: image.save(file, "PNG", dpi=(DPI, DPI), compress_level=3))


def save_figure(path: Path, figure: Figure, dpi: int) -> None:
    """Writes a figure as PNG."""
    figure.set_dpi(dpi)
    write_atomically(path, FigureCanvasAgg(figure).print_png)


def overview(scenes: InferredScenes) -> Figure:
    """Draws rows of inputs, boxes and reconstructions, for display at half the size."""
    zoom = max(1, 200 // scenes.images.shape[-1])
    rows = [
        enlarge(scenes.images, zoom),
        draw_scenes(scenes, zoom),
        enlarge(scenes.reconstructions, zoom),
    ]
    sheet = tile(np.concatenate(rows), len(scenes.images))
    width, height = max(sheet.shape[1], 1000) + 62, sheet.shape[0] + 92
    figure = Figure((width / 100, height / 100), dpi=100)
    figure.figimage(sheet, 54, 8, origin="upper")
    for row, name in enumerate(("reconstruction", "inferred", "input")):
        centre = (20 / width, (8 + sheet.shape[0] * (2 * row + 1) / 6) / height)
        figure.text(*centre, name, size=17, rotation=90, va="center", ha="center")
    top = 1 - 42 / height
    figure.text(54 / width, top, "Attend, Infer, Repeat", size=22, weight="bold", va="center")
    used = STEP_COLOURS[: scenes.boxes.shape[1]]
    for t, colour in enumerate(used):
        x, name = 1 - (8 + 130 * (len(used) - 1 - t)) / width, f"\u25a0 step {t + 1}"
        figure.text(x, top, name, color=np.divide(colour, 255), size=17, va="center", ha="right")
    return figure


def curves(history: History) -> Figure:
    """Draws all curves that have points, and the measures of the inferred counts; 180 mm wide."""
    latest = history.latest
    plots: list[Callable[[Axes], None]] = [
        partial(_draw_panel, panel=panel, history=history)
        for panel in PANELS
        if history.shown(panel)
    ]
    if "confusion" in latest:
        plots.append(partial(_draw_confusion, matrix=latest["confusion"]))
    if "count_histogram" in latest:
        plots.append(partial(_draw_histogram, histogram=latest["count_histogram"]))
    if "reliability" in latest:
        plots.append(partial(_draw_reliability, bins=latest["reliability"]))
    columns = 3
    rows = max(1, math.ceil(len(plots) / columns))
    figure = Figure((7.1, 2 * rows))
    figure.subplots_adjust(0.07, 0.18 / rows, 0.99, 1 - 0.1 / rows, wspace=0.3, hspace=0.42)
    for axes, plot in zip_longest(np.ravel(figure.subplots(rows, columns)), plots):
        if plot:
            plot(axes)
        else:
            axes.set_visible(False)
    return figure


def _draw_panel(axes: Axes, panel: Panel, history: History) -> None:
    shown = []
    for curve in history.shown(panel):
        steps, values = history.points(curve.key)
        shown.append(values)
        line = ":" if curve.style == "dotted" else "-"
        if curve.style == "points" or len(values) == 1:
            line += "o"
        last = next((value for value in reversed(values) if value is not None), math.nan)
        label, colour = f"{curve.label}: {last:.4g}", np.divide(curve.colour, 255)
        axes.plot(steps, np.array(values, float), line, color=colour, label=label, ms=1.8, lw=0.7)
    scale, limits = panel.y_axis(shown)
    axes.set(yscale=scale, ylim=limits, xlim=(0, None), xlabel="step", ylabel=panel.unit)
    axes.set_title(panel.title, size="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.93")
    axes.legend(title="last value", fontsize="x-small", title_fontsize="x-small")


def _draw_confusion(axes: Axes, matrix: Sequence[Sequence[int]]) -> None:
    scenes = np.asarray(matrix, float)
    shares = scenes / np.maximum(scenes.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set(xticks=range(scenes.shape[1]), yticks=range(scenes.shape[0]))
    axes.set(xlabel="inferred count", ylabel="true count")
    axes.set_title("Held-out scenes", size="medium")
    size = min(7.0, 40 / scenes.shape[1])
    for (true, inferred), number in np.ndenumerate(scenes):
        ink = "white" if shares[true, inferred] > 0.55 else "black"
        axes.text(inferred, true, f"{number:,.0f}", color=ink, ha="center", va="center", size=size)


def _draw_histogram(axes: Axes, histogram: Sequence[int]) -> None:
    axes.bar(range(len(histogram)), histogram, color=np.divide(BLUE, 255), width=0.6)
    axes.set(xticks=range(len(histogram)), xlabel="inferred count", ylabel="held-out scenes")
    axes.set_title("Scenes by inferred count", size="medium")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_reliability(axes: Axes, bins: Sequence[Sequence[float]]) -> None:
    """Draws accuracy against confidence, with 95 % intervals: see `counting.reliability`."""
    scenes, confidence, accuracy = np.array([each for each in bins if each[0]], float).T
    axes.plot([0, 1], [0, 1], "--", color="0.6", lw=0.8, label="calibrated")
    errors = np.abs(_wilson(accuracy, scenes) - accuracy)
    axes.errorbar(
        confidence, accuracy, errors, fmt="o", color=np.divide(BLUE, 255), ms=2, lw=0.7,
        label="scenes, 95 % interval",
    )  # fmt: skip
    axes.set(xlabel="confidence: greatest q(n)", ylabel="fraction counted right")
    axes.set_title("Reliability of the count", size="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.93")
    axes.legend(fontsize="x-small")


def _wilson(fraction: Array, number: Array) -> Array:
    """The ends of Wilson's 95 % interval of fractions, [N], of numbers of scenes, [N]: [2, N]."""
    z = 1.96
    middle = (fraction + z**2 / (2 * number)) / (1 + z**2 / number)
    half = np.sqrt(fraction * (1 - fraction) / number + (z / (2 * number)) ** 2)
    half *= z / (1 + z**2 / number)
    return np.stack((middle - half, middle + half))


def save_animation(path: Path, snapshots: Sequence[Snapshot]) -> None:
    """Writes a GIF of the first eight scenes, with one frame per snapshot."""
    palette = Image.new("P", (1, 1))  # of all frames, with every colour of a box or label
    colours = np.linspace(0, 255, 128).round()[:, None].repeat(3, 1)
    if snapshots[0].scenes.images.ndim == 4:
        colours = np.linspace(0, 255, 6)[np.indices((6, 6, 6)).reshape(3, -1).T]
    palette.putpalette(
        np.concatenate((colours, STEP_COLOURS, LABEL_COLOURS)).astype(np.uint8).tobytes()
    )
    frames = [
        Image.fromarray(_frame(snapshot)).quantize(palette=palette, dither=Image.Dither.NONE)
        for snapshot in snapshots
    ]
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_MS]
    write_atomically(
        path,
        lambda file: frames[0].save(
            file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0
        ),
    )


def _frame(snapshot: Snapshot) -> Pictures:
    """Draws the number of the step, and below it scenes with boxes and their reconstructions."""
    scenes = snapshot.scenes.pick(slice(8))
    zoom = max(1, 100 // scenes.images.shape[-1])
    rows = [draw_scenes(scenes, zoom), enlarge(scenes.reconstructions, zoom)]
    sheet = tile(np.concatenate(rows), len(scenes.images))
    canvas = Image.new("RGB", (sheet.shape[1], sheet.shape[0] + 24), "white")
    canvas.paste(Image.fromarray(sheet), (0, 24))
    font = ImageFont.load_default(16)
    ImageDraw.Draw(canvas).text((4, 2), f"step {snapshot.step:,}", "black", font)
    return np.asarray(canvas)


def main(argv: Sequence[str] | None = None) -> int:
    """Draws the run named on the command line; returns the exit code."""
    with steady_streams():
        parser = argparse.ArgumentParser(description="Draw the figures of a run again.")
        parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
        parser.add_argument("--gif", action="store_true", help="also draw learning.gif")
        arguments = parser.parse_args(argv)
        run = RunFolder(arguments.run)
        try:
            draw_run(run, arguments.gif)
        except (ValueError, OSError) as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n")
        print(f"Figures are in {run.figures}.")
        return 0


if __name__ == "__main__":
    sys.exit(main())
