"""Makes, caches and loads scenes for Attend, Infer, Repeat.

A scene has a few objects at random places. The recipes:

- "air" is Multi-MNIST as in section 3.1 of Eslami et al. (NIPS 2016): digits with a side of
  int(28 / scale) pixels, whose intensities add up. A scene with a sum above 255 is drawn again with
  the same count. Training and test scenes use different digits.
- "apart" is "air" with digits of 24 x 24 pixels, any two of which have their centres at least 12
  pixels apart along x and along y. borea17's AIR notebook uses such scenes
  (borea17.github.io, paper_summaries/air); it reports a count accuracy of 99 %.
- "dsprites" has coloured shapes; a later shape hides what is behind it.
- "solids" has a cube, a sphere or a cylinder on the ground, seen in perspective; "table-top" has
  none to three, which may hide one another.
- "omniglot" has up to four handwritten characters, in held-out scenes of other alphabets than in
  training; "strokes" has one large character, for a model whose objects are strokes.
- "pyro-nearest" and "pyro-bicubic" rebuild the data set of Pyro's AIR example, which resizes digits
  by nearest neighbour with an old Pillow and bicubically with a new one.
"""

import argparse
import hashlib
import math
import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.random import PCG64, Generator, RandomState

from air.data.scenes import Array, DataError, Scenes, SceneSplits, sha256, write_scenes
from air.data.synthetic.backgrounds import draw_background
from air.data.synthetic.digits import (
    MNIST_SHA256,
    download_mnist,
    load_embedded,
    load_mnist,
    resize_digit,
    rotate_digit,
)
from air.data.synthetic.omniglot import download_omniglot, load_omniglot
from air.data.synthetic.scene_settings import (
    SOLIDS,
    FolderSettings,
    SceneSettings,
    with_own_defaults,
)
from air.data.synthetic.solids import draw_scenes
from air.data.synthetic.sprites import SHAPES, draw_sprite, tint
from air.data.user_images.picture_files import write_pictures
from air.data.user_images.sources import HELD_OUT_FOLDER, load_data
from air.support.fields import add_flags, from_config, settings_of
from air.terminal.signals import exit_code, interrupt_on_signals
from air.terminal.streams import steady_streams

__all__ = ["DataError", "SceneSettings", "SceneSplits", "Scenes", "load_scenes"]

MAX_ATTEMPTS = 5_000  # to draw one scene

Box = tuple[int, int, int, int]  # (x0, y0, x1, y1) in pixels, x1 and y1 exclusive


def _load_digits(settings: SceneSettings, folder: Path) -> list[Array]:
    """Images and labels for training scenes, images and labels for held-out scenes."""
    if settings.recipe == "dsprites" or settings.recipe in SOLIDS:
        return [np.zeros(0, np.uint8)] * 4
    if settings.digits == "embedded":
        return load_embedded()
    if settings.digits == "omniglot":
        return load_omniglot(folder)
    digits = load_mnist(folder)
    if settings.is_pyros and sha256(digits) != MNIST_SHA256:
        raise DataError(f"{folder}: expected MNIST for recipe {settings.recipe}, got other digits")
    return digits


class _Object(NamedTuple):
    """An object, before it is put into a scene."""

    label: int
    coverage: Array  # of each pixel, in 255ths, uint8 [side, side]
    pixels: Array  # uint8 [C, side, side]


