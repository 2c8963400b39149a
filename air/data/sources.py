"""The one door for images: whatever people have, for training (`load_data`) or one by one.

Taken are

- a picture, or a folder of pictures, its subfolders included: PNG, JPEG, TIFF, BMP, WebP, GIF, PPM;
  each page of a file is an image;
- an .npz, HDF5 or .pt file with an array of images x;
- a .npy file of images, or a folder of x.npy or of its parts x-0.npy, x-1.npy, ...

The format of a picture is decided by its content, that of other files by their suffix. Arrays are
[N, H, H], [N, C, H, H] or [N, H, H, C], of bool, uint8, uint16, or floats in [0, 1].
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from air.data.array_files import READERS, read_arrays
from air.data.arrays import Array, DataError, sha256
from air.data.counts import PictureCounts
from air.data.pictures import SUFFIXES, read_picture
from air.data.preparation import (
    CHUNK,
    ImageSettings,
    Placement,
    prepare_channels_first,
    to_channels_first,
)
from air.data.scenes import MAX_HELD_OUT, Scenes, SceneSplits, load_file, pick_rows
from air.data.shards import holds_arrays, map_arrays, map_scenes, natural_order
from air.storage.files import MAX_BYTES

TAKEN = (
    "expected a picture (PNG, JPEG, TIFF, BMP, WebP, GIF or PPM), a folder of pictures, a .npz, "
    ".npy, .h5 or .pt file, or a folder of x.npy or its parts"
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
    """Loads scenes of one's own.

    Args:
        path: A source of images; see the head of this file.
        settings: How to prepare the images.
        hold_out_all: Hold out all images, unless the source says which are to be held out.

    Raises:
        DataError: If there are no scenes; the message is one line for the user.
    """
    path, settings = Path(path), settings or ImageSettings()
    with _named_system_errors(path):
        kind = _kind_of(path)
        if kind == "npy":
            return map_scenes(path, settings, hold_out_all=hold_out_all)
        if kind == "arrays":
            return load_file(path, settings, hold_out_all=hold_out_all)
        return _load_pictures(path, settings, hold_out_all)


def read_images(path: Path | str, settings: ImageSettings) -> Iterator[PreparedImage]:
    """Reads and prepares the images of a source, one by one.

    Raises:
        DataError: If an image cannot be read, or not be prepared.
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
        settings: Of them, `alpha_over` is needed here.
        every: Of all the files of pictures, or of the images in arrays, their number -> k, to read
            every k-th alone.

    Yields:
        The name of an image, and its pixels, [C, h, w], of a type that `prepare` takes.

    Raises:
        DataError: If the source cannot be read.
    """
    path = Path(path)
    with _named_system_errors(path):
        kind = _kind_of(path)
        if kind == "pictures":
            files = find_pictures(path)
            for file in files[:: every(len(files))]:
                yield from read_picture(file, settings.alpha_over)
            return
        parts = map_arrays(path)["x"] if kind == "npy" else [read_arrays(path, ("x",))["x"]]
        for part in parts:
            if part.ndim < 3:
                to_channels_first(part, f"{path}: x")  # says what is wrong
        step = every(sum(map(len, parts)))
        first = 0  # number of the part's first image
        for part in parts:
            for start in range(-first % step, len(part), CHUNK * step):
                rows = part[start : start + CHUNK * step : step]
                for i, pixels in enumerate(to_channels_first(rows, f"{path}: x")):
                    yield f"{path}[{first + start + i * step}]", pixels
            first += len(part)


def is_folder_of_pictures(path: Path | str) -> bool:
    """Whether a path is a folder, and not one of arrays."""
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
            raise DataError(f"{path} is a {path.suffix} file: {TAKEN}")
        if not path.is_dir():
            problem = "is neither a file nor a folder" if path.exists() else "does not exist"
            raise DataError(f"{path} {problem}: {TAKEN}")
        files = [file for file in _files_in(path, set()) if file.suffix.lower() in SUFFIXES]
        if not files:
            raise DataError(f"{path} holds no pictures: {TAKEN}")
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


def _kind_of(path: Path) -> Literal["pictures", "npy", "arrays"]:
    if path.is_dir():
        return "npy" if holds_arrays(path) else "pictures"
    suffix = path.suffix.lower()
    return "npy" if suffix == ".npy" else "arrays" if suffix in READERS else "pictures"


@contextmanager
def _named_system_errors(path: Path) -> Iterator[None]:
    """Turns errors of the system, as for folders that must not be read, into a `DataError`."""
    try:
        yield
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else path
        raise DataError(f"{where}: {error.strerror or error}") from error


# Pictures as scenes.


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
            if size > MAX_BYTES:
                raise DataError(f"{path} unpacks to more than {MAX_BYTES:,} bytes; lower --x-size")
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
            f"{last} ({sources[-1]}): --x-size H resizes all to H x H, with --crop cuts out their "
            "middle"
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
