"""Finds the objects in images with a trained AIR.

    python -m air.detect --load digits pictures/ > found.jsonl
    python -m air.detect --load runs/RUN/checkpoint.pt a.png b.npz --csv a.csv --figure a.png
    python -m air.detect --load runs/RUN/checkpoint.pt large.jpg --tile 100 > found.jsonl

Images come from any source that `air.data.user_images.sources` reads. They are prepared as for the
training of the model; boxes are in pixels of the original image. Prints a line with a JSON object
for each image.
"""

import argparse
import csv
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from air.air import AIR
from air.cli.device import pick_device
from air.cli.flags import Parser
from air.cli.recipe import unlike_training
from air.data.scenes import Array, DataError
from air.data.survey import brightness_hints
from air.data.user_images.picture_files import is_picture
from air.data.user_images.preparation import ImageSettings, Placement, convert_channels, to_bytes
from air.data.user_images.sources import (
    PreparedImage,
    find_files,
    prepare_image,
    read_images,
    source_images,
)
from air.data.user_images.tiles import best_views, cut_tiles
from air.evaluation.boxes import tight_boxes
from air.inference import infer
from air.priors import at_least_probs
from air.storage.checkpoint import load_air, read_weights
from air.storage.files import check_output_file, write_atomically
from air.storage.pretrained import explain, names
from air.support.checks import check_whole
from air.support.fields import from_config
from air.support.images import to_tensor
from air.support.model_settings import NetFactory
from air.terminal.signals import exit_code, interrupt_on_signals
from air.terminal.streams import steady_streams
from air.visualization.drawing import draw_boxes, enlarge, tile
from air.visualization.snapshots import as_bytes

__all__ = ["DetectedObject", "Detection", "detect", "detect_in_tiles", "load_air", "main"]

BATCH = 100  # images in memory
MAX_NAME = 150  # characters of an image's name in that of its crops
MAX_DRAWN, COLUMNS = 64, 8  # images in a figure, and in a row of it
MAX_TILED = 4  # pictures in a figure, each as large as it is
CSV_COLUMNS = [
    "image", "count", "probability", "step", "object_probability", "x0", "y0", "x1", "y1",
    "window_x0", "window_y0", "window_x1", "window_y1",
]  # fmt: skip


@dataclass(frozen=True)
class DetectedObject:
    """An object in an image."""

    step: int  # of the guide, from 1; in a picture of several tiles, the number of the object
    probability: float  # q(count >= step)
    box: list[float]  # (x0, y0, x1, y1) in pixels, tight around the painted object
    window: list[float]  # (x0, y0, x1, y1) in pixels, the attention window; may leave the image
    # Whether the box reaches the border of the prepared image, with its padding; with tiles, see
    # `detect_in_tiles`.
    cut: bool = False
    z_what: list[float] | None = None  # its code, if asked for
    solid: dict[str, Any] | None = None  # its kind and pose, from a model with a renderer


@dataclass(frozen=True)
class Detection:
    """The objects in an image."""

    count: int  # the most probable count
    probability: float | None  # q(count); None for a picture of several tiles
    objects: list[DetectedObject]  # `count` objects

    def record(self, codes: bool = True) -> dict[str, Any]:
        """The detection as JSON has it, without codes and solids that are not there."""
        record = asdict(self)
        for each in record["objects"]:
            if each["z_what"] is None or not codes:
                del each["z_what"]
            if each["solid"] is None:
                del each["solid"]
        return record

    def without_cut(self) -> "Detection":
        """Only the objects that lie within the image; `probability` is that of all."""
        whole = [each for each in self.objects if not each.cut]
        return replace(self, count=len(whole), objects=whole)

    def in_original(self, placement: Placement) -> "Detection":
        """The detection with boxes in pixels of the image before it was prepared."""
        to_original = placement.to_original
        objects = [
            replace(each, box=to_original(each.box), window=to_original(each.window))
            for each in self.objects
        ]
        return replace(self, objects=objects)


