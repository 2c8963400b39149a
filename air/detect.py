"""Finds the objects in images with a trained AIR.

    python -m air.detect --load runs/RUN/checkpoint.pt pictures/ > found.jsonl
    python -m air.detect --load runs/RUN/checkpoint.pt a.png b.npz --csv a.csv --figure a.png

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
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
from air.data.scenes import Array, DataError
from air.data.survey import brightness_hints
from air.data.user_images.picture_files import SUFFIXES
from air.data.user_images.preparation import ImageSettings, Placement
from air.data.user_images.sources import (
    PreparedImage,
    find_files,
    read_images,
)
from air.evaluation.boxes import tight_boxes
from air.inference import infer
from air.priors import at_least_probs
from air.storage.checkpoint import load_air, read_weights
from air.storage.files import check_output_file, write_atomically
from air.support.fields import from_config
from air.support.images import to_tensor
from air.support.model_settings import NetFactory
from air.terminal.signals import exit_code, interrupt_on_signals
from air.terminal.streams import steady_streams
from air.visualization.drawing import draw_boxes, enlarge, tile
from air.visualization.snapshots import as_bytes

__all__ = ["DetectedObject", "Detection", "detect", "load_air", "main"]

BATCH = 100  # images in memory
MAX_DRAWN, COLUMNS = 64, 8  # images in a figure, and in a row of it
CSV_COLUMNS = [
    "image", "count", "probability", "step", "object_probability", "x0", "y0", "x1", "y1",
    "window_x0", "window_y0", "window_x1", "window_y1",
]  # fmt: skip


@dataclass(frozen=True)
class DetectedObject:
    """An object in an image."""

    step: int  # of the guide, from 1
    probability: float  # q(count >= step)
    box: list[float]  # (x0, y0, x1, y1) in pixels, tight around the painted object
    window: list[float]  # (x0, y0, x1, y1) in pixels, the attention window; may leave the image
    cut: bool = False  # whether the box reaches the border of the prepared image, with its padding
    z_what: list[float] | None = None  # its code, if asked for


@dataclass(frozen=True)
class Detection:
    """The objects in an image."""

    count: int  # the most probable count
    probability: float  # q(count)
    objects: list[DetectedObject]  # `count` objects

    def record(self) -> dict[str, Any]:
        """The detection as JSON has it, without codes that were not asked for."""
        record = asdict(self)
        for each in record["objects"]:
            if each["z_what"] is None:
                del each["z_what"]
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
                )
                for t in range(count)
            ]
            detections.append(Detection(count, probs[i], objects))
    return detections


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


def write_crops(folder: Path, image: PreparedImage, detection: Detection) -> None:
    """Writes each object of an image, cut out along its box, as FOLDER/NAME-STEP.png."""
    name = re.sub(r"[^\w.-]+", "-", image.name).strip("-.")
    height = image.pixels.shape[-2]
    for each in detection.objects:
        x0, y0, x1, y1 = (min(max(round(edge), 0), height) for edge in each.box)
        if x0 < x1 and y0 < y1:
            crop = image.pixels[..., y0:y1, x0:x1]
            picture = Image.fromarray(crop if crop.ndim == 2 else crop.transpose(1, 2, 0))
            picture.save(folder / f"{name}-{each.step}.png")


def read_sources(
    paths: Sequence[Path], settings: ImageSettings, report: Callable[[DataError], None]
) -> Iterator[PreparedImage]:
    """Yields the images of all sources, and reports sources that cannot be read.

    Shows a progress bar on a terminal.
    """
    sources: list[Path] = []
    for path in paths:
        try:
            sources += find_files(path)
        except DataError as error:
            report(error)
    are_pictures = all(source.suffix.lower() in SUFFIXES for source in sources)
    total = len(sources) if are_pictures else None
    with tqdm(total=total, unit="image", disable=None) as bar:
        for source in sources:
            try:
                for image in read_images(source, settings):
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
    for flag, output in (("--figure", args.figure), ("--csv", args.csv)):
        if output:
            check_output_file(flag, output)
    air = load_air(args.load, pick_device(args.device), nets)
    if args.crops:
        if args.crops.exists():
            raise ValueError(f"--crops: expected a new folder, and {args.crops} exists")
        args.crops.mkdir(parents=True)
    unreadable: list[DataError] = []

    def report(error: DataError) -> None:
        unreadable.append(error)
        tqdm.write(f"{prog}: error: {' '.join(str(error).splitlines())}", file=sys.stderr)

    images = read_sources(args.images, image_settings(args, air), report)
    shown: list[tuple[Array, Detection]] = []
    rows: list[list[Any]] = []
    batches = iter(lambda: list(islice(images, BATCH)), [])
    for number, batch in enumerate(batches):
        pixels = np.stack([image.pixels for image in batch])
        on_black = air.background is None
        for hint in brightness_hints(pixels, on_black) if number == 0 else ():
            logging.getLogger("air").warning(hint)
        found = detect(air, pixels, args.refine, args.codes)
        for image, detection in zip(batch, found, strict=True):
            if args.drop_cut:
                detection = detection.without_cut()
            if args.crops:
                write_crops(args.crops, image, detection)
            if args.figure and len(shown) < MAX_DRAWN:
                shown.append((image.pixels, detection))
            original = detection.in_original(image.placement)
            print(json.dumps({"image": image.name} | original.record()), flush=True)
            if args.csv:
                rows += csv_rows(image.name, original)
    if rows:
        write_csv(args.csv, rows)
    if shown:
        draw(air, np.stack([pixels for pixels, _ in shown]), [d for _, d in shown], args.figure)
    return 2 if unreadable else 0


def image_settings(args: argparse.Namespace, air: AIR) -> ImageSettings:
    """How to prepare images: as for the training of the model, unless flags say otherwise."""
    _, config = read_weights(args.load)
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
    parser.add_argument("--load", type=Path, required=True, metavar="FILE", help="a checkpoint.pt")
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
        logging.basicConfig(format="%(levelname)s: %(message)s")
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
