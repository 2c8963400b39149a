"""Reads picture files (PNG, JPEG, TIFF, BMP, WebP, GIF, PPM) page by page, and writes PNG files."""

import contextlib
import csv
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from air.data.scenes import Array, DataError, Scenes
from air.data.user_images.preparation import lay_over, to_bytes, to_grey

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "PPM", "WEBP")  # others can run programs
PAGED = ("GIF", "PNG", "TIFF", "WEBP")  # a JPEG's further images are previews of the first
MAX_PIXELS = 100_000_000  # of a page; a small file may declare more than memory holds
MAX_GREY_SPREAD = 8  # of the channels of a pixel, of 255; lossy formats tint grey pictures a little
COUNTS_FILE = "counts.csv"  # of a folder of pictures: lines of name,count
_SUBFILE_TYPE = 254  # TIFF tag, with the flags:
_PREVIEW, _TRANSPARENCY_MASK = 1, 4


class PictureError(DataError):
    """A file is no picture, or is damaged."""


def read_picture(path: Path | str, alpha_over: str = "black") -> Iterator[tuple[str, Array]]:
    """Reads the pages of a picture file.

    Args:
        path: The file; its content decides its format, not its name.
        alpha_over: Background of transparent pixels, black or white.

    Yields:
        The name of a page, path[0], path[1], ..., or the path if there is one page, and its
        pixels: uint8 [1, h, w] if all are grey, else [3, h, w]. 16 bits are scaled to 8.

    Raises:
        PictureError: If the file is not a picture, or damaged, or a page is too large.
    """
    page = 0
    try:
        # Pillow gets no path: it would map plain TIFF files, and garble those that are turned.
        with open(path, "rb") as content:
            # Warnings are ignored where Pillow works only: a `with` around a yield outlasts it.
            with warnings.catch_warnings(action="ignore"):
                file = Image.open(content, formats=FORMATS)
                _check_size(file)
                pages = getattr(file, "n_frames", 1) if file.format in PAGED else 1
            for page in range(pages):
                with warnings.catch_warnings(action="ignore"):
                    file.seek(page)
                    kind = getattr(file, "tag_v2", {}).get(_SUBFILE_TYPE, 0)
                    if page and kind & (_PREVIEW | _TRANSPARENCY_MASK):
                        continue
                    pixels = _pixels(file, alpha_over)
                yield (f"{path}[{page}]" if pages > 1 else str(path)), pixels
    except Exception as error:  # Pillow raises errors of many types for foreign bytes
        where = f"{path}[{page}]" if page else path
        raise PictureError(f"{where}: cannot be read as a picture: {_reason(error)}") from error


def is_picture(path: Path) -> bool:
    """Whether a file is taken for a picture: by its suffix, or else by its content."""
    if Image.registered_extensions().get(path.suffix.lower()) in FORMATS:
        return True
    try:
        with path.open("rb") as content, warnings.catch_warnings(action="ignore"):
            return bool(Image.open(content, formats=FORMATS).format)
    except Exception:  # Pillow raises errors of many types for foreign bytes
        return False


def write_pictures(folder: Path | str, scenes: Mapping[str, Scenes]) -> None:
    """Writes scenes as PNG files, with their counts in counts.csv, into a new folder.

    The key of scenes is the subfolder they go into, "" for the folder itself. The folder appears
    under its name only when it is complete.

    Raises:
        DataError: If it exists or cannot be written.
    """
    folder = Path(folder)
    if folder.exists():
        raise DataError(f"{folder}: expected a new folder, got one that exists")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    lines: list[Sequence[object]] = [("name", "count")]
    try:
        for subfolder, (x, counts, *_) in scenes.items():
            (temporary / subfolder).mkdir(parents=True, exist_ok=True)
            for i, pixels in enumerate(x):
                name = (Path(subfolder) / f"{i:05}.png").as_posix()
                image = pixels if pixels.ndim == 2 else pixels.transpose(1, 2, 0)
                Image.fromarray(image).save(temporary / name)
                if counts is not None:
                    lines.append((name, counts[i]))
        with (temporary / COUNTS_FILE).open("x", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(lines)
        temporary.rename(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error}); choose another path") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} x {image.height} pixels"
        raise ValueError(f"it declares {size}, more than the limit of {MAX_PIXELS:,} pixels")


def _pixels(image: Image.Image, alpha_over: str) -> Array:
    """The pixels of an open image as people see it: uint8 [1, h, w] or [3, h, w]."""
    _check_size(image)
    with contextlib.suppress(Exception):  # metadata can be malformed in a picture that is not
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16-bit or larger numbers, or floats
        numbers = np.asarray(image)
        if numbers.dtype.kind in "iu":
            low, high = numbers.min(), numbers.max()
            if low < 0 or high > np.iinfo(np.uint16).max:
                raise ValueError(
                    f"expected pixels of 8 or 16 bits, got numbers from {low} to {high}"
                )
            numbers = numbers.astype(np.uint16)
        return to_bytes(numbers[None], "the picture")
    if image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA")).transpose(2, 0, 1)[None]
        pixels = lay_over(rgba[:, :3], rgba[:, 3:], alpha_over)[0]
    elif image.mode in ("L", "1"):
        return np.array(image.convert("L"))[None]
    else:
        pixels = np.array(image.convert("RGB")).transpose(2, 0, 1)
    spread = pixels.max(0) - pixels.min(0)
    return to_grey(pixels[None])[0] if spread.max() <= MAX_GREY_SPREAD else pixels


def _reason(error: Exception) -> str:
    """The error in one line, without the path, which Pillow and the system repeat."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnidentifiedImageError):
        return "the file is of another kind, or its pixels are of an unsupported type"
    return " ".join(str(error).split()) or type(error).__name__
