"""Pictures of scenes with what was inferred in them, as arrays of RGB bytes; sharp, never blurred.

Computes no geometry. A box is (x0, y0, x1, y1) in pixels, x to the right, y down, pixel i reaching
from i to i + 1.
"""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from air.visualization.snapshots import Array, InferredScenes, Snapshot

Pictures = NDArray[np.uint8]  # [N, height, width, 3], or one picture without the N

STEP_COLOURS = (  # of steps 1, 2, 3: red, green, blue as in Pyro's pictures, bright on black
    (255, 60, 60), (40, 220, 70), (80, 140, 255), (255, 215, 40), (235, 90, 235), (50, 220, 230)
)  # fmt: skip
LABEL_COLOURS = (170, 170, 170), (255, 190, 90)  # a count, a wrong one
_GAP, _GAP_COLOUR = 4, 235  # between tiled pictures
_UNUSED = 0.35  # of its brightness is left of what a step sees and paints that is not in use


def enlarge(images: Array, zoom: int = 4) -> Pictures:
    """Turn bytes [N, (C,) H, W] into RGB pictures of sharp squares.

    Three channels are red, green and blue; of any other number the mean is shown in grey.
    """
    if images.ndim == 3:
        images = images[:, None]
    if images.shape[1] != 3:
        images = images.mean(1, keepdims=True).astype(np.uint8).repeat(3, axis=1)
    return images.repeat(zoom, axis=2).repeat(zoom, axis=3).transpose(0, 2, 3, 1).copy()


def draw_boxes(
    images: Array, boxes: Array, counts: Array, zoom: int = 4, true_counts: Array | None = None
) -> Pictures:
    """Enlarge images [N, (C,) H, W], outline the objects in use, write the counts.

    Outlines have `STEP_COLOURS` and lie just inside their box at the enlarged resolution. Corners
    may come in any order, what is outside the image is cut off, and a box with NaN or infinity is
    left out.
    """
    pictures = enlarge(images, zoom)
    truth = counts if true_counts is None else true_counts
    for picture, outlines, count, true in zip(pictures, boxes, counts, truth, strict=True):
        canvas = Image.fromarray(picture)
        draw = ImageDraw.Draw(canvas)
        for step, box in enumerate(outlines[: max(int(count), 0)]):
            _outline(draw, picture.shape, box, step, zoom)
        text = f"{count}" if count == true else f"{count}, not {true}"
        _write(canvas, text, LABEL_COLOURS[int(count != true)])
        picture[:] = np.asarray(canvas)
    return pictures


def _outline(
    draw: ImageDraw.ImageDraw, shape: tuple[int, ...], box: Array, step: int, zoom: int
) -> None:
    # Edges far outside move to where they are still invisible but small integers.
    corners = np.floor(np.clip(zoom * box.astype(float), -9, max(shape) + 9) + 0.5)
    (x0, y0), (x1, y1) = np.sort(corners.reshape(2, 2), axis=0) - [[0, 0], [1, 1]]
    if np.isfinite(box).all() and x0 <= x1 and y0 <= y1:
        width = 1 + int(min(zoom, x1 - x0, y1 - y0) > 2)
        draw.rectangle((x0, y0, x1, y1), None, STEP_COLOURS[step % len(STEP_COLOURS)], width)


