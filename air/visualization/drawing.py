"""Pictures of scenes with the inferred boxes and counts, as arrays of RGB bytes.

A box is (x0, y0, x1, y1) in pixels. x points to the right and y down; pixel i reaches from i to
i + 1.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from air.data.scenes import Array
from air.visualization.snapshots import InferredScenes, Snapshot

Pictures = NDArray[np.uint8]  # [N, height, width, 3], or one picture without the N

STEP_COLOURS = (  # red, green and blue first, as in Pyro's pictures; all are bright on black
    (255, 60, 60), (40, 220, 70), (80, 140, 255), (255, 215, 40), (235, 90, 235), (50, 220, 230)
)  # fmt: skip
LABEL_COLOURS = (170, 170, 170), (255, 190, 90)  # of a count, and of a wrong count
_GAP, _GAP_COLOUR = 4, 235  # between tiled pictures
_UNUSED = 0.35  # brightness of what an unused step sees and paints


def enlarge(images: Array, zoom: int = 4) -> Pictures:
    """Enlarges images of bytes, [N, (C,) H, W]; each pixel becomes a sharp square.

    Three channels are red, green and blue. The mean of any other number of channels is drawn in
    grey.
    """
    if images.ndim == 3:
        images = images[:, None]
    if images.shape[1] != 3:
        images = images.mean(1, keepdims=True).astype(np.uint8).repeat(3, axis=1)
    return images.repeat(zoom, axis=2).repeat(zoom, axis=3).transpose(0, 2, 3, 1).copy()


def draw_boxes(
    images: Array, boxes: Array, counts: Array, zoom: int = 4, true_counts: Array | None = None
) -> Pictures:
    """Enlarges images [N, (C,) H, W], outlines the first `counts` boxes, and writes the counts.

    Outlines have `STEP_COLOURS` and lie just inside the box. The corners of a box may come in any
    order; a box with NaN or infinity is not drawn. A count that is not the true count is written
    with the true count.
    """
    pictures = enlarge(images, zoom)
    truth = counts if true_counts is None else true_counts
    for picture, outlines, count, true in zip(pictures, boxes, counts, truth, strict=True):
        text = f"{count}" if count == true else f"{count}, not {true}"
        used = dict(enumerate(outlines[: max(int(count), 0)]))
        _annotate(picture, used, zoom, text, LABEL_COLOURS[int(count != true)])
    return pictures


def _annotate(
    picture: Pictures,
    boxes: Mapping[int, Array],
    zoom: int,
    text: str = "",
    colour: tuple[int, int, int] = LABEL_COLOURS[0],
) -> None:
    """Outlines the boxes of steps, and writes a text, in the picture itself."""
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    for step, box in boxes.items():
        # Edges far outside the picture move nearer, because Pillow needs small numbers.
        corners = np.floor(np.clip(zoom * box.astype(float), -9, max(canvas.size) + 9) + 0.5)
        (x0, y0), (x1, y1) = np.sort(corners.reshape(2, 2), axis=0) - [[0, 0], [1, 1]]
        if np.isfinite(box).all() and x0 <= x1 and y0 <= y1:
            width = 1 + int(min(zoom, x1 - x0, y1 - y0) > 2)
            draw.rectangle((x0, y0, x1, y1), None, _step_colour(step), width)
    size = max(canvas.height // 8, 10)
    # Outlined, so that it can be read on any background.
    font = ImageFont.load_default(size)
    draw.text((size // 3, 0), text, colour, font, stroke_width=1, stroke_fill=(0, 0, 0))
    picture[:] = np.asarray(canvas)


def _step_colour(step: int) -> tuple[int, int, int]:
    return STEP_COLOURS[step % len(STEP_COLOURS)]


def tile(pictures: Pictures, columns: int, rows: int | None = None) -> Pictures:
    """Lays out pictures [N, h, w, 3] row by row with gaps, as one picture [height, width, 3].

    Args:
        pictures: May be empty: the result is then one blank cell, or `rows` blank rows.
        columns: Pictures in a row, at most.
        rows: The sheet has this number of full rows, and leaves out further pictures; None for as
            many rows as are needed.
    """
    if rows is None:
        columns = max(1, min(columns, len(pictures)))
        rows = max(1, math.ceil(len(pictures) / columns))
    pictures = pictures[: rows * columns]
    count, height, width, _ = pictures.shape
    cells = np.full((rows * columns, height + _GAP, width + _GAP, 3), _GAP_COLOUR, np.uint8)
    cells[:count, :height, :width] = pictures
    grid = cells.reshape(rows, columns, height + _GAP, width + _GAP, 3).swapaxes(1, 2)
    return grid.reshape(rows * (height + _GAP), columns * (width + _GAP), 3)[:-_GAP, :-_GAP]


def draw_scenes(scenes: InferredScenes, zoom: int) -> Pictures:
    """Draws scenes as `draw_boxes` does."""
    return draw_boxes(scenes.images, scenes.boxes, scenes.counts, zoom, scenes.true_counts)


def sheets(
    snapshot: Snapshot,
    columns: int,
    zoom: int,
    rows: int | None = None,
    object_rows: int | None = None,
) -> dict[str, Pictures]:
    """Draws the pictures of a snapshot by name, each as one sheet [height, width, 3].

    Args:
        snapshot: Its pictures.
        columns: Scenes side by side.
        zoom: Pixels of a sheet per pixel of a scene.
        rows: As for `tile`.
        object_rows: As `rows` of `object_sheet`.
    """
    shown = slice(None if rows is None else rows * columns)
    scenes = snapshot.scenes.pick(shown)
    pictures = {
        "inputs": enlarge(scenes.images, zoom),
        "inferred": draw_scenes(scenes, zoom),
        "reconstructions": enlarge(scenes.reconstructions, zoom),
        "prior_samples": draw_scenes(snapshot.samples.pick(shown), zoom),
        "errors": draw_scenes(snapshot.errors.pick(shown), zoom),
    }
    if scenes.backgrounds is not None:
        pictures["backgrounds"] = enlarge(scenes.backgrounds, zoom)
    drawn = {name: tile(picture, columns, rows) for name, picture in pictures.items()}
    # As wide as the other sheets.
    drawn["scan"] = scan_map(snapshot.scenes, max(zoom * columns // scenes.boxes.shape[1], 1))
    return {**drawn, "objects": object_sheet(snapshot, zoom, object_rows)}


def scan_map(scenes: InferredScenes, zoom: int) -> Pictures:
    """Draws where each step looks: the share of scenes whose window covers a pixel, per step.

    The brightest pixel is the most covered one of the step, and the number is that of the scenes
    which use the step. Figure 4 of the paper shows such maps.
    """
    side = scenes.images.shape[-1]
    centres, maps = np.arange(side) + 0.5, []
    for t in range(scenes.boxes.shape[1]):
        boxes = scenes.boxes[scenes.counts > t, t].astype(float)
        edges = np.sort(boxes.reshape(-1, 2, 2), axis=1)[..., None]  # [n, start or end, x or y, 1]
        columns, rows = ((edges[:, 0] <= centres) & (centres < edges[:, 1])).swapaxes(0, 1) * 1.0
        covered = np.einsum("ny,nx->yx", rows, columns)
        shade = covered / max(covered.max(), 1.0)
        picture = (shade[..., None] * _step_colour(t)).astype(np.uint8)
        picture = picture.repeat(zoom, axis=0).repeat(zoom, axis=1)
        _annotate(picture, {}, zoom, f"{len(boxes)}")
        maps.append(picture)
    titles = [f"step {t}" for t in range(1, len(maps) + 1)]
    return caption(tile(np.stack(maps), len(maps)), titles, max(zoom * side // 7, 8))


def object_sheet(snapshot: Snapshot, zoom: int, rows: int | None = None) -> Pictures:
    """Draws one scene a row: the scene, what each step sees and paints, the reconstruction.

    With a model of the background, the inferred background comes second.

    The number on what a step sees is the probability q(n >= t) that the step is used. What a step
    paints has the outline of its box. Both are dark if the step is not used.

    Args:
        snapshot: Its windows and objects.
        zoom: Pixels of the sheet per pixel of a scene.
        rows: The number of scenes; None for all that have windows.
    """
    windows, objects = snapshot.windows[:rows], snapshot.objects[:rows]
    num_scenes, num_steps, *_, window_side = windows.shape
    scenes = snapshot.scenes.pick(slice(num_scenes))
    side = zoom * scenes.images.shape[-1]
    nearest = np.arange(side) * window_side // side  # the window's pixel at each drawn pixel
    columns = {"scene": draw_scenes(scenes, zoom)}
    if scenes.backgrounds is not None:
        columns["background"] = enlarge(scenes.backgrounds, zoom)
    for t in range(num_steps):
        seen = enlarge(windows[:, t], 1)[:, nearest][:, :, nearest]
        painted = enlarge(objects[:, t], zoom)
        for i, used in enumerate(t < scenes.counts):
            if not used:
                seen[i], painted[i] = _UNUSED * seen[i], _UNUSED * painted[i]
            _annotate(seen[i], {}, zoom, f"{snapshot.presence[i, t]:.0%}", _step_colour(t))
            _annotate(painted[i], {t: scenes.boxes[i, t]} if used else {}, zoom)
        columns |= {f"{t + 1} sees": seen, f"{t + 1} paints": painted}
    columns["sum"] = enlarge(scenes.reconstructions, zoom)
    cells = np.stack(list(columns.values()), axis=1).reshape(-1, side, side, 3)
    return caption(tile(cells, len(columns)), list(columns), max(side // 7, 8))


def overview(snapshot: Snapshot, zoom: int) -> Pictures:
    """Draws the first eight scenes in three rows: input, inferred objects, reconstruction."""
    scenes = snapshot.scenes.pick(slice(8))
    rows = [
        enlarge(scenes.images, zoom),
        draw_scenes(scenes, zoom),
        enlarge(scenes.reconstructions, zoom),
    ]
    sheet = tile(np.concatenate(rows), len(scenes.images))
    title = f"step {snapshot.step:,}: input, inferred objects, reconstruction"
    return caption(sheet, [title], max(zoom * scenes.images.shape[-1] // 7, 8))


def caption(sheet: Pictures, titles: Sequence[str], size: int) -> Pictures:
    """Writes titles of `size` pixels above a sheet, each in the middle of its column."""
    height, width, _ = sheet.shape
    canvas = Image.new("RGB", (width, height + 2 * size), "white")
    canvas.paste(Image.fromarray(sheet), (0, 2 * size))
    draw = ImageDraw.Draw(canvas)
    for i, title in enumerate(titles):
        place = (int((i + 0.5) * width / len(titles)), size)
        draw.text(place, title, "black", ImageFont.load_default(size), anchor="mm")
    return np.asarray(canvas)