class _SceneGenerator:
    """Draws scenes. The pyro recipes draw random numbers in the order of Pyro's `mk_dataset`."""

    def __init__(self, settings: SceneSettings, test: bool, images: Array, labels: Array) -> None:
        self.settings, self.images, self.labels = settings, images, labels
        self.random: Any = Generator(PCG64([settings.seed, test]))
        if settings.is_pyros:
            self.random = RandomState(681307 + test)
        self.channels = 3 if settings.recipe == "dsprites" else 1
        self.covers = self.channels > 1 or settings.background != "black"

    def randint(self, n: int) -> int:
        """Draws a whole number from 0 to n - 1."""
        return int(self.random.randint(n) if self.settings.is_pyros else n * self.random.random())

    def draw_side(self) -> int:  # pixels
        settings = self.settings
        if settings.sides:
            least, greatest = settings.sides
            return least + self.randint(greatest - least + 1)
        scale = settings.scale_sd * self.random.standard_normal() + settings.scale_mean
        return max(4, int(28 / max(scale, 28 / settings.x_size)))

    def draw_angle(self) -> float:  # degrees
        greatest = self.settings.rotation
        return greatest * (2 * self.random.random() - 1) if greatest else 0.0

    def draw_level(self) -> int:
        least, greatest = self.settings.object_levels
        return least + self.randint(greatest - least + 1) if least < greatest else least

    def draw_digit(self) -> _Object:
        """Draws one of the digits, with a size, a rotation and a level."""
        index, side, angle = self.randint(len(self.images)), self.draw_side(), self.draw_angle()
        digit = rotate_digit(self.images[index], angle) if angle else self.images[index]
        digit = resize_digit(digit, side, self.settings.recipe)
        if self.settings.binary:
            digit = np.where(digit >= digit.max() / 2, 255, 0).astype(np.uint8)
        pixels = tint(digit, np.array([self.draw_level()], np.uint8))
        return _Object(int(self.labels[index]), digit, pixels)

    def draw_sprite(self) -> _Object:
        """Draws a coloured shape with a level."""
        label, side, angle = self.randint(len(SHAPES)), self.draw_side(), self.draw_angle()
        coverage = draw_sprite(SHAPES[label], side, math.radians(angle))
        color = self.random.random(3)
        color = np.floor(self.draw_level() * color / color.max() + 0.5).astype(np.uint8)
        if self.settings.binary:
            coverage = np.where(coverage >= 128, 255, 0).astype(np.uint8)
            color = np.where(color >= 128, 255, 0).astype(np.uint8)
        return _Object(label, coverage, tint(coverage, color))

    def add(self, patch: Array, item: _Object) -> None:
        """Adds an object to a patch of the canvas, uint16 [C, side, side], in place."""
        if self.covers:  # what is behind it
            patch *= 255 - item.coverage
            patch //= 255
            patch += item.pixels
        elif self.settings.binary:
            np.maximum(patch, item.pixels, out=patch)
        else:
            patch += item.pixels

    def draw_scene(self, count: int) -> tuple[Array, int, list[int], list[Box]] | None:
        """Draws a scene of `count` objects.

        Returns:
            The canvas, uint16 [C, H, H]; the number of pixels that an object shares with earlier
            objects; the label and the tight box of each object. None if earlier objects left no
            place for one, or if grey digits overlap so that their sum would be above 255.
        """
        h = self.settings.x_size
        kind, levels = self.settings.background, self.settings.background_levels
        distance = self.settings.min_distance
        canvas = draw_background(kind, self.random, self.channels, h, levels)
        ink = np.zeros((h, h), np.uint16)  # the coverages, added up
        edge = 0 if self.settings.is_pyros else 1  # Pyro's never touch the lower and right edges
        shared = 0
        labels = []
        boxes = []
        corners: tuple[list[int], list[int]] = [], []  # top and left of each object
        for _ in range(count):
            item = self.draw_digit() if self.channels == 1 else self.draw_sprite()
            side = len(item.coverage)
            covered = np.asarray(item.coverage > 0)
            for taken in corners:
                free: Sequence[int] = range(h - side + edge)
                if distance:
                    free = [p for p in free if all(abs(p - other) >= distance for other in taken)]
                if not free:
                    return None
                taken.append(free[self.randint(len(free))])
            top, left = corners[0][-1], corners[1][-1]
            rows, columns = slice(top, top + side), slice(left, left + side)
            shared += int((ink[rows, columns][covered] > 0).sum())
            ink[rows, columns] += item.coverage
            self.add(canvas[:, rows, columns], item)
            ys = np.flatnonzero(covered.any(1)) + top
            xs = np.flatnonzero(covered.any(0)) + left
            labels.append(item.label)
            boxes.append((int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1))
        if self.channels == 1 and not self.settings.binary and ink.max() > 255:
            return None
        return canvas, shared, labels, boxes


def _least_gap(boxes: Sequence[Box]) -> float:
    """The least distance of two boxes, along x or along y, whichever is larger."""
    gaps = (
        max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3]) for a, b in combinations(boxes, 2)
    )
    return min(gaps, default=math.inf)


