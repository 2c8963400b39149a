"""Draws the figures of a run from its folder alone: inferred scenes, curves, an animation.

    python viz.py runs/RUN          draws the figures again
    python viz.py runs/RUN --gif    also draws learning.gif: the same scenes during training

The live page is in `air.visualization.dashboard`.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

try:
    import matplotlib as _  # noqa: F401
except ValueError:  # such as a notebook's backend, inherited by its shell, that is not installed
    os.environ |= {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        del sys.modules[name]  # the parts of the import that failed
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from air.storage.files import write_atomically
from air.storage.run_folder import RunFolder
from air.terminal.streams import steady_streams
from air.visualization.curves import BLUE, PANELS, History, Panel, shares
from air.visualization.drawing import overview, sheets
from air.visualization.snapshots import (
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
    scenes counted wrongly, `objects` the window and the object of each step, `scan` where the
    windows of each step lie, `scenes` eight scenes with their reconstructions, and `curves` the
    metrics. With a model of the background,
    `backgrounds` shows the inferred backgrounds. The curves have matplotlib's default style,
    whatever the user's matplotlibrc says: its fonts or its LaTeX may be missing.

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
    pictures = {**sheets(snapshot, 8, zoom), "scenes": overview(snapshot, zoom)}
    for name, picture in pictures.items():
        save = partial(
            Image.fromarray(picture).save, format="PNG", dpi=(DPI, DPI), compress_level=3
        )
        write_atomically(run.figures / f"{name}.png", save)
    with style.context(["default", {"font.size": 6.5}]):
        save_figure(run.figures / "curves.png", curves(History(run.read_metrics())))
    if gif:
        chosen = np.unique(np.linspace(0, len(paths) - 1, FRAMES).round().astype(int))
        save_animation(run.figures / "learning.gif", [load_snapshot(paths[i]) for i in chosen])


def save_figure(path: Path, figure: Figure) -> None:
    """Writes a figure as PNG, for printing at `DPI`."""
    figure.set_dpi(DPI)
    write_atomically(path, FigureCanvasAgg(figure).print_png)


def curves(history: History) -> Figure:
    """Draws all curves that have points, and the measures of the inferred counts; 180 mm wide."""
    plots: list[Callable[[Axes], None]] = [
        partial(_draw_panel, panel=panel, history=history)
        for panel in PANELS
        if history.shown(panel)
    ]
    for name, draw in (
        ("confusion", _draw_confusion),
        ("count_histogram", _draw_histogram),
        ("reliability", _draw_reliability),
    ):
        if name in history.latest:
            plots.append(partial(draw, measured=history.latest[name]))
    columns = 3
    rows = max(1, math.ceil(len(plots) / columns))
    figure = Figure((7.1, 2 * rows))
    figure.subplots_adjust(0.07, 0.18 / rows, 0.99, 1 - 0.1 / rows, wspace=0.3, hspace=0.42)
    for place, plot in enumerate(plots, start=1):
        plot(figure.add_subplot(rows, columns, place))
    return figure


def _draw_panel(axes: Axes, panel: Panel, history: History) -> None:
    drawn = []
    for curve in history.shown(panel):
        steps, values = history.points(curve.key)
        drawn.append(values)
        line = ":" if curve.style == "dotted" else "-"
        if curve.style == "points" or len(values) == 1:
            line += "o"
        last = next(iter(values[~np.isnan(values)][::-1]), math.nan)
        label, colour = f"{curve.label}: {last:.4g}", np.divide(curve.colour, 255)
        axes.plot(steps, values, line, color=colour, label=label, ms=1.8, lw=0.7)
    scale, limits = panel.y_axis(drawn)
    axes.set(yscale=scale, ylim=limits, xlim=(0, None), xlabel="step", ylabel=panel.unit)
    _decorate(axes, panel.title)
    axes.legend(title="last value", fontsize="x-small", title_fontsize="x-small")


def _decorate(axes: Axes, title: str) -> None:
    axes.set_title(title, size="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.93")


def _draw_confusion(axes: Axes, measured: Sequence[Sequence[int]]) -> None:
    scenes, fractions = np.array(measured), shares(measured)
    axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set(xticks=range(scenes.shape[1]), yticks=range(scenes.shape[0]))
    axes.set(xlabel="inferred count", ylabel="true count")
    axes.set_title("Held-out scenes", size="medium")
    size = min(7.0, 40 / scenes.shape[1])
    for (true, inferred), number in np.ndenumerate(scenes):
        ink = "white" if fractions[true, inferred] > 0.55 else "black"
        axes.text(inferred, true, f"{number:,}", color=ink, ha="center", va="center", size=size)


def _draw_histogram(axes: Axes, measured: Sequence[int]) -> None:
    axes.bar(range(len(measured)), measured, color=np.divide(BLUE, 255), width=0.6, zorder=2)
    axes.set(xticks=range(len(measured)), xlabel="inferred count", ylabel="held-out scenes")
    _decorate(axes, "Scenes by inferred count")


def _draw_reliability(axes: Axes, measured: Sequence[Sequence[float]]) -> None:
    """Draws accuracy against confidence, with Wilson's 95 % intervals: see `reliability`."""
    from scipy.stats import binomtest  # takes a second to import

    scenes, confidence, accuracy = np.array([each for each in measured if each[0]], float).T
    ends = [
        binomtest(round(n * fraction), int(n)).proportion_ci(method="wilson")
        for n, fraction in zip(scenes, accuracy, strict=True)
    ]
    axes.plot([0, 1], [0, 1], "--", color="0.6", lw=0.8, label="calibrated")
    axes.errorbar(
        confidence, accuracy, np.abs(np.transpose(ends) - accuracy), fmt="o",
        color=np.divide(BLUE, 255), ms=2, lw=0.7, label="scenes, 95 % interval",
    )  # fmt: skip
    axes.set(xlabel="confidence: greatest q(n)", ylabel="fraction counted right")
    _decorate(axes, "Reliability of the count")
    axes.legend(fontsize="x-small")


def save_animation(path: Path, snapshots: Sequence[Snapshot]) -> None:
    """Writes a GIF with one frame per snapshot: its `overview`."""
    zoom = max(1, 100 // snapshots[0].scenes.images.shape[-1])
    frames = [Image.fromarray(overview(snapshot, zoom)) for snapshot in snapshots]
    frames = [frame.quantize(dither=Image.Dither.NONE) for frame in frames]
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_MS]
    write_atomically(
        path,
        lambda file: frames[0].save(
            file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0
        ),
    )


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
