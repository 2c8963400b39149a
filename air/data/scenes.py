"""Scenes as arrays, and files of them. Pickle is never read or written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np

from air.data.array_files import read_arrays
from air.data.arrays import Array, DataError, sha256
from air.data.preparation import ImageSettings, prepare
from air.storage.files import write_atomically

MAX_HELD_OUT = 10_000  # scenes, where a file does not name any
MAX_COUNT = 10_000  # objects in a scene; tables by count stay small


class ArraySpec(NamedTuple):
    """Type and axes of an array. All axes of one name in one split have the same length."""

    dtype: str
    axes: tuple[str | int, ...]


IMAGES = {"x": "", "test_x": "test_"}  # array of images -> prefix of the arrays of its split
LABELS = {
    "counts": ArraySpec("int64", ("N",)),
    "overlaps": ArraySpec("int64", ("N",)),
    "labels": ArraySpec("int64", ("N", "M")),
    "boxes": ArraySpec("float32", ("N", "M", 4)),
}
ARRAY_NAMES = [prefix + name for prefix in ("", "test_") for name in ("x", *LABELS)]


class Scenes(NamedTuple):
    """N scenes of H x H pixels in C channels, with at most M objects in a scene."""

    x: Array  # uint8 [N, H, H], or [N, C, H, H] with several channels; or a `Shards` of it
    counts: Array | None = None  # int64 [N]
    overlaps: Array | None = None  # int64 [N], pixels where an object meets an earlier one
    labels: Array | None = None  # int64 [N, M], -1 beyond the count
    boxes: Array | None = None  # float32 [N, M, (x0, y0, x1, y1)] tight, x1 and y1 exclusive; NaN


class SceneSplits(NamedTuple):
    """Training scenes, held-out scenes, and the SHA-256 of their arrays."""

    train: Scenes
    test: Scenes
    sha256: str

    @property
    def x_size(self) -> int:
        """The side of the images in pixels."""
        return int(self.train.x.shape[-1])

    @property
    def channels(self) -> int:
        """The number of channels of the images."""
        return int(self.train.x.shape[1]) if self.train.x.ndim == 4 else 1


def write_scenes(path: Path | str, train: Scenes, test: Scenes) -> None:
    """Writes an .npz file that appears under its name only when it is complete.

    Raises:
        DataError: If it cannot be written.
    """
    arrays = train._asdict() | {f"test_{name}": array for name, array in test._asdict().items()}

    def write(file: Path) -> None:
        with ZipFile(file, "w", ZIP_DEFLATED, compresslevel=1) as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.save(member, array, allow_pickle=False)

    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), write)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error}); name another place") from error


def load_file(
    path: Path | str, settings: ImageSettings | None = None, *, hold_out_all: bool = False
) -> SceneSplits:
    """Loads scenes from an .npz, HDF5 or .pt file.

    Args:
        path: A file with images x and, optionally, counts, overlaps, labels, boxes, and the same
            arrays of held-out scenes: test_x, test_counts, ...
        settings: How to prepare the images.
        hold_out_all: If there is no test_x, hold out all scenes instead of the last tenth.

    Raises:
        DataError: If the file has no scenes; the message is one line for the user.
    """
    arrays = read_arrays(Path(path), ARRAY_NAMES)
    try:
        for name in IMAGES:
            if name in arrays:
                arrays[name], _ = prepare(arrays[name], settings or ImageSettings(), name)
        train, test = split_scenes(arrays, hold_out_all=hold_out_all)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    return SceneSplits(train, test, sha256([*train, *test]))


def first_held_out(num_scenes: int, hold_out_all: bool) -> int:
    """Index of the first held-out scene where a file does not name any: all, or the last tenth."""
    if hold_out_all:
        return 0
    return num_scenes - min(max(num_scenes // 10, 1), MAX_HELD_OUT)


def split_scenes(arrays: Mapping[str, Any], *, hold_out_all: bool = False) -> tuple[Scenes, Scenes]:
    """Training and held-out scenes of arrays by name.

    Args:
        arrays: x and, if there are any, test_x, which are prepared, and other arrays of
            `ARRAY_NAMES`, which are checked against `LABELS`.
        hold_out_all: As for `load_file`.

    Raises:
        DataError: If one of the arrays has another type or shape than it should have.
    """
    x = arrays["x"]
    train = Scenes(x, **_read_labels(arrays, "", len(x)))
    if "test_x" in arrays:
        test_x = arrays["test_x"]
        if (not len(x) and not hold_out_all) or not len(test_x):
            raise DataError(f"expected images in x and test_x, got {len(x)} and {len(test_x)}")
        if test_x.shape[1:] != x.shape[1:]:
            raise DataError(
                "expected x and test_x of one size and number of channels, got "
                f"{_per_image(x)} and {_per_image(test_x)}"
            )
        return train, Scenes(test_x, **_read_labels(arrays, "test_", len(test_x)))
    if not len(x) and hold_out_all:
        raise DataError("expected images in x, got none")
    if len(x) < 2 and not hold_out_all:
        raise DataError(f"expected at least 2 images, one of them to hold out, got {len(x)}")
    first = first_held_out(len(x), hold_out_all)
    return pick_rows(train, slice(first)), pick_rows(train, slice(first, None))


def pick_rows(scenes: Scenes, rows: Any) -> Scenes:  # noqa: ANN401  # a slice or indices
    """Some of the scenes."""
    return Scenes._make(None if array is None else array[rows] for array in scenes)


def _read_labels(arrays: Mapping[str, Any], prefix: str, num_images: int) -> dict[str, Array]:
    """The arrays of one split other than its images, of the types in `LABELS`."""
    sizes = {"N": num_images}
    found = {}
    for name, spec in LABELS.items():
        if prefix + name in arrays:
            array = arrays[prefix + name]
            _check_array(prefix + name, array, spec, sizes, f"{prefix}x")
            with np.errstate(over="ignore"):  # a box beyond float32 is infinite
                found[name] = array.astype(spec.dtype, copy=False)
    return found


def _check_array(
    name: str, array: Array, spec: ArraySpec, sizes: dict[str, int], images: str
) -> None:
    """Checks an array against its specification; adds lengths of new axes to `sizes`."""
    lengths = ", ".join(str(sizes.get(str(axis), axis)) for axis in spec.axes)
    problem = f"expected {name} {spec.dtype} [{lengths}], got {array.dtype} {list(array.shape)}"
    if len(array.shape) != len(spec.axes) or not np.can_cast(array.dtype, spec.dtype, "same_kind"):
        raise DataError(problem)
    if len(array) != sizes["N"]:
        raise DataError(
            f"expected an entry of {name} for each image of {images}, got {len(array)} for "
            f"{sizes['N']} images"
        )
    for axis, length in zip(spec.axes, array.shape, strict=True):
        if length != (axis if isinstance(axis, int) else sizes.setdefault(axis, length)):
            raise DataError(problem)
    if spec is LABELS["counts"] and len(array):
        low, high = array.min(), array.max()
        if low < 0 or high > MAX_COUNT:
            got = low if low < 0 else high
            raise DataError(f"expected {name} of at least 0, at most {MAX_COUNT:,}, got {got}")


def _per_image(x: Array) -> str:
    channels = x.shape[1] if len(x.shape) == 4 else 1
    return f"{x.shape[-1]} x {x.shape[-2]} x {channels}"