def _draw(settings: SceneSettings, test: bool, images: Array, labels: Array) -> Scenes:
    """Draws the scenes of one split."""
    if settings.recipe in SOLIDS:
        number = settings.num_test_scenes if test else settings.num_scenes
        return draw_scenes(number, settings.counts, settings.x_size, [settings.seed, test])
    generator = _SceneGenerator(settings, test, images, labels)
    size = settings.num_test_scenes if test else settings.num_scenes
    slots = max(settings.counts)
    h = settings.x_size
    x = np.zeros((size, generator.channels, h, h), np.uint8)
    counts = np.zeros(size, np.int64)
    overlaps = np.zeros(size, np.int64)
    scene_labels = np.full((size, slots), -1)
    scene_boxes = np.full((size, slots, 4), np.nan, np.float32)
    for n in range(size):
        count = settings.counts[generator.randint(len(settings.counts))]
        for _ in range(MAX_ATTEMPTS):
            scene = generator.draw_scene(count)
            if scene is None:
                continue
            canvas, shared, object_labels, boxes = scene
            if settings.min_gap is None or _least_gap(boxes) >= settings.min_gap:
                break
        else:
            raise ValueError(
                f"counts: {count} objects do not fit into a scene; use fewer, or a larger x_size"
            )
        x[n] = canvas
        counts[n] = count
        overlaps[n] = shared
        scene_labels[n, :count] = object_labels
        scene_boxes[n, :count] = np.reshape(boxes, (count, 4))
    if generator.channels == 1:
        x = x[:, 0]
    if settings.recipe == "strokes":  # whose strokes have not been counted
        return Scenes(x, labels=scene_labels)
    return Scenes(x, counts, overlaps, scene_labels, scene_boxes)


def load_scenes(
    settings: SceneSettings,
    *,
    cache_dir: Path | str | None = None,
    mnist_dir: Path | str | None = None,
) -> SceneSplits:
    """Loads scenes from the cache; makes and caches them if they are not there.

    Args:
        settings: Which scenes.
        cache_dir: Folder of the cache; None for $AIR_CACHE or ~/.cache/air.
        mnist_dir: Folder of MNIST's IDX files; None to download them into the cache.

    Raises:
        ValueError: If there is no room for the objects, or `mnist_dir` is given without digits
            mnist.
        DataError: If digits or scenes cannot be read, or scenes cannot be written.
    """
    folder = Path(cache_dir or os.environ.get("AIR_CACHE") or "~/.cache/air").expanduser()
    if settings.digits == "embedded" and mnist_dir:
        raise ValueError("mnist_dir: expected only with digits mnist or omniglot, got embedded")
    if settings.digits != "embedded" and mnist_dir is None:
        download = download_mnist if settings.digits == "mnist" else download_omniglot
        download(folder / settings.digits)
    digits = _load_digits(settings, Path(mnist_dir or folder / settings.digits).expanduser())
    key = f"3 {settings} {sha256(digits)}"  # raise 3 if the same settings give other scenes
    path = folder / f"scenes-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    if not path.exists():
        train = _draw(settings, False, *digits[:2])
        test = _draw(settings, True, *digits[2:])
        write_scenes(path, train, test)
    try:
        return load_data(path)
    except DataError as error:
        raise DataError(f"{error}; delete the file to make the scenes again") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Writes scenes to disk; ends with one line and exit code 2 if that fails."""
    with steady_streams(), interrupt_on_signals():
        parser = _build_parser()
        args = vars(parser.parse_args(argv))
        out = args["out"]
        try:
            if out.exists():
                raise DataError(f"--out: expected a new file or folder, got {out}, which exists")
            settings = from_config(SceneSettings, with_own_defaults(args))
            splits = load_scenes(settings, **vars(from_config(FolderSettings, args)))
            if out.suffix == ".npz":
                write_scenes(out, splits.train, splits.test)
            else:
                write_pictures(out, {"": splits.train, HELD_OUT_FOLDER: splits.test})
        except ValueError as error:
            parser.error(" ".join(str(error).splitlines()))
        except KeyboardInterrupt as interrupt:
            parser.exit(
                exit_code(interrupt), f"{parser.prog}: interrupted; {out} is not complete\n"
            )
        print(f"{out}: {settings}, SHA-256 {splits.sha256}")


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Makes scenes.", usage=argparse.SUPPRESS)
    parser.add_argument(
        "--out",
        type=lambda path: Path(path).expanduser(),  # a shell leaves the ~ of --out=~/scenes
        required=True,
        help="new .npz file, or new folder for one PNG file per scene",
    )
    add_flags(parser, "scenes", SceneSettings)
    add_flags(parser, "folders", FolderSettings)
    seed = next(spec for spec in settings_of(SceneSettings) if spec.name == "seed")
    parser.add_argument(
        "--seed",
        dest=seed.key,
        type=seed.parse,
        default=argparse.SUPPRESS,
        help="short for --data-seed",
    )
    return parser


if __name__ == "__main__":
    main()
