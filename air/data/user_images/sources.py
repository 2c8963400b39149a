"""The single entry point for users' images, for training (`load_data`) or one by one.

Sources are

- a picture, or a folder of pictures, its subfolders included: PNG, JPEG, TIFF, BMP, WebP, GIF, PPM;
  each page of a file is an image;
- an .npz, .npy, HDF5 or .pt file with an array of images x;
- a folder with x.npy and, optionally, counts.npy, test_x.npy, ...

The format of a picture is decided by its content, that of other files by their suffix. Arrays are
[N, H, H], [N, C, H, H] or [N, H, H, C], of bool, uint8, uint16, or floats in [0, 1]. An .npy file
of uint8 [N, H, H] or [N, C, H, H] in the final size may be larger than memory.

What cannot be used raises a `DataError`, whose message is one line for the user.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
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
    SceneSplits,
    sample_indices,
    split_scenes,
)
from air.data.user_images.array_files import holds_arrays, read_arrays
from air.data.user_images.picture_files import (
    COUNTS_FILE,
    PictureError,
    is_picture,
    read_picture,
)
from air.data.user_images.preparation import (
    ImageSettings,
    Placement,
    check_size,
    convert_channels,
    prepare,
    to_bytes,
    to_channels_first,
)
from air.data.user_images.true_counts import CountError, PictureCounts, first_few

EXPECTED = (
    "expected a picture (PNG, JPEG, TIFF, BMP, WebP, GIF or PPM), a folder of pictures, a .npz, "
    ".npy, .h5 or .pt file, or a folder with x.npy"
)
HELD_OUT_FOLDER = "test"
SYSTEM_FOLDERS = {  # with thumbnails and deleted files; others begin with a dot
    "$recycle.bin", "recycler", "recycled", "system volume information", "@eadir", "@recycle",
    "@recently-snapshot", "@sharebin", "@tmp", "@transcode", "#recycle", "#snapshot", "~snapshot",
    "lost+found", "found.000", "__macosx", "network trash folder", "temporary items",
    "thevolumesettingsfolder",
}  # fmt: skip
MAX_FAULTS = 100  # pictures that cannot be used, after which no more are read
HOLD_OUT_EVERY = 10
MAX_ORIGINALS = 4000  # training images, or files of them, of which the originals are kept too


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
    """
    path, settings = Path(path), settings or ImageSettings()
    larger = None
    if settings.spot_size and not hold_out_all:
        larger = replace(settings, x_size=settings.spot_size)
    x: Array | None = None
    originals: dict[str, Array] = {}
    if holds_arrays(path):
        arrays = read_arrays(path, ARRAY_NAMES)
        for name in reversed(IMAGES):  # x last
            if name in arrays:
                shown = f"{path}: {name}"
                x = to_channels_first(arrays[name], shown)
                arrays[name] = prepare(x, settings, shown)[0]
    else:
        arrays, originals = _read_pictures(path, settings, hold_out_all, larger)
    try:
        splits = split_scenes(arrays, hold_out_all=hold_out_all)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    if larger and x is not None:
        rows = sample_indices(len(splits.train.x), MAX_ORIGINALS)
        larger_x, _ = prepare(x[rows], larger, f"{path}: x")
        originals = {"originals": larger_x, "original_rows": rows}
    # Evaluations read every held-out image, so memory holds these images in any case.
    test = splits.test._replace(x=np.array(splits.test.x))
    return splits._replace(train=splits.train._replace(**originals), test=test)


def read_images(path: Path | str, settings: ImageSettings) -> Iterator[PreparedImage]:
    """Reads and prepares the images of a source, one by one."""
    for name, pixels in source_images(path, settings):
        yield prepare_image(name, pixels, settings)


def prepare_image(name: str, pixels: Array, settings: ImageSettings) -> PreparedImage:
    """Prepares an image [C, h, w]; see `prepare`."""
    prepared, placement = prepare(pixels[None], settings, name)
    return PreparedImage(name, prepared[0], placement)


