"""Scenes as arrays, made here or read from users' files; needs no torch and never reads pickle."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np

from air.storage.files import write_atomically

Array = np.ndarray[Any, np.dtype[Any]]

MAX_HELD_OUT = 10_000  # scenes, if the source does not name held-out scenes
MAX_COUNT = 10_000  # objects in a scene; keeps tables by count small
LARGE_BYTES, SAMPLED_ROWS = 1 << 30, 1000  # of larger arrays, about this many rows are hashed


class DataError(ValueError):
    """Data are missing, damaged or of the wrong kind, or cannot be written; one line."""


class ArraySpec(NamedTuple):
    """Type and axes of an array. All axes of one name in one split have the same length."""

    dtype: str
    axes: tuple[str | int, ...]


LABELS = {
    "counts": ArraySpec("int64", ("N",)),
    "overlaps": ArraySpec("int64", ("N",)),
    "labels": ArraySpec("int64", ("N", "M")),
    "boxes": ArraySpec("float32", ("N", "M", 4)),
    "solid_poses": ArraySpec("float32", ("N", "M", 4)),
}
IMAGES = ("x", "test_x")
ARRAY_NAMES = [prefix + name for prefix in ("", "test_") for name in ("x", *LABELS)]


class Scenes(NamedTuple):
    """N scenes of H x H pixels in C channels, with at most M objects in a scene."""

    x: Array  # uint8 [N, H, H], or [N, C, H, H] with several channels; may be memory-mapped
    counts: Array | None = None  # int64 [N]
    overlaps: Array | None = None  # int64 [N], pixels where an object meets an earlier one
    labels: Array | None = None  # int64 [N, M], -1 beyond the count
    boxes: Array | None = None  # float32 [N, M, (x0, y0, x1, y1)] tight, x1 and y1 exclusive; NaN
    solid_poses: Array | None = None  # float32 [N, M, (size, x, y, angle)]; NaN
    # Some of the images before they were made smaller, uint8 [M, (C,) L, L], in which a threshold
    # sees more, and their indices, int64 [M]. Only `load_data` makes them, of training images.
    originals: Array | None = None
    original_rows: Array | None = None

    @property
    def spot_images(self) -> tuple[Array, Array]:
        """The images in which a threshold looks for objects, and their indices."""
        if self.originals is None or self.original_rows is None:
            return self.x, np.arange(len(self.x))
        return self.originals, self.original_rows


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


def sha256(arrays: Sequence[Array | None]) -> str:
    """The SHA-256 of the shapes and bytes of arrays; None counts as no bytes.

    Of an array above `LARGE_BYTES`, which may be larger than memory, evenly spread rows are read.
    """
    digest = hashlib.sha256()
    for array in arrays:
        if array is not None:
            step = max(len(array) // SAMPLED_ROWS, 1) if array.nbytes > LARGE_BYTES else 1
            digest.update(str(array.shape).encode())
            digest.update(np.ascontiguousarray(array[::step]).data)
    return digest.hexdigest()


def write_scenes(path: Path | str, train: Scenes, test: Scenes) -> None:
    """Writes an .npz file that appears under its name only when it is complete."""
    arrays = train._asdict() | {f"test_{name}": array for name, array in test._asdict().items()}

    def write(file: Path) -> None:
        with ZipFile(file, "w", ZIP_DEFLATED, compresslevel=1) as archive:
            for name, array in arrays.items():
                if array is None:
                    continue
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.save(member, array, allow_pickle=False)

    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), write)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error}); choose another path") from error


def split_scenes(arrays: Mapping[str, Array], *, hold_out_all: bool = False) -> SceneSplits:
    """Training and held-out scenes of arrays by name.

    Args:
        arrays: Prepared images x and optionally test_x, and other arrays of `ARRAY_NAMES`, which
            are checked against `LABELS`.
        hold_out_all: Without test_x, hold out all scenes instead of the last tenth.
    """
    x = arrays["x"]
    train = Scenes(x, **_read_labels(arrays, "", len(x)))
    if "test_x" in arrays:
        test_x = arrays["test_x"]
        if (not len(x) and not hold_out_all) or not len(test_x):
            raise DataError(
                f"expected training and held-out images, got {len(x)} and {len(test_x)}"
            )
        if test_x.shape[1:] != x.shape[1:]:
            raise DataError(
                "expected x and test_x of one size and number of channels, got "
                f"{_per_image(x)} and {_per_image(test_x)}"
            )
        test = Scenes(test_x, **_read_labels(arrays, "test_", len(test_x)))
    else:
        if len(x) < (1 if hold_out_all else 2):
            least = "1 image" if hold_out_all else "2 images, one of them to hold out"
            raise DataError(f"expected at least {least}, got {len(x)}")
        held_out = min(max(len(x) // 10, 1), MAX_HELD_OUT)
        first = 0 if hold_out_all else len(x) - held_out
        train, test = pick_rows(train, slice(first)), pick_rows(train, slice(first, None))
    return SceneSplits(train, test, sha256([*train, *test]))


def pick_rows(scenes: Scenes, rows: Any) -> Scenes:  # noqa: ANN401  # a slice, indices or a mask
    """Some of the scenes."""
    return Scenes._make(None if array is None else array[rows] for array in scenes)


def sample_rows(array: Array, most: int) -> Array:
    """At most so many rows of an array at random; see `sample_indices`."""
    return np.asarray(array[sample_indices(len(array), most)])


def sample_indices(size: int, most: int) -> Array:
    """At most so many indices below `size` at random, always the same ones, rising."""
    if size <= most:
        return np.arange(size)
    return np.sort(np.random.default_rng(0).choice(size, most, replace=False))


def _read_labels(arrays: Mapping[str, Array], prefix: str, num_images: int) -> dict[str, Array]:
    """Copies of the arrays of one split other than its images, of the types in `LABELS`."""
    sizes = {"N": num_images}
    found = {}
    for name, spec in LABELS.items():
        if prefix + name in arrays:
            array = arrays[prefix + name]
            _check_array(prefix + name, array, spec, sizes)
            with np.errstate(over="ignore"):  # a box beyond float32 is infinite
                found[name] = np.array(array, spec.dtype)
    return found


def _check_array(name: str, array: Array, spec: ArraySpec, sizes: dict[str, int]) -> None:
    """Checks an array against its specification; adds lengths of new axes to `sizes`."""
    lengths = ", ".join(str(sizes.get(str(axis), axis)) for axis in spec.axes)
    problem = f"expected {name} {spec.dtype} [{lengths}], got {array.dtype} {list(array.shape)}"
    if len(array.shape) != len(spec.axes) or not np.can_cast(array.dtype, spec.dtype, "same_kind"):
        raise DataError(problem)
    if len(array) != sizes["N"]:
        raise DataError(
            f"expected an entry of {name} for each of the {sizes['N']} images, got {len(array)}"
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
    channels = x.shape[1] if x.ndim == 4 else 1
    return f"{x.shape[-1]} x {x.shape[-2]} x {channels}"
