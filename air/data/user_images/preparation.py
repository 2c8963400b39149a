"""Converts images of any common type, layout, size and colour to squares, uint8 [N, (C,) H, H].

Every function raises a `DataError` that says which rule an array breaks and how to mend it.
"""

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from air.data.scenes import Array, DataError
from air.storage.files import MAX_BYTES
from air.support.fields import check_settings, setting
from air.support.intensities import range_problem

MAX_CHANNELS_LAST = 4  # of [N, H, W, C]: grey or RGB, with or without alpha
CHUNK = 1000  # images that are converted at once, to save memory
ALPHA = (2, 4)  # numbers of channels of grey and RGB images with alpha

Pair = tuple[int, int]


def _has_one_group(pattern: str) -> bool:
    try:
        return re.compile(pattern).groups == 1
    except re.error:
        return False


@dataclass(frozen=True)
class ImageSettings:
    """How users' images are read."""

    x_size: int | None = setting(None, "side in pixels of the prepared images", low=1, flag="")
    spot_size: int | None = setting(
        None, "side in pixels of the images in which a threshold looks for objects", low=1, flag=""
    )
    channels: int | None = setting(
        None,
        "with --data: convert images to grey (1) or RGB (3) (default: keep their channels)",
        low=1,
    )
    crop: bool | None = setting(
        None,
        "with --data and --x-size: crop images to their centre; --no-crop resizes them, keeping "
        "their aspect ratio, and pads them to a square",
    )
    alpha_over: Literal["black", "white"] = setting(
        "black", "with --data: background colour of transparent pixels"
    )
    invert: bool = setting(
        False, "with --data: invert brightness, for dark objects on a light background"
    )
    count_pattern: str | None = setting(
        None,
        "with --data FOLDER: regular expression whose one group matches the true count in the name "
        r"of a picture, such as '(\d+)-objects' (default: read counts.csv in the folder, if it "
        "exists, with lines name,count)",
        accepts=_has_one_group,
        accepted="a regular expression with one group",
        metavar="REGEX",
    )

    def __post_init__(self) -> None:
        check_settings(self)


class Placement(NamedTuple):
    """Where a prepared image lies in its original: original = offset + scale * prepared."""

    offset: tuple[float, float] = (0.0, 0.0)  # (x, y) in pixels
    scale: tuple[float, float] = (1.0, 1.0)

    def to_original(self, box: list[float]) -> list[float]:
        """A box (x0, y0, x1, y1) of the prepared image, in pixels of the original."""
        return [self.offset[i % 2] + self.scale[i % 2] * edge for i, edge in enumerate(box)]


def check_size(name: str, num_bytes: int) -> None:
    """Checks that an array fits into the memory that this program takes for it."""
    if num_bytes > MAX_BYTES:
        raise DataError(
            f"{name} takes {num_bytes:,} bytes of memory, more than the limit of {MAX_BYTES:,}; "
            "save the images as uint8 [N, H, H] or [N, C, H, H] in their final size to an .npy "
            "file, which is memory-mapped and may be larger"
        )


def prepare(images: Array, settings: ImageSettings, name: str) -> tuple[Array, Placement]:
    """Prepares images of one size.

    Args:
        images: bool, uint8, uint16, or floats in [0, 1]: [N, C, h, w].
        settings: The size and channels of the prepared images.
        name: Their name in messages.

    Returns:
        uint8 [N, (C,) H, H], contiguous, and the position of all of them in their originals.
        Images that need no conversion are not copied, so they may stay memory-mapped.
    """
    height, width = images.shape[2:]
    side = settings.x_size or width
    size, corner = _frame(height, width, settings, name)
    scale = width / size[0], height / size[1]
    placement = Placement((-corner[0] * scale[0], -corner[1] * scale[1]), scale)

    def convert(part: Array) -> Array:
        part = convert_channels(to_bytes(part, name), settings, name)
        if (height, width) != (side, side):
            part = _fit(part, side, size, corner)
        part = part[:, 0] if part.shape[1] == 1 else part
        return ~part if settings.invert else part

    first = convert(images[:CHUNK])
    if images.flags.c_contiguous and np.may_share_memory(first, images):  # nothing to convert
        return convert(images), placement
    check_size(name, len(images) * first[:1].nbytes)
    done = np.empty((len(images), *first.shape[1:]), np.uint8)
    done[:CHUNK] = first
    for start in range(CHUNK, len(images), CHUNK):
        done[start : start + CHUNK] = convert(images[start : start + CHUNK])
    return done, placement


