"""Scenes as arrays and as .npz files. Pickle is never read or written."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np

from air.data.arrays import Array, DataError, sha256

MAX_HELD_OUT = 10_000  # scenes, where a file does not name any


class ArraySpec(NamedTuple):
    """Type and axes of an array. All axes of one name in one split have the same length."""

    dtype: str
    axes: tuple[str | int, ...]


ARRAY_SPECS = {
    "x": ArraySpec("uint8", ("N", "C", "H", "H")),
    "counts": ArraySpec("int64", ("N",)),
    "overlaps": ArraySpec("int64", ("N",)),
    "labels": ArraySpec("int64", ("N", "M")),
    "boxes": ArraySpec("float32", ("N", "M", 4)),
}


class Scenes(NamedTuple):
    """N scenes of H x H pixels in C channels, with at most M objects in a scene."""

    x: Array  # uint8 [N, H, H], or [N, C, H, H] with several channels
    counts: Array | None  # int64 [N]
    overlaps: Array | None  # int64 [N], number of pixels where an object meets an earlier one
    labels: Array | None  # int64 [N, M], -1 beyond the count
    boxes: Array | None  # float32 [N, M, (x0, y0, x1, y1)] tight, x1 and y1 exclusive; else NaN


class SceneSplits(NamedTuple):
    """Training scenes, held-out scenes, and the SHA-256 of their arrays."""

    train: Scenes
    test: Scenes
    sha256: str


def write_scenes(path: Path, train: Scenes, test: Scenes) -> None:
    """Writes an .npz file that appears under its name only when it is complete.

    Raises:
        DataError: If it cannot be written.
    """
    arrays = train._asdict() | {f"test_{name}": array for name, array in test._asdict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".scenes-", dir=path.parent) as folder:
            complete = Path(folder, "scenes.npz")
            with ZipFile(complete, "w", ZIP_DEFLATED, compresslevel=1) as archive:
                for name, array in arrays.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                        np.save(file, array, allow_pickle=False)
            complete.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error}); name another place") from error


def load_file(path: Path, *, hold_out_all: bool = False) -> SceneSplits:
    """Loads scenes from an .npz file.

    Args:
        path: A file with the array x and, optionally, counts, overlaps, labels, boxes, and the same
            arrays of held-out scenes: test_x, test_counts, ...
        hold_out_all: If there is no test_x, hold out all scenes instead of the last tenth.

    Raises:
        DataError: If the file has no scenes; the message is one line for the user.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            train = read_split(archive, "")
            if "test_x" in archive:
                channels = 1 if train.x.ndim == 3 else train.x.shape[1]
                test = read_split(archive, "test_", {"C": channels, "H": train.x.shape[-1]})
            else:
                first = first_held_out(len(train.x), hold_out_all)
                test = _rows(train, slice(first, None))
                train = _rows(train, slice(first))
    except Exception as error:  # zipfile and NumPy raise errors of many types for foreign bytes
        raise DataError(f"{path}: no scenes: {error}; if cached, delete the file") from error
    return SceneSplits(train, test, sha256([*train, *test]))


def first_held_out(num_scenes: int, hold_out_all: bool) -> int:
    """Index of the first held-out scene where a file does not name any: all, or the last tenth."""
    if hold_out_all:
        return 0
    return num_scenes - min(max(num_scenes // 10, 1), MAX_HELD_OUT)


def read_split(
    archive: Mapping[str, Array], prefix: str, sizes: Mapping[str, int] | None = None
) -> Scenes:
    """Reads the arrays of one split and checks them against `ARRAY_SPECS`.

    Args:
        archive: Arrays by name.
        prefix: "" for training scenes, "test_" for held-out scenes.
        sizes: Lengths of axes that are known already.

    Raises:
        KeyError: If there is no x.
        ValueError: If one of the arrays has another type or shape.
    """
    known = dict(sizes or {})
    arrays: dict[str, Any] = dict.fromkeys(ARRAY_SPECS)
    for name, spec in ARRAY_SPECS.items():
        if name == "x" or prefix + name in archive:
            array = archive[prefix + name]
            _check_array(prefix + name, array, spec, known)
            arrays[name] = array.astype(spec.dtype, copy=False)
    x = arrays["x"]
    if x.ndim == 4 and x.shape[1] == 1:
        arrays["x"] = x[:, 0]
    return Scenes(**arrays)


def _check_array(name: str, array: Array, spec: ArraySpec, sizes: dict[str, int]) -> None:
    """Checks an array against its specification; adds lengths of new axes to `sizes`."""
    is_image = spec is ARRAY_SPECS["x"]
    shape = array.shape
    if is_image and len(shape) == 3:  # [N, H, H] has one channel
        shape = (shape[0], 1, *shape[1:])
    lengths = ", ".join(str(sizes.get(str(axis), axis)) for axis in spec.axes)
    expected = f"expected {name} {spec.dtype} [{lengths}], N > 1"
    got = f"got {array.dtype} {array.shape}"
    if len(shape) != len(spec.axes) or shape[0] < 2 or (is_image and 0 in shape):
        raise ValueError(f"{expected}, {got}")
    for axis, length in zip(spec.axes, shape, strict=True):
        wanted = axis if isinstance(axis, int) else sizes.setdefault(axis, length)
        if length != wanted:
            raise ValueError(f"{expected}, {got}")
    if not np.can_cast(array.dtype, spec.dtype, "no" if is_image else "same_kind"):
        raise ValueError(f"{expected}, {got}")
    if spec is ARRAY_SPECS["counts"] and array.min() < 0:
        raise ValueError(f"expected {name} of at least 0, got {array.min()}")


def _rows(scenes: Scenes, rows: slice) -> Scenes:
    """Some of the scenes."""
    return Scenes._make(None if array is None else array[rows] for array in scenes)
