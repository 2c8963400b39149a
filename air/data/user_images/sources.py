"""The single entry point for users' images, for training (`load_data`) or one by one.

Sources are

- a picture, or a folder of pictures, its subfolders included: PNG, JPEG, TIFF, BMP, WebP, GIF, PPM;
  each page of a file is an image;
- an .npz, .npy, HDF5 or .pt file with an array of images x;
- a folder with x.npy and, optionally, counts.npy, test_x.npy, ...

The format of a picture is decided by its content, that of other files by their suffix. Arrays are
[N, H, H], [N, C, H, H] or [N, H, H, C], of bool, uint8, uint16, or floats in [0, 1]. An .npy file
of uint8 [N, H, H] or [N, C, H, H] in the final size may be larger than memory.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from air.data.scenes import (
    ARRAY_NAMES,
    IMAGES,
    MAX_HELD_OUT,
    Array,
    DataError,
    Scenes,
    SceneSplits,
    pick_rows,
    sha256,
    split_scenes,
)
from air.data.user_images.array_files import holds_arrays, read_arrays
from air.data.user_images.picture_files import SUFFIXES, read_picture
from air.data.user_images.preparation import (
    ImageSettings,
    Placement,
    check_size,
    prepare,
    prepare_channels_first,
    to_channels_first,
)
from air.data.user_images.true_counts import PictureCounts

EXPECTED = (
    "expected a picture (PNG, JPEG, TIFF, BMP, WebP, GIF or PPM), a folder of pictures, a .npz, "
    ".npy, .h5 or .pt file, or a folder with x.npy"
)
HELD_OUT_FOLDER = "test"
HOLD_OUT_EVERY = 10


class PreparedImage(NamedTuple):
    """An image for a model."""

    name: str
    pixels: Array  # uint8 [(C,) H, H]
    placement: Placement  # where it lies in its original


def load_data(
    path: Path | str, settings: ImageSettings | None = None, *, hold_out_all: bool = False
) -> SceneSplits:
    """Loads users' images as scenes, with true counts and boxes if the source has them.

    Args:
        path: A source of images; see the head of this file.
        settings: How to prepare the images.
        hold_out_all: Hold out all images, unless the source names held-out images.

    Raises:
        DataError: If there are no scenes; the message is one line for the user.
    """
    path, settings = Path(path), settings or ImageSettings()
    with _named_system_errors(path):
        if holds_arrays(path):
            return _load_arrays(path, settings, hold_out_all)
        return _load_pictures(path, settings, hold_out_all)


def read_images(path: Path | str, settings: ImageSettings) -> Iterator[PreparedImage]:
    """Reads and prepares the images of a source, one by one.

    Raises:
        DataError: If an image cannot be read or prepared.
    """
    for name, pixels in source_images(path, settings):
        yield prepare_image(name, pixels, settings)


def prepare_image(name: str, pixels: Array, settings: ImageSettings) -> PreparedImage:
    """Prepares an image [C, h, w]; see `prepare`."""
    prepared, placement = prepare_channels_first(pixels[None], settings, name)
    return PreparedImage(name, prepared[0], placement)


def source_images(
    path: Path | str, settings: ImageSettings, every: Callable[[int], int] = lambda number: 1
) -> Iterator[tuple[str, Array]]:
    """Reads the images of a source one by one as they are, in any size; of arrays, those of x.

    Args:
        path: The source.
        settings: Only `alpha_over` is used.
        every: Maps the number of picture files, or of images in an array, to k: only every k-th is
            read.

    Yields:
        The name of an image, and its pixels, [C, h, w], of a type that `prepare` takes.

    Raises:
        DataError: If the source cannot be read.
    """
    path = Path(path)
    with _named_system_errors(path):
        if holds_arrays(path):
            x = to_channels_first(read_arrays(path, ("x",))["x"], f"{path}: x")
            for i in range(0, len(x), every(len(x))):
                yield f"{path}[{i}]", x[i]
            return
        files = find_pictures(path)
        for file in files[:: every(len(files))]:
            yield from read_picture(file, settings.alpha_over)


def is_folder_of_pictures(path: Path | str) -> bool:
    """Whether a path is a folder without x.npy."""
    path = Path(path)
    with _named_system_errors(path):
        return path.is_dir() and not holds_arrays(path)


def find_pictures(path: Path | str) -> list[Path]:
    """A picture itself, or the pictures in a folder and its subfolders, x-2 before x-10.

    Hidden files and folders are left out.

    Raises:
        DataError: If there is no picture, or a folder cannot be read.
    """
    path = Path(path)
    with _named_system_errors(path):
        if path.is_file():
            if path.suffix.lower() in SUFFIXES or not path.suffix:
                return [path]
            raise DataError(f"{path} is a {path.suffix} file: {EXPECTED}")
        if not path.is_dir():
            problem = "is neither a file nor a folder" if path.exists() else "does not exist"
            raise DataError(f"{path} {problem}: {EXPECTED}")
        files = [file for file in _files_in(path, set()) if file.suffix.lower() in SUFFIXES]
        if not files:
            raise DataError(f"{path} contains no pictures: {EXPECTED}")
    return sorted(files, key=natural_order)


def _files_in(folder: Path, entered: set[str]) -> Iterator[Path]:
    """The files in a folder and its subfolders, each folder once: links may form a loop."""
    place = os.path.realpath(folder)
    if place in entered:
        return
    entered.add(place)
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    for path in sorted(visible, key=Path.is_symlink):  # real folders before links to them
        if path.is_dir():
            yield from _files_in(path, entered)
        elif path.is_file():
            yield path


@contextmanager
def _named_system_errors(path: Path) -> Iterator[None]:
    """Turns errors of the system, as for folders that must not be read, into a `DataError`."""
    try:
        yield
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else path
        raise DataError(f"{where}: {error.strerror or error}") from error


def _load_arrays(path: Path, settings: ImageSettings, hold_out_all: bool) -> SceneSplits:
    """Loads the arrays of `ARRAY_NAMES` in a file or folder as scenes."""
    arrays = read_arrays(path, ARRAY_NAMES)
    try:
        for name in IMAGES:
            if name in arrays:
                arrays[name], _ = prepare(arrays[name], settings, name)
        train, test, digest = split_scenes(arrays, hold_out_all=hold_out_all)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    # Evaluations read every held-out image, so memory holds these images in any case.
    return SceneSplits(train, test._replace(x=np.array(test.x)), digest)


def _load_pictures(path: Path, settings: ImageSettings, hold_out_all: bool) -> SceneSplits:
    """Loads pictures as scenes.

    The pictures in the subfolder test are held out or, without one, every tenth.
    """
    files = find_pictures(path)
    known = PictureCounts(path, files, settings.count_pattern)
    images: list[Array] = []
    sources: list[Path] = []
    counts: list[int | None] = []
    size = 0
    for file in tqdm(files, "reading pictures", disable=None, leave=False, unit="picture"):
        for name, pixels in read_picture(file, settings.alpha_over):
            prepared = prepare_image(name, pixels, settings)
            images.append(prepared.pixels)
            sources.append(file)
            counts.append(known.of(name, file))
            size += prepared.pixels.nbytes
            check_size(str(path), size)
            _check_same_size(path, images, sources)
    held_out = _choose_held_out(path, sources, hold_out_all)
    if any(image.ndim == 3 for image in images):  # one picture in colour: all in colour
        images = [np.broadcast_to(image, (3, *image.shape[-2:])) for image in images]
    numbers = None if None in counts else np.array(counts, np.int64)
    scenes = Scenes(np.stack(images), numbers)
    train, test = pick_rows(scenes, ~held_out), pick_rows(scenes, held_out)
    return SceneSplits(train, test, sha256([*train, *test]))


def _check_same_size(path: Path, images: Sequence[Array], sources: Sequence[Path]) -> None:
    first, last = images[0].shape[-1], images[-1].shape[-1]
    if first != last:
        raise DataError(
            f"{path}: pictures of different sizes, {first} x {first} ({sources[0]}) and {last} x "
            f"{last} ({sources[-1]}): --x-size H resizes all to H x H, and with --crop crops them"
        )


def _choose_held_out(path: Path, sources: Sequence[Path], hold_out_all: bool) -> Array:
    """Which pictures are held out: bool [N]."""
    number = len(sources)
    held_out = np.array([_top_folder(file, path) == HELD_OUT_FOLDER for file in sources])
    if held_out.all() and not hold_out_all:
        raise DataError(
            f"{path}: expected pictures to train on too, got all {number} in the subfolder "
            f"{HELD_OUT_FOLDER}"
        )
    if not held_out.any():
        if number < 2 and not hold_out_all:
            raise DataError(
                f"{path}: expected at least 2 pictures, one of them to hold out, got {number}"
            )
        every = max(HOLD_OUT_EVERY, -(-number // MAX_HELD_OUT))
        held_out[every - 1 :: every] = True
        held_out[-1] |= number < every
        held_out |= hold_out_all
    return held_out


def _top_folder(file: Path, path: Path) -> str:
    inside = file.relative_to(path).parts if file != path else ()
    return inside[0] if len(inside) > 1 else ""


def natural_order(file: Path | str) -> tuple[list[Any], str]:
    """A sort key that puts x-2.png before x-10.png, and x-01.png before x-1.png."""
    parts = re.split(r"(\d+)", str(file))
    return [int(part) if part.isdecimal() else part for part in parts], str(file)
