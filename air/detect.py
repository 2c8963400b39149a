"""Finds the objects in images with a trained AIR.

    python -m air.detect --load runs/RUN/checkpoint.pt a.png b.png scenes.npz > found.json
    python -m air.detect --load runs/RUN/checkpoint.pt a.png --figure found.png

Images are files of the size and channels that the model was trained on, grey or RGB, or the array
x, uint8 [N, (C,) H, H], of an .npz file. Prints a JSON list with one object for each image.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from air.air import AIR
from air.cli.device import pick_device
from air.cli.flags import Parser
from air.data.pictures import read_pictures
from air.evaluation.boxes import tight_boxes
from air.inference import infer
from air.model_settings import NetFactory
from air.priors import at_least_probs
from air.storage.checkpoint import load_air
from air.storage.files import check_unpacked_size, write_atomically
from air.visualization.drawing import draw_boxes, tile

__all__ = ["DetectedObject", "Detection", "detect", "load_air", "main"]

MAX_DRAWN = 64  # images in a figure


@dataclass(frozen=True)
class DetectedObject:
    """An object in an image."""

    step: int  # of the guide, from 1
    probability: float  # q(count >= step)
    box: list[float]  # (x0, y0, x1, y1) in pixels, tight around the painted object
    window: list[float]  # (x0, y0, x1, y1) in pixels, the attention window; may leave the image


@dataclass(frozen=True)
class Detection:
    """The objects in an image."""

    count: int  # the most probable count
    probability: float  # q(count)
    objects: list[DetectedObject]  # `count` objects


def detect(air: AIR, images: Tensor) -> list[Detection]:
    """Finds the objects in images, [N, (C,) H, H], floats in [0, 1] or uint8, on any device."""
    detections = []
    for batch in torch.split(images, 500):
        inference = infer(air, batch.to(air.h_init.device))
        painted = inference.objects.amax(-3) if air.channels > 1 else inference.objects
        reached = at_least_probs(inference.count_probs).tolist()
        boxes = tight_boxes(painted).tolist()
        windows = inference.boxes.tolist()
        probs = inference.count_probs.amax(1).tolist()
        for i, count in enumerate(inference.counts.tolist()):
            objects = [
                DetectedObject(t + 1, reached[i][t], boxes[i][t], windows[i][t])
                for t in range(count)
            ]
            detections.append(Detection(count, probs[i], objects))
    return detections


def read_images(paths: Sequence[Path], air: AIR) -> tuple[list[str], Tensor]:
    """Reads image files and .npz files: a name for each image, and all images in one tensor."""
    names = []
    images = []
    for path in paths:
        check_unpacked_size(path)
        for name, image in read_pictures(path, air.x_size, air.channels):
            names.append(name)
            images.append(torch.from_numpy(image))
    return names, torch.stack(images)


def draw(images: Tensor, detections: Sequence[Detection], path: Path) -> None:
    """Draws the first `MAX_DRAWN` images, uint8 [N, (C,) H, H], with windows and counts, as PNG."""
    shown = detections[:MAX_DRAWN]
    pixels = images[:MAX_DRAWN].numpy()
    counts = np.array([detection.count for detection in shown])
    boxes = np.full((len(shown), max(counts.max(), 1), 4), np.nan)
    for i, detection in enumerate(shown):
        for t, each in enumerate(detection.objects):
            boxes[i, t] = each.window
    zoom = max(1, 200 // pixels.shape[-1])
    sheet = Image.fromarray(tile(draw_boxes(pixels, boxes, counts, zoom), 8))
    write_atomically(path, lambda file: sheet.save(file, "PNG"))


def main(argv: Sequence[str] | None = None, nets: NetFactory | None = None) -> int:
    """Runs the command line; returns the exit code.

    Args:
        argv: The words of the command line; None for those of this process.
        nets: The nets that the model was trained with, if they are not the default nets; see `AIR`.
    """
    parser = Parser(prog="air.detect", description="Finds the objects in images.")
    parser.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="an image file or an .npz file"
    )
    parser.add_argument("--load", type=Path, required=True, metavar="FILE", help="a checkpoint.pt")
    parser.add_argument(
        "--figure", type=Path, metavar="FILE", help="draw the objects into a new PNG file"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... or mps")
    args = parser.parse_args(argv)
    try:
        if args.figure and args.figure.exists():
            raise ValueError(f"--figure never overwrites, and {args.figure} exists")
        air = load_air(args.load, pick_device(args.device), nets)
        names, images = read_images(args.images, air)
        detections = detect(air, images)
        if args.figure:
            draw(images, detections, args.figure)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    records = [
        {"image": name} | asdict(detection)
        for name, detection in zip(names, detections, strict=True)
    ]
    json.dump(records, sys.stdout, indent=1)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