def source_images(
    path: Path | str, settings: ImageSettings, most: int | None = None
) -> Iterator[tuple[str, Array]]:
    """Reads the images of a source one by one as they are, in any size; of arrays, those of x.

    Args:
        path: The source.
        settings: Only `alpha_over` is used.
        most: Number of picture files, or of images in an array, that are read at most: some at
            random, the same ones every time, and none that are held out. None for all.

    Yields:
        The name of an image, and its pixels, [C, h, w], of a type that `prepare` takes.
    """
    path = Path(path)
    if holds_arrays(path):
        x = to_channels_first(read_arrays(path, ("x",))["x"], f"{path}: x")
        for i in sample_indices(len(x), most or len(x)):
            yield f"{path}[{i}]", x[i]
        return
    files = sample = find_files(path)
    if most is not None:
        sample = [file for file in files if not _is_held_out(path, file)] or files
    try:
        for i in sample_indices(len(sample), most or len(sample)):
            yield from read_picture(sample[i], settings.alpha_over)
    except PictureError as error:
        raise _damaged(files) if most else error from error


def sample_images(path: Path | str, settings: ImageSettings, most: int) -> list[Array]:
    """Some images of a source at random, in their own sizes: uint8 [C, h, w]."""
    found = list(source_images(path, settings, most))
    found = [found[i] for i in sample_indices(len(found), most)]  # a file can have many pages
    return [convert_channels(to_bytes(x[None], name), settings, name)[0] for name, x in found]


def _is_held_out(path: Path, file: Path) -> bool:
    inner = file.parts[len(path.parts) : -1]
    return bool(inner) and inner[0].lower() == HELD_OUT_FOLDER


def find_files(path: Path | str) -> list[Path]:
    """The pictures in a folder and its subfolders, x-2 before x-10; of other sources, the path.

    Hidden files and folders, and those of operating systems, are left out. Files that are no
    pictures are left out with a warning.
    """
    path = Path(path)
    if holds_arrays(path):
        return [path]
    try:
        if path.is_file():
            if is_picture(path) or not path.suffix:
                return [path]
            raise DataError(f"{path} is a {path.suffix} file: {EXPECTED}")
        if not path.is_dir():
            problem = "is neither a file nor a folder" if path.exists() else "does not exist"
            raise DataError(f"{path} {problem}: {EXPECTED}")
        found = list(_files_in(path, set()))
        files = [file for file in found if file.is_file() and is_picture(file)]
    except OSError as error:
        raise DataError(f"{error.filename or path}: {error.strerror}") from error
    if not files:
        raise DataError(f"{path} contains no pictures: {EXPECTED}")
    others = {*found} - {*files}
    kinds = Counter(
        each.suffix.lower() if each.is_file() else "link to nothing"
        for each in others
        if each.name.lower() != COUNTS_FILE or each.parent != path
    )
    if kinds:
        named = ", ".join(f"{kind or 'no suffix'} ({n})" for kind, n in sorted(kinds.items()))
        _warn_once(f"{path}: {kinds.total()} files are no pictures and are left out: {named}")
    return sorted(files, key=natural_order)


@cache
def _warn_once(text: str) -> None:
    logging.getLogger("air").warning(text)


def _files_in(folder: Path, entered: set[str]) -> Iterator[Path]:
    """The files in a folder and its subfolders, each folder once: links may form a loop."""
    place = os.path.realpath(folder)
    if place in entered:
        return
    entered.add(place)
    visible = [
        path
        for path in folder.iterdir()
        if not path.name.startswith(".") and path.name.lower() not in SYSTEM_FOLDERS
    ]
    for path in sorted(visible, key=Path.is_symlink):  # real folders before links to them
        if path.is_dir():
            yield from _files_in(path, entered)
        elif path.is_file() or path.is_symlink():
            yield path


