"""Images for a model, read from image files and from .npz files."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from air.data.arrays import Array, DataError

MODES = {1: ("L", "1"), 3: ("RGB",)}  # of Pillow, by number of channels
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "PPM", "WEBP")  # others can run programs


def read_pictures(path: Path, side: int, channels: int) -> Iterator[tuple[str, Array]]:
    """Reads an image file, or the array x of an .npz file, for a model of this side and channels.

    Yields:
        A name for each image, and its pixels, uint8 [side, side] or [channels, side, side].

    Raises:
        DataError: If the file is unreadable, or has images of another size or another mode.
    """
    if path.suffix == ".npz":
        for i, image in enumerate(read_array(path, side, channels)):
            yield f"{path}[{i}]", image
    else:
        yield str(path), read_image(path, side, channels)


def read_array(path: Path, side: int, channels: int) -> Array:
    """Reads x of an .npz file: uint8 [N, side, side], or [N, channels, side, side] if several.

    Raises:
        DataError: If there is no x of this type and shape.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            x: Array = archive["x"]
    except Exception as error:  # zipfile and NumPy raise errors of many types for foreign bytes
        raise DataError(f"{path}: expected images x, got {error}") from error
    if channels == 1 and x.ndim == 4 and x.shape[1] == 1:
        x = x[:, 0]
    shape = (side, side) if channels == 1 else (channels, side, side)
    if x.dtype != np.uint8 or x.shape[1:] != shape or len(x) == 0:
        lengths = ", ".join(map(str, shape))
        raise DataError(f"{path}: expected x uint8 (N, {lengths}), got {x.dtype} {x.shape}")
    return x


def read_image(path: Path, side: int, channels: int) -> Array:
    """Reads an image file: uint8 [side, side], or [channels, side, side] if several.

    Raises:
        DataError: If the file is no image, or an image of another size or mode.
    """
    modes = MODES.get(channels, ())
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
            if image.size != (side, side):  # checked before the pixels are unpacked
                raise ValueError(f"expected {side} x {side} pixels, got {image.size}")
            if image.mode not in modes:
                expected = " or ".join(modes) or f"none, but an .npz with {channels} channels"
                raise ValueError(f"expected mode {expected}, got {image.mode}")
            pixels = np.array(image.convert(modes[0]))
    except Exception as error:  # Pillow raises errors of many types for foreign bytes
        raise DataError(f"{path}: no image for this model: {error}") from error
    return pixels if channels == 1 else pixels.transpose(2, 0, 1)