def detect(
    air: AIR, images: Tensor | Array, refine: bool = False, codes: bool = False
) -> list[Detection]:
    """Finds the objects in images, [N, (C,) H, H], floats in [0, 1] or uint8, on any device.

    With `refine`, latents are fitted to images that the guide explains badly, and two windows on
    one object are merged (see `infer`). With `codes`, each object has its z_what.
    """
    images = to_tensor(images)
    detections = []
    for batch in torch.split(images, 500) if len(images) else ():
        inference = infer(air, batch, refine)
        reached = at_least_probs(inference.count_probs).tolist()
        boxes = tight_boxes(inference.changes).tolist()
        windows = inference.boxes.tolist()
        probs = inference.count_probs.amax(1).tolist()
        z_what = inference.z_what.tolist()
        for i, count in enumerate(inference.counts.tolist()):
            objects = [
                DetectedObject(
                    step=t + 1,
                    probability=reached[i][t],
                    box=(box := boxes[i][t]),
                    window=windows[i][t],
                    cut=min(box) <= 0 or max(box) >= air.x_size,
                    z_what=z_what[i][t] if codes else None,
                    solid=air.describe(inference.z_where[i, t], inference.z_what[i, t]) or None,
                )
                for t in range(count)
            ]
            detections.append(Detection(count, probs[i], objects))
    return detections


def detect_in_tiles(
    find: Callable[[Array], list[Detection]],
    image: Array,
    side: int,
    settings: ImageSettings,
    name: str = "the picture",
) -> Detection:
    """Finds the objects in a picture that shows more than a training image did.

    The picture is cut into overlapping tiles, and each object is taken from the tile that shows it
    best. Objects that are larger than half a tile may be found in parts.

    Args:
        find: As `partial(detect, air)`: finds the objects in images, uint8 [N, (C,) H, H].
        image: The picture, [(C,) h, w], of a type that `prepare` takes.
        side: The side of a tile in pixels: that of the square that one training image showed.
        settings: How to prepare a tile, which is never cropped. A picture that is no larger than a
            tile is prepared as it would be without tiles.
        name: The name of the picture in messages.

    Returns:
        The objects, with boxes in pixels of the picture. `cut` are those that the border of the
        picture cuts, or that no tile shows whole. Objects that change no pixel are left out. The
        probability is None, unless there is one tile: tiles that overlap count the same objects,
        so that their q(count) say nothing of the sum.

    Raises:
        ValueError: If `side` is not a whole number of at least 1.
        DataError: If the picture cannot be prepared.
    """
    check_whole("side", side, 1)
    settings = replace(settings, crop=False)
    image = image if image.ndim == 3 else image[None]
    tiles = cut_tiles(image.shape[1], image.shape[2], side)
    found: list[Detection] = []
    for start in range(0, len(tiles), BATCH):
        batch = [
            (x0, y0, prepare_image(name, image[:, y0:y1, x0:x1], settings))
            for x0, y0, x1, y1 in tiles[start : start + BATCH]
        ]
        detections = find(np.stack([part.pixels for *_, part in batch]))
        for (x0, y0, part), detection in zip(batch, detections, strict=True):
            (x, y), scale = part.placement
            found.append(detection.in_original(Placement((x0 + x, y0 + y), scale)))
    if len(tiles) == 1:
        return found[0]
    height, width = image.shape[1:]
    views = [
        (n, each)
        for n, detection in enumerate(found)
        for each in detection.objects
        if max(each.box[0], 0) < min(each.box[2], width)  # neither empty nor in the padding
        and max(each.box[1], 0) < min(each.box[3], height)
    ]
    boxes = np.array([each.box for _, each in views]).reshape(-1, 4)
    best = best_views(boxes, np.array(tiles), np.array([n for n, _ in views], int))
    objects = [replace(views[i][1], step=k, cut=cut) for k, (i, cut) in enumerate(best, 1)]
    return Detection(len(objects), None, objects)


