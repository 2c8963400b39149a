"""Finds the objects in images with a trained AIR.

    python -m air.detect --load runs/RUN/checkpoint.pt a.png b.png scenes.npz > found.json
    python -m air.detect --load runs/RUN/checkpoint.pt a.png --figure found.png

Images are files of the size and channels that the model was trained on, grey or RGB, or the array
x, uint8 [N, (C,) H, H], of an .npz file. Prints a JSON list with one object for each image.
"""

import json
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from air.air import AIR
from air.cli.config import AIR_ARGUMENTS, DEFAULTS, pick_device
from air.cli.flag_values import check_values
from air.cli.flags import Parser, build_parser
from air.data.scenes import read_images
from air.evaluation.boxes import tight_boxes
from air.inference import infer
from air.priors import at_least_probs
from air.storage.checkpoint import (
    CheckpointError,
    check_unpacked_size,
    load_weights_strict,
    read_weights,
    write_atomically,
)
from air.visualization.drawing import draw_boxes, tile

MODES = {1: ("L", "1"), 3: ("RGB",)}  # of Pillow, by channels
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "PPM", "WEBP")  # some others run programs
MAX_DRAWN = 64  # images in a figure


@dataclass(frozen=True)
class DetectedObject:
    """An object in an image."""

    step: int  # that found it, from 1
    probability: float  # that it is there, q(n >= step)
    box: list[float]  # around what is painted, (x0, y0, x1, y1) in pixels
    window: list[float]  # that was attended to, alike; may reach past the image


@dataclass(frozen=True)
class Detection:
    """What is in an image."""

    count: int  # the most probable
    probability: float  # of that count, q(count)
    objects: list[DetectedObject]  # so many


def detect(air: AIR, images: Tensor) -> list[Detection]:
    """Finds the objects in images, [N, (C,) H, H], floats in [0, 1] or uint8, on any device."""
    detections = []
    for batch in torch.split(images, 500):
        found = infer(air, batch.to(air.h_init.device))
        painted = found.objects.amax(-3) if air.channels > 1 else found.objects
        reached = at_least_probs(found.count_probs)
        per_step = [part.tolist() for part in (reached, tight_boxes(painted), found.boxes)]
        probs = found.count_probs.amax(1).tolist()
        for i, (count, prob) in enumerate(zip(found.counts.tolist(), probs, strict=True)):
            objects = (
                DetectedObject(t + 1, *(part[i][t] for part in per_step)) for t in range(count)
            )
            detections.append(Detection(count, prob, list(objects)))
    return detections


def load_air(path: Path, device: str | torch.device = "cpu") -> AIR:
    """The model in a checkpoint of a run, or in a file of weights of default sizes.

    Raises:
        ValueError: If there is none.
    """
    weights, config = read_weights(path)
    settings = {name: config.get(flag, DEFAULTS[flag]) for name, flag in AIR_ARGUMENTS.items()}
    check_values(build_parser(""), config, DEFAULTS, path)
    settings["use_baselines"] = False  # of no use here
    try:
        air = AIR(**settings, **_image_form(weights, settings))
    except Exception as error:  # whatever a foreign file makes of it
        raise CheckpointError(f"{path} holds no AIR: {error!r}") from error
    load_weights_strict(air, weights, path)
    return air.to(device).eval()


def _image_form(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Channels and side of the images, which follow from the sizes of the nets."""
    window_pixels = weights["encode.mlp.seq.0.weight"].shape[1]
    channels = window_pixels // settings["window_size"] ** 2
    first = weights.get("embed.seq.0.weight")
    latents = 1 + 3 + settings["z_what_size"]
    pixels = weights["rnn.weight_ih"].shape[1] - latents if first is None else first.shape[1]
    return {"channels": channels, "x_size": math.isqrt(pixels // channels)}


def read_image(path: Path, side: int, channels: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An image file as uint8 [(C,) side, side].

    Raises:
        ValueError: If it is no image, or another than the model takes.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
            if image.size != (side, side):  # before it is unpacked, however large
                raise ValueError(f"expected {side} x {side} pixels, got {image.size}")
            if image.mode not in (modes := MODES.get(channels, ())):
                expected = " or ".join(modes) or f"none, but an .npz with {channels} channels"
                raise ValueError(f"expected mode {expected}, got {image.mode}")
            pixels = np.asarray(image.convert(modes[0]))
    except Exception as error:  # foreign bytes make Pillow raise anything
        raise ValueError(f"{path} is no image for this model: {error}") from error
    return pixels if channels == 1 else pixels.transpose(2, 0, 1)


def read_all(paths: Sequence[Path], air: AIR) -> Iterator[tuple[str, Tensor]]:
    """A name and the pixels of each image in files, in their order."""
    for path in paths:
        if path.suffix == ".npz":
            check_unpacked_size(path)
            for i, image in enumerate(read_images(path, air.x_size, air.channels)):
                yield f"{path}[{i}]", torch.from_numpy(image)
        else:
            yield str(path), torch.from_numpy(read_image(path, air.x_size, air.channels).copy())


def draw(images: Tensor, detections: Sequence[Detection], path: Path) -> None:
    """Writes the first images, uint8 [N, (C,) H, H], with windows and counts, as PNG."""
    shown = images[:MAX_DRAWN].numpy()
    counts = np.array([each.count for each in detections[:MAX_DRAWN]])
    boxes = np.full((len(counts), max(counts.max(), 1), 4), np.nan)
    for i, each in enumerate(detections[:MAX_DRAWN]):
        boxes[i, : each.count] = [found.window for found in each.objects] or 0
    zoom = max(1, 200 // shown.shape[-1])
    sheet = Image.fromarray(tile(draw_boxes(shown, boxes, counts, zoom), 8))
    write_atomically(path, lambda file: sheet.save(file, "PNG"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = Parser(prog="air.detect", description="Finds the objects in images.")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="a file, or an .npz")
    parser.add_argument("--load", type=Path, required=True, metavar="FILE", help="a checkpoint.pt")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw what is found, as PNG")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    arguments = parser.parse_args(argv)
    try:
        if arguments.figure and arguments.figure.exists():
            raise ValueError(f"--figure never overwrites, and {arguments.figure} exists")
        air = load_air(arguments.load, pick_device(arguments.device))
        names, images = zip(*read_all(arguments.images, air), strict=True)
        pictures = torch.stack(images)
        detections = detect(air, pictures)
        if arguments.figure:
            draw(pictures, detections, arguments.figure)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    found = [{"image": n} | asdict(each) for n, each in zip(names, detections, strict=True)]
    json.dump(found, sys.stdout, indent=1)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