def _read_pictures(
    path: Path, settings: ImageSettings, hold_out_all: bool, larger: ImageSettings | None
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Arrays x, test_x, ... of pictures, and some of the training pictures by other settings.

    The pictures in the subfolder test are held out or, without one, every tenth.
    """
    files = find_files(path)
    to_train = [file for file in files if larger and not _is_held_out(path, file)]
    kept = {to_train[i] for i in sample_indices(len(to_train), MAX_ORIGINALS)}
    originals: dict[int, Array] = {}
    known = PictureCounts(path, files, settings.count_pattern)
    images: list[PreparedImage] = []
    counts: list[int | None] = []
    held_out: list[bool] = []
    faults: list[str] = []
    for file in tqdm(files, "reading pictures", disable=None, leave=False, unit="picture"):
        try:
            for name, pixels in read_picture(file, settings.alpha_over):
                if larger and file in kept:
                    originals[len(images)] = prepare_image(name, pixels, larger).pixels
                images.append(prepare_image(name, pixels, settings))
                held_out.append(_is_held_out(path, file))
                counts.append(known.of(name, file))
        except (PictureError, CountError) as error:
            faults.append(str(error))
        if len(faults) == MAX_FAULTS:
            break
        if images:
            of_originals = sum(pixels.nbytes for pixels in originals.values())
            check_size(str(path), len(images) * images[0].pixels.nbytes + of_originals)
    other = next((x for x in images if x.pixels.shape[-1] != images[0].pixels.shape[-1]), None)
    if other is not None:
        faults.append(_of_different_sizes(path, images[0], other))
    if faults:
        or_more = "or more " * (len(faults) >= MAX_FAULTS)
        raise DataError(first_few(faults, f"{or_more}of {len(files)} pictures cannot be used"))
    x = np.stack(_in_same_channels([image.pixels for image in images]))
    arrays = {"x": x} if None in counts else {"x": x, "counts": np.array(counts)}
    if not any(held_out):
        if hold_out_all or len(x) < 2:  # `split_scenes` holds out all, or refuses one image
            return arrays, {}
        every = max(HOLD_OUT_EVERY, -(-len(x) // MAX_HELD_OUT))
        held_out = [(i + 1) % every == 0 for i in range(len(x))]
        held_out[-1] |= len(x) < every
    rows = np.array(held_out)
    split = {name: array[~rows] for name, array in arrays.items()} | {
        f"test_{name}": array[rows] for name, array in arrays.items()
    }
    trained = {k: pixels for k, pixels in originals.items() if not rows[k]}
    if not trained:
        return split, {}
    colours = x.shape[1:-2]  # of all pictures if one of them has any
    large = [np.broadcast_to(each, (*colours, *each.shape[-2:])) for each in trained.values()]
    of_training = (np.cumsum(~rows) - 1)[[*trained]]
    return split, {"originals": np.stack(large), "original_rows": of_training}


def _damaged(files: Sequence[Path]) -> DataError:
    """The error about all damaged pictures of a folder that has some."""
    errors = []
    for file in files:
        try:
            for _ in read_picture(file):
                pass
        except PictureError as error:
            errors.append(str(error))
    return DataError(first_few(errors, f"of {len(files)} pictures cannot be used"))


def _of_different_sizes(path: Path, first: PreparedImage, other: PreparedImage) -> str:
    side, found = first.pixels.shape[-1], other.pixels.shape[-1]
    return (
        f"{path}: pictures of different sizes, {side} x {side} ({first.name}) and {found} x "
        f"{found} ({other.name}): --x-size H resizes all to H x H, and with --crop crops them"
    )


def _in_same_channels(images: list[Array]) -> list[Array]:
    """All images in colour if one is."""
    if all(image.ndim == 2 for image in images):
        return images
    return [np.broadcast_to(image, (3, *image.shape[-2:])) for image in images]


def natural_order(file: Path | str) -> tuple[list[Any], str]:
    """A sort key that puts x-2.png before x-10.png, and x-01.png before x-1.png."""
    parts = re.split(r"(\d+)", str(file))
    return [int(part) if part.isdecimal() else part for part in parts], str(file)