def _write(canvas: Image.Image, text: str, colour: tuple[int, int, int]) -> None:
    size = max(canvas.height // 8, 10)
    ImageDraw.Draw(canvas).text((size // 3, 0), text, colour, ImageFont.load_default(size))


def tile(pictures: Pictures, columns: int, rows: int | None = None) -> Pictures:
    """Lay pictures [N, h, w, 3] out with light gaps, as one picture [height, width, 3].

    Args:
        pictures: To lay out, line by line.
        columns: In a row, at the most.
        rows: Make room for so many full rows, and leave out what they do not hold; None for as
            many as there are, of which no pictures make one blank cell.
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


def sheets(
    snapshot: Snapshot,
    columns: int,
    zoom: int,
    rows: int | None = None,
    decomposed_rows: int | None = None,
) -> dict[str, Pictures]:
    """The pictures of a snapshot, each as one sheet [height, width, 3], by name.

    Args:
        snapshot: What to draw.
        columns: Scenes side by side.
        zoom: PixelLikelihood of a sheet for one of a scene.
        rows: As for `tile`.
        decomposed_rows: Rows of `object_sheet`; None for all.
    """

    def inferred(scenes: InferredScenes) -> Pictures:
        images, _, boxes, counts, true_counts = scenes
        return tile(draw_boxes(images, boxes, counts, zoom, true_counts), columns, rows)

    number = None if rows is None else rows * columns  # of the scenes that need be drawn
    scenes, errors, samples = (
        part.pick(slice(number)) for part in (snapshot.scenes, snapshot.errors, snapshot.samples)
    )
    return {
        "inputs": tile(enlarge(scenes.images, zoom), columns, rows),
        "inferred": inferred(scenes),
        "reconstructions": tile(enlarge(scenes.reconstructions, zoom), columns, rows),
        "objects": object_sheet(snapshot, zoom, decomposed_rows),
        "prior_samples": inferred(samples),
        "errors": inferred(errors),
    }


def object_sheet(snapshot: Snapshot, zoom: int, number: int | None = None) -> Pictures:
    """Scenes taken apart, one a row: the scene, what each step attends to and paints, their sum.

    Over what a step attends to stands the probability that it is in use, q(n >= t); the box of
    what it paints is its window. Steps that are not in use are dark. No `number` means all scenes.
    """
    seen_all, objects = snapshot.windows[:number], snapshot.objects[:number]
    (number, steps), side = seen_all.shape[:2], seen_all.shape[-1]
    scenes = snapshot.scenes.pick(slice(number))
    height = zoom * scenes.images.shape[-1]
    nearest = np.arange(height) * side // height
    columns = [draw_boxes(scenes.images, scenes.boxes, scenes.counts, zoom, scenes.true_counts)]
    for t in range(steps):
        used = np.where(t < scenes.counts, 1.0, _UNUSED)
        used = used.reshape(number, *[1] * (seen_all.ndim - 2))
        seen = enlarge((seen_all[:, t] * used).astype(np.uint8)[..., nearest, :][..., nearest], 1)
        painted = enlarge((objects[:, t] * used).astype(np.uint8), zoom)
        for i in range(number):
            _annotate(seen[i], f"{snapshot.presence[i, t]:.0%}", t)
            if t < scenes.counts[i]:
                canvas = Image.fromarray(painted[i])
                _outline(ImageDraw.Draw(canvas), painted[i].shape, scenes.boxes[i, t], t, zoom)
                painted[i] = np.asarray(canvas)
        columns += [seen, painted]
    columns.append(enlarge(scenes.reconstructions, zoom))
    sheet = tile(np.stack(columns, 1).reshape(-1, height, height, 3), len(columns))
    heads = [f"{t + 1} {what}" for t in range(steps) for what in ("sees", "paints")]
    return np.concatenate((_header(["scene", *heads, "sum"], sheet.shape[1]), sheet))


def _header(names: list[str], width: int) -> Pictures:
    """Names over the columns of a sheet so wide."""
    cell = width / len(names)
    size = max(int(cell / 7), 8)
    canvas = Image.new("RGB", (width, 2 * size), "white")
    for i, name in enumerate(names):
        place = (int((i + 0.5) * cell), size)
        ImageDraw.Draw(canvas).text(place, name, "black", ImageFont.load_default(size), anchor="mm")
    return np.asarray(canvas)


def _annotate(picture: Pictures, text: str, step: int) -> None:
    canvas = Image.fromarray(picture)
    _write(canvas, text, STEP_COLOURS[step % len(STEP_COLOURS)])
    picture[:] = np.asarray(canvas)
