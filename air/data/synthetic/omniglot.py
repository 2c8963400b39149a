"""Handwritten characters of 50 alphabets: Omniglot (Lake et al. 2015, doi:10.1126/science.aab3050).

Characters of 30 alphabets are for training, those of the other 20 for held-out scenes. Archives
that are missing or cannot be used raise a `DataError`.
"""

import io
from pathlib import Path
from zipfile import ZipFile

import numpy as np
from PIL import Image

from air.data.scenes import Array, DataError
from air.data.synthetic.digits import download

SOURCE = "https://github.com/brendenlake/omniglot/raw/master/python/"
OMNIGLOT_FILES = {
    "images_background.zip": "md5:68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation.zip": "md5:6b91aef0f799c5bb55b94e3f2daec811",
}
SIDE, MARGIN = 28, 1  # of a character's image, as MNIST has it, and around the character, in pixels


def read_characters(path: Path) -> tuple[Array, Array]:
    """Reads an archive of PNG files in a folder for each character.

    Returns:
        Images, bright on black, uint8 [K, 28, 28], and the number of each character, int64 [K].
    """
    try:
        with ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".png"))
            images = [_prepare(archive.read(name)) for name in names]
        folders = [name.rpartition("/")[0] for name in names]
        return np.stack(images), np.unique(folders, return_inverse=True)[1]
    except Exception as error:  # zipfile and Pillow raise many types for foreign bytes
        raise DataError(f"{path}: expected Omniglot's archive of pictures, got {error}") from error


def _prepare(png: bytes) -> Array:
    """Crops a dark drawing on white to a square, and resizes it: uint8 [28, 28], ink is 255."""
    ink = np.asarray(Image.open(io.BytesIO(png)).convert("L")) < 128
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    before = [(max(ink.shape) - side) // 2 for side in ink.shape]
    square = np.zeros((max(ink.shape),) * 2, np.uint8)
    square[before[0] :, before[1] :][: ink.shape[0], : ink.shape[1]] = 255 * ink
    inner = SIDE - 2 * MARGIN
    small = np.asarray(Image.fromarray(square).resize((inner, inner), Image.Resampling.BOX), float)
    return np.pad(np.floor(255 * small / small.max() + 0.5).astype(np.uint8), MARGIN)


def load_omniglot(folder: Path) -> list[Array]:
    """Images and labels for training, and for held-out scenes, as `digits.load_mnist`."""
    return [array for name in OMNIGLOT_FILES for array in read_characters(folder / name)]


def download_omniglot(folder: Path) -> None:
    """Downloads the archives that the folder lacks."""
    download("Omniglot", OMNIGLOT_FILES, folder, [SOURCE])
