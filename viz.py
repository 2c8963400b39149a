"""Draws a run: pictures of what AIR infers, curves, and an animation of how it learns.

    python viz.py runs/RUN          draws the figures of a run again, from its folder alone
    python viz.py runs/RUN --gif    and learning.gif: the same scenes as they are understood better

Draws the snapshots and metrics of a run's folder; the live page is
`air.visualization.dashboard`.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from air.storage.checkpoint import write_atomically
from air.storage.run_folder import RunFolder
from air.visualization.curves import PANELS, History, Panel
from air.visualization.drawing import (
    LABEL_COLOURS,
    STEP_COLOURS,
    Pictures,
    draw_boxes,
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

DPI = 300  # of what is printed
FRAMES, FRAME_MS, LAST_MS = 40, 250, 3000  # the most frames of an animation, and how long they stay


def draw_run(run: RunFolder, gif: bool = False) -> None:
    """Draws all figures of a run, each replaced as a whole or not at all.

    `inputs`, `inferred`, `reconstructions` and `prior_samples` show up to 64 pictures, `errors`
    scenes counted wrongly, `objects` scenes taken apart step by step; `scenes` sets eight beside
    what is inferred in them; `curves` is of the whole run.

    Args:
        run: The run's folder.
        gif: Draw ``learning.gif`` too.

    Raises:
        SnapshotError: If the run has no snapshot yet, or one cannot be read.
    """
    files = snapshot_files(run.snapshots)
    if not files:
        raise SnapshotError(f"{run.path} holds no snapshots; is it the folder of a run?")
    snapshot = load_snapshot([*files.values()][-1])
    run.figures.mkdir(exist_ok=True)
    zoom = max(1, 200 // snapshot.scenes.images.shape[-1])
    for name, sheet in sheets(snapshot, 8, zoom).items():
        save_picture(run.figures / f"{name}.png", sheet)
    save_figure(run.figures / "scenes.png", overview(snapshot.scenes.pick(slice(8))), dpi=100)
    with rc_context({"font.size": 6.5}):
        save_figure(run.figures / "curves.png", curves(History(run.read_metrics())), dpi=DPI)
    if gif:
        chosen = np.unique(np.linspace(0, len(files) - 1, FRAMES).round().astype(int))
        paths = [[*files.values()][i] for i in chosen]
        save_animation(run.figures / "learning.gif", [load_snapshot(path) for path in paths])


def save_picture(path: Path, picture: Pictures) -> None:
    """Writes an RGB picture [height, width, 3] as PNG, to be printed at `DPI`."""
    image = Image.fromarray(picture)
    write_atomically(path, lambda file: image.save(file, "PNG", dpi=(DPI, DPI), compress_level=3))


def save_figure(path: Path, figure: Figure, dpi: int) -> None:
    """Writes a figure as PNG, whatever matplotlibrc says."""
    figure.set_dpi(dpi)
    write_atomically(path, FigureCanvasAgg(figure).print_png)


def overview(scenes: InferredScenes) -> Figure:
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


def curves(history: History) -> Figure:
    """All curves of a run that have points, its counts and its confusion matrix; 180 mm wide."""
    panels = [p for p in PANELS if any(history.points(c.key)[0] for c in p.curves)]
    latest = history.latest
    draw: list[Callable[[Axes], None]] = [_panel_drawer(panel, history) for panel in panels]
    if "confusion" in latest:
        draw.append(lambda axes: _draw_confusion(axes, latest["confusion"]))
    if "count_histogram" in latest:
        draw.append(lambda axes: _draw_histogram(axes, latest["count_histogram"]))
    columns = 3
    rows = max(1, -(-len(draw) // columns))
    figure = Figure((7.1, 2 * rows))
    figure.subplots_adjust(0.07, 0.18 / rows, 0.99, 1 - 0.1 / rows, wspace=0.3, hspace=0.42)
    for axes in np.ravel(figure.subplots(rows, columns)):
        if draw:
            draw.pop(0)(axes)
        else:
            axes.set_visible(False)
    return figure


def _panel_drawer(panel: Panel, history: History) -> Callable[[Axes], None]:
    return lambda axes: _draw_panel(axes, panel, history)


def _draw_panel(axes: Axes, panel: Panel, history: History) -> None:
    shown = []
    for curve in panel.curves:
        steps, values = history.points(curve.key)
        finite = [value for value in values if value is not None]
        if not finite:
            continue
        shown.append(values)
        few = curve.style == "points" or len(values) == 1
        line = {"line": "-", "points": "-", "dotted": ":"}[curve.style] + ("o" if few else "")
        label = f"{curve.label}: {finite[-1]:.4g}"
        axes.plot(
            steps, np.array(values, float), line, color=curve.colour, label=label, ms=1.8, lw=0.7
        )
    axes.set(xlabel="step", ylabel=panel.unit, xlim=(0, None))
    axes.set_title(panel.title, size="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.93")
    scale, limits = panel.y_axis(shown)
    axes.set(yscale=scale, ylim=limits)
    if shown:
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
    axes.bar(range(len(histogram)), histogram, color="#0072B2", width=0.6)
    axes.set(xticks=range(len(histogram)), xlabel="inferred count", ylabel="held-out scenes")
    axes.set_title("Scenes by inferred count", size="medium")
    axes.spines[["top", "right"]].set_visible(False)


def save_animation(path: Path, snapshots: Sequence[Snapshot]) -> None:
    """Writes a GIF of the first eight scenes at one snapshot after another."""
    palette = Image.new("P", (1, 1))  # the same for all, and with every colour that is drawn
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
    stay = [FRAME_MS] * (len(frames) - 1) + [LAST_MS]
    write_atomically(
        path,
        lambda file: frames[0].save(
            file, "GIF", save_all=True, append_images=frames[1:], duration=stay, loop=0
        ),
    )


def _frame(snapshot: Snapshot) -> Pictures:
    """Scenes with boxes over their reconstructions, under the number of the step."""
    scenes = snapshot.scenes.pick(slice(8))
    images, reconstructions, boxes, counts, true_counts = scenes
    zoom = max(1, 100 // images.shape[-1])
    inferred = draw_boxes(images, boxes, counts, zoom, true_counts)
    sheet = tile(np.concatenate((inferred, enlarge(reconstructions, zoom))), len(images))
    canvas = Image.new("RGB", (sheet.shape[1], sheet.shape[0] + 24), "white")
    canvas.paste(Image.fromarray(sheet), (0, 24))
    font = ImageFont.load_default(16)
    ImageDraw.Draw(canvas).text((4, 2), f"step {snapshot.step:,}", "black", font)
    return np.asarray(canvas)


def main(argv: Sequence[str] | None = None) -> int:
    """Draws the run that the command line names; returns the exit code."""
    parser = argparse.ArgumentParser(description="Draws the figures of a run again.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument("--gif", action="store_true", help="also draw learning.gif")
    arguments = parser.parse_args(argv)
    run = RunFolder(arguments.run)
    try:
        draw_run(run, arguments.gif)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"Pictures and curves are in {run.figures}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