def draw(air: AIR, images: Array, detections: Sequence[Detection], path: Path) -> None:
    """Draws images, uint8 [N, (C,) H, H], with windows and counts, as PNG.

    The reconstruction of an image is drawn below the image.
    """
    counts = np.array([detection.count for detection in detections])
    boxes = np.full((len(detections), max(counts.max(), 1), 4), np.nan)
    for i, detection in enumerate(detections):
        for t, each in enumerate(detection.objects):
            boxes[i, t] = each.window
    zoom, columns = max(1, 200 // images.shape[-1]), min(COLUMNS, len(images))
    pictures = draw_boxes(images, boxes, counts, zoom)
    painted = enlarge(as_bytes(infer(air, images).reconstructions), zoom)
    gap = np.full_like(painted[:, :4], 255)
    pictures = np.concatenate((pictures, gap, painted), axis=1)
    sheet = Image.fromarray(tile(pictures, columns))
    write_atomically(path, lambda file: sheet.save(file, "PNG"))


def draw_tiled(images: Sequence[Array], detections: Sequence[Detection], path: Path) -> None:
    """Draws pictures, uint8 [(C,) h, w], one below the other, with windows and counts, as PNG."""
    pictures = []
    for image, detection in zip(images, detections, strict=True):
        above = max(image.shape[-2] // 7, 12)  # room for the count
        pixels = np.pad(image, [*[(0, 0)] * (image.ndim - 2), (above, 0), (0, 0)])
        windows = np.array([each.window for each in detection.objects]).reshape(1, -1, 4)
        windows[..., 1::2] += above
        zoom = max(1, 200 // max(pixels.shape))
        pictures += [*draw_boxes(pixels[None], windows, np.array([detection.count]), zoom)]
    width = max(picture.shape[1] for picture in pictures)
    padded = [np.pad(p, [(0, 4), (0, width - p.shape[1]), (0, 0)]) for p in pictures]
    sheet = Image.fromarray(np.concatenate(padded))
    write_atomically(path, lambda file: sheet.save(file, "PNG"))


def crop(image: Array, box: Sequence[float]) -> Array | None:
    """The pixels of an image [(C,) h, w] in a box; None if there are none."""
    height, width = image.shape[-2:]
    x0, x1 = (min(max(round(edge), 0), width) for edge in box[::2])
    y0, y1 = (min(max(round(edge), 0), height) for edge in box[1::2])
    return image[..., y0:y1, x0:x1] if x0 < x1 and y0 < y1 else None


def write_crops(folder: Path, image: PreparedImage, detection: Detection) -> None:
    """Writes each object of an image, cut out along its box, as FOLDER/NAME-STEP.png.

    The name of the image is that of its path, or the end of it; a number is added if it is taken.
    """
    name = path_name = re.sub(r"[^\w.-]+", "-", image.name)[-MAX_NAME:].strip("-.")
    number = 1
    while any((folder / f"{name}-{each.step}.png").exists() for each in detection.objects):
        number += 1
        name = f"{path_name}_{number}"
    for each in detection.objects:
        pixels = crop(image.pixels, each.box)
        if pixels is not None:
            picture = Image.fromarray(pixels if pixels.ndim == 2 else pixels.transpose(1, 2, 0))
            picture.save(folder / f"{name}-{each.step}.png")


def read_whole(source: Path, settings: ImageSettings) -> Iterator[PreparedImage]:
    """Reads the images of a source in the colours for the model, but in their own size."""
    for name, image in source_images(source, settings):
        (pixels,) = convert_channels(to_bytes(image[None], name), settings, name)
        pixels = pixels if len(pixels) > 1 else pixels[0]
        yield PreparedImage(name, ~pixels if settings.invert else pixels, Placement())


def read_sources(
    paths: Sequence[Path],
    read: Callable[[Path], Iterator[PreparedImage]],
    report: Callable[[DataError], None],
) -> Iterator[PreparedImage]:
    """Yields the images that `read` finds in all sources; reports sources that cannot be read.

    Shows a progress bar on a terminal.
    """
    sources: list[Path] = []
    for path in paths:
        try:
            sources += find_files(path)
        except DataError as error:
            report(error)
    are_pictures = all(map(is_picture, sources))
    total = len(sources) if are_pictures else None
    with tqdm(total=total, unit="image", disable=None) as bar:
        for source in sources:
            try:
                for image in read(source):
                    yield image
                    bar.update()
            except DataError as error:
                report(error)


def csv_rows(name: str, detection: Detection) -> list[list[Any]]:
    """The rows of an image: one for each object, or one without an object."""
    start = [name, detection.count, detection.probability]
    rows = [
        [*start, each.step, each.probability, *each.box, *each.window] for each in detection.objects
    ]
    return rows or [start + [""] * (len(CSV_COLUMNS) - len(start))]


def write_csv(path: Path, rows: list[list[Any]]) -> None:
    """Writes a table with a header."""

    def write(temporary: Path) -> None:
        # A file name may contain bytes that are not text.
        with temporary.open("w", encoding="utf-8", errors="replace", newline="") as file:
            csv.writer(file).writerows([CSV_COLUMNS, *rows])

    write_atomically(path, write)


def run(args: argparse.Namespace, prog: str, nets: NetFactory | None) -> int:
    """Detects and writes; returns the exit code."""
    if args.tile is not None:
        check_whole("--tile", args.tile, 1)
        if args.crop:
            raise ValueError("--crop cannot be used with --tile, which looks at all of a picture")
    outputs = {"--figure": args.figure, "--csv": args.csv, "--kinds": args.kinds}
    for flag, output in outputs.items():
        if output:
            check_output_file(flag, output)
    if line := explain(args.load):
        print(line, file=sys.stderr)
    air = load_air(args.load, pick_device(args.device), nets)
    if (args.tile or args.crop) and air.renderer != "none":
        flag = "--tile" if args.tile else "--crop"
        raise ValueError(
            f"{flag}: the camera of this model sees the whole picture, which must not be cut"
        )
    if args.crops:
        if args.crops.exists():
            raise ValueError(f"--crops: expected a new folder, and {args.crops} exists")
        args.crops.mkdir(parents=True)
    unreadable: list[DataError] = []

    def report(error: DataError) -> None:
        unreadable.append(error)
        tqdm.write(f"{prog}: error: {' '.join(str(error).splitlines())}", file=sys.stderr)

    _, config = read_weights(args.load)
    settings = image_settings(args, air, config)
    read = partial(read_whole if args.tile else read_images, settings=settings)
    images = read_sources(args.images, read, report)
    find = partial(detect, air, refine=args.refine, codes=args.codes or args.kinds is not None)
    shown: list[tuple[Array, Detection]] = []
    rows: list[list[Any]] = []
    crops: list[tuple[Array, list[float]]] = []  # and their codes
    batches = iter(lambda: list(islice(images, 1 if args.tile else BATCH)), [])
    for number, batch in enumerate(batches):
        stack = np.stack([image.pixels for image in batch])
        if number == 0 and stack.any():
            found_hints = brightness_hints(stack, air.background is None and air.renderer == "none")
            # A picture to be cut into tiles shows more than a training image did.
            found_hints += [] if args.tile else unlike_training(stack, config)
            padded = any(image.placement.offset != (0, 0) for image in batch)
            if padded and air.renderer != "none":
                found_hints.append(
                    "pictures that are not square are padded, but the camera of the model sees a "
                    "square"
                )
            for hint in found_hints:
                logging.getLogger("air").warning(hint)
        if args.tile:
            whole = ~stack[0] if settings.invert else stack[0]  # a tile is inverted later
            found = [detect_in_tiles(find, whole, args.tile, settings, batch[0].name)]
        else:
            found = find(stack)
        for image, detection in zip(batch, found, strict=True):
            if args.drop_cut:
                detection = detection.without_cut()
            if args.crops:
                write_crops(args.crops, image, detection)
            for each in detection.objects if args.kinds else ():
                pixels = crop(image.pixels, each.box)
                if pixels is not None and each.z_what is not None:
                    crops.append((pixels, each.z_what))
            if args.figure and len(shown) < (MAX_TILED if args.tile else MAX_DRAWN):
                shown.append((image.pixels, detection))
            original = detection.in_original(image.placement)
            print(json.dumps({"image": image.name} | original.record(args.codes)), flush=True)
            if args.csv:
                rows += csv_rows(image.name, original)
    if rows:
        write_csv(args.csv, rows)
    if crops:
        from air.visualization.kinds import draw_kinds  # for a flag that is seldom given

        drawn, z_what = zip(*crops, strict=True)
        kinds = Image.fromarray(draw_kinds(drawn, np.array(z_what)))
        write_atomically(args.kinds, lambda file: kinds.save(file, "PNG"))
    if shown and args.tile:
        draw_tiled([pixels for pixels, _ in shown], [d for _, d in shown], args.figure)
    elif shown:
        draw(air, np.stack([pixels for pixels, _ in shown]), [d for _, d in shown], args.figure)
    return 2 if unreadable else 0


def image_settings(args: argparse.Namespace, air: AIR, config: Mapping[str, Any]) -> ImageSettings:
    """How to prepare images: as for the training of the model, unless flags say otherwise."""
    given = {key: getattr(args, key) for key in ("crop", "invert", "alpha_over")}
    asked = {key: value for key, value in given.items() if value is not None}
    sizes = {"x_size": air.x_size, "channels": air.channels, "count_pattern": None}
    return from_config(ImageSettings, {**config, **asked, **sizes})


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="air.detect", description="Finds the objects in images.")
    parser.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGES",
        help="a picture, a folder of pictures, or a .npz, .npy, .h5 or .pt file",
    )  # fmt: skip
    parser.add_argument(
        "--load", type=Path, required=True, metavar="FILE",
        help=f"a checkpoint.pt, or the name of a pretrained model: {', '.join(names())}",
    )  # fmt: skip
    parser.add_argument(
        "--tile",
        type=int,
        metavar="SIDE",
        help="for large pictures: cut each picture into overlapping squares of SIDE x SIDE pixels, "
        "find the objects in every square, and report each object once. SIDE is the side, in "
        "pixels of the picture, of the square that one training image showed. Objects should be "
        "no larger than half of it",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write a new CSV file")
    parser.add_argument(
        "--figure", type=Path, metavar="FILE", help="draw the objects in a new PNG file"
    )
    parser.add_argument(
        "--refine",
        action="store_true",
        help="fit latents to images that the guide explains badly, and merge two windows on one "
        "object",
    )
    parser.add_argument(
        "--drop-cut", action="store_true", help="leave out objects that the border cuts"
    )
    parser.add_argument("--codes", action="store_true", help="also print z_what of each object")
    parser.add_argument(
        "--crops", type=Path, metavar="DIR", help="write each object as a PNG file to a new folder"
    )
    parser.add_argument(
        "--kinds",
        type=Path,
        metavar="FILE",
        help="draw a sheet of all objects, grouped by z_what with the k-means algorithm, in a new "
        "PNG file: one kind in a row, with the number of objects, the most typical ones first",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... or mps")
    as_trained = "(default: as for training)"
    parser.add_argument(
        "--crop",
        action=argparse.BooleanOptionalAction,
        help=f"crop images of another size to their centre; --no-crop resizes them {as_trained}",
    )
    parser.add_argument(
        "--invert", action=argparse.BooleanOptionalAction, help=f"invert brightness {as_trained}"
    )
    parser.add_argument(
        "--alpha-over",
        choices=("black", "white"),
        help=f"colour behind transparent pixels {as_trained}",
    )
    return parser


def main(argv: Sequence[str] | None = None, nets: NetFactory | None = None) -> int:
    """Runs the command line; returns the exit code.

    Unreadable images are reported and skipped; the exit code is then 2.

    Args:
        argv: The words of the command line; None for those of this process.
        nets: The nets that the model was trained with, if they are not the default nets; see `AIR`.
    """
    with steady_streams(stdout_may_fail=True), interrupt_on_signals():
        parser = build_parser()
        args = parser.parse_args(argv)
        try:
            return run(args, parser.prog, nets)
        except BrokenPipeError:  # the reader of the lines has seen enough
            return 128 + 13  # as if by SIGPIPE
        except (ValueError, OSError) as error:
            parser.error(str(error))
        except KeyboardInterrupt as interrupt:
            parser.exit(exit_code(interrupt), f"{parser.prog}: interrupted\n")


if __name__ == "__main__":
    sys.exit(main())