def to_channels_first(images: Array, name: str) -> Array:
    """Images [N, h, w], [N, C, h, w] or [N, h, w, C] as [N, C, h, w]."""
    shape = " x ".join(map(str, images.shape)) or "of a single number"
    if images.ndim == 3:
        if images.shape[2] <= MAX_CHANNELS_LAST < images.shape[1]:
            raise DataError(
                f"{name} has the shape {shape}, as one image in colour has: expected an "
                "axis of images in front, as [None] makes one"
            )
        images = images[:, None]
    elif images.ndim == 4:
        _, a, b, c = images.shape
        channels_last = b != c and c <= MAX_CHANNELS_LAST and (a == b or a > MAX_CHANNELS_LAST)
        images = images.transpose(0, 3, 1, 2) if channels_last else images
    if images.ndim != 4 or 0 in images.shape[1:]:
        expected = "expected [N, H, H], [N, C, H, H] or [N, H, H, C], with no axis of length 0"
        raise DataError(f"{name} has the shape {shape}: {expected}")
    return images


def to_bytes(images: Array, name: str) -> Array:
    """Intensities as bytes: False, 0, 0.0 are black; True, 255, 65,535, 1.0 are white."""
    kind = images.dtype.newbyteorder("=")
    if kind == np.uint8:
        return images
    if kind == np.bool_:
        return images * np.uint8(255)
    if kind == np.uint16:
        return ((images.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if kind.kind != "f":
        remedy = "; convert integers from 0 to 255 with .astype('uint8')" * (kind.kind in "iu")
        raise DataError(
            f"{name} is {kind}: expected bool, uint8, uint16, or floats in [0, 1]{remedy}"
        )
    if not images.size:
        return images.astype(np.uint8)
    problem = range_problem(float(images.min()), float(images.max()))
    if problem:
        raise DataError(f"{name} is {kind}: {problem}")
    return (np.clip(images, 0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8)


def convert_channels(images: Array, settings: ImageSettings, name: str) -> Array:
    """Converts bytes [N, C, h, w] to the number of channels in the settings."""
    asked, given = settings.channels, images.shape[1]
    if asked in (None, given):
        return images
    if given in ALPHA:
        images = lay_over(images[:, :-1], images[:, -1:], settings.alpha_over)
    colours = images.shape[1]
    if asked not in (1, 3) or colours not in (1, 3):
        raise DataError(
            f"{name} has {given} channels, expected {asked}; only grey and RGB images, with or "
            "without alpha, can be converted to grey (--channels 1) or RGB (--channels 3)"
        )
    return to_grey(images) if asked < colours else np.repeat(images, asked // colours, 1)


def lay_over(colours: Array, alpha: Array, background: str) -> Array:
    """Bytes [N, C, h, w] with their alpha, [N, 1, h, w], over a black or white background."""
    behind = 255 if background == "white" else 0
    weights = alpha.astype(np.uint16)  # a weighted mean of bytes, times 255, fits in 16 bits
    mixed = colours * weights + behind * (255 - weights)
    return ((mixed + 127) // 255).astype(np.uint8)


def to_grey(images: Array) -> Array:
    """RGB bytes [N, 3, h, w] as luminance [N, 1, h, w], by ITU-R BT.601 with Pillow's rounding."""
    red, green, blue = images.astype(np.uint32).swapaxes(0, 1)
    luminance = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    return luminance[:, None].astype(np.uint8)


def _frame(height: int, width: int, settings: ImageSettings, name: str) -> tuple[Pair, Pair]:
    """The size of resized images (width, height), and their corner (left, top) in the square.

    The corner of images that are cropped has coordinates below 0.
    """
    side = settings.x_size
    given = f"{name} has images of {width} x {height} pixels"
    if height == width and side in (None, height):
        return (width, height), (0, 0)
    if side is None:
        raise DataError(
            f"{given}, which are not square: --x-size H resizes them to H x H, and with --crop "
            "crops them to H x H"
        )
    if settings.crop is None:
        raise DataError(
            f"{given}, expected {side} x {side}: --no-crop resizes them, --crop crops them to "
            "their centre"
        )
    if settings.crop:
        if min(height, width) < side:
            raise DataError(
                f"{given}, too small to crop to {side} x {side}; use --no-crop to resize them"
            )
        return (width, height), (-((width - side) // 2), -((height - side) // 2))
    new_width, new_height = (max(1, round(n * side / max(height, width))) for n in (width, height))
    return (new_width, new_height), ((side - new_width) // 2, (side - new_height) // 2)


def _fit(images: Array, side: int, size: Pair, corner: Pair) -> Array:
    """Fits bytes [N, C, h, w] into squares; the median of an image's border fills the rest."""
    done = np.empty((*images.shape[:2], side, side), np.uint8)
    for image, square, fill in zip(images, done, border_median(images), strict=True):
        for channel, target, level in zip(image, square, fill.tolist(), strict=True):
            # A threshold sees thin lines and small gaps better than by a smoother filter.
            resized = Image.fromarray(channel).resize(size, Image.Resampling.LANCZOS)
            canvas = Image.new("L", (side, side), level)
            canvas.paste(resized, corner)
            target[:] = canvas
    return done


def border_median(images: Array) -> Array:
    """The median of the outermost pixels of images [N, C, h, w]: uint8 [N, C]."""
    edges = images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]
    return np.median(np.concatenate(edges, 2), axis=2).astype(np.uint8)
