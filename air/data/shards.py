"""Scenes in .npy files that may be larger than memory: rows are read when they are needed."""

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from air.data.arrays import Array, DataError, sha256
from air.data.scenes import (
    ARRAY_SPECS,
    Scenes,
    SceneSplits,
    first_held_out,
    load_file,
    read_split,
)

MAX_HASHED = 1000  # scenes in the hash, evenly spread: reading all could take hours
_FILE_NAME = re.compile(rf"((?:test_)?(?:{'|'.join(ARRAY_SPECS)}))(?:-.*)?\.npy")


class Shards:
    """Memory-mapped arrays that are indexed like one array, their concatenation.

    A slice of step 1 is again a `Shards`; other slices and rising indices read their rows.

    Args:
        parts: The arrays.

    Raises:
        ValueError: If the arrays differ in type, or in shape beyond their lengths.
    """

    def __init__(self, parts: Sequence[Array]) -> None:
        kinds = {(part.dtype, part.shape[1:]) for part in parts}
        if len(kinds) > 1:
            raise ValueError(f"expected parts of one type and shape, got {kinds}")
        self.parts = parts
        self._starts = [0, *accumulate(len(part) for part in parts)]
        self.shape = (self._starts[-1], *parts[0].shape[1:])
        self.dtype = parts[0].dtype
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Array) -> Any:  # noqa: ANN401
        if not isinstance(rows, slice):
            return self._read(rows)
        start, stop, step = rows.indices(len(self))
        if step != 1:
            return self._read(np.arange(start, stop, step))
        cut = [
            part[max(start - first, 0) : max(stop - first, 0)]
            for part, first in zip(self.parts, self._starts, strict=False)
        ]
        return Shards([part for part in cut if len(part)] or cut[:1])

    def _read(self, rows: Array) -> Array:
        """The rows of these rising indices, in memory."""
        bounds = pairwise(np.searchsorted(rows, self._starts))  # of the indices in each part
        parts = zip(self.parts, self._starts, bounds, strict=False)
        return np.concatenate([part[rows[low:high] - first] for part, first, (low, high) in parts])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:  # noqa: ANN401
        return np.concatenate(self.parts, dtype=dtype)


def load_data(path: Path, *, hold_out_all: bool = False) -> SceneSplits:
    """Loads scenes of one's own, by `load_file` or, from .npy files, by `map_scenes`."""
    load = map_scenes if path.is_dir() or path.suffix == ".npy" else load_file
    return load(path, hold_out_all=hold_out_all)


def map_scenes(path: Path, *, hold_out_all: bool = False) -> SceneSplits:
    """Memory-maps training scenes and loads held-out scenes.

    Args:
        path: A .npy file of images, or a folder of x.npy, counts.npy, ..., test_x.npy, ..., with
            the arrays of `load_file`. Each array may be split into files: x-0.npy, x-1.npy, ...
        hold_out_all: If there is no test_x, hold out all scenes instead of the last tenth.

    Returns:
        Training scenes with x, a `Shards`, alone; held-out scenes in memory; the SHA-256 of the
        held-out scenes and of `MAX_HASHED` or more training scenes.

    Raises:
        DataError: If the files have no scenes; the message is one line for the user.
    """
    try:
        x, held_out = _split(_map_arrays(path), hold_out_all)
        test = read_split(held_out, "test_")
        if x.shape[1:] != test.x.shape[1:]:
            raise ValueError(f"expected x and test_x of one shape, got {x.shape}, {test.x.shape}")
        if len(x) < 2 and not hold_out_all:
            raise ValueError(f"expected at least 2 training scenes, got {len(x)}")
    except Exception as error:  # NumPy raises errors of many types for foreign bytes
        raise DataError(f"{path}: no scenes: {error}") from error
    some = np.asarray(x[:: max(len(x) // MAX_HASHED, 1)])
    hashed = sha256([np.array(x.shape), some, *test])
    train: Any = x  # batches are drawn from it as from an array
    return SceneSplits(Scenes(train, None, None, None, None), test, hashed)


def _split(arrays: dict[str, Shards], hold_out_all: bool) -> tuple[Shards, dict[str, Array]]:
    """The training images, and the arrays test_x, ... of the held-out scenes in memory."""
    x = arrays["x"]
    lengths = {name: len(array) for name, array in arrays.items() if not name.startswith("test_")}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"expected arrays of one length, got lengths {lengths}")
    if x.dtype != np.uint8:
        raise ValueError(f"expected x uint8, got {x.dtype}")
    if "test_x" in arrays:
        named = {name: array for name, array in arrays.items() if name not in lengths}
        return x, {name: np.asarray(array) for name, array in named.items()}
    first = first_held_out(len(x), hold_out_all)
    return x[:first], {f"test_{name}": np.asarray(arrays[name][first:]) for name in lengths}


def _map_arrays(path: Path) -> dict[str, Shards]:
    """Memory-maps the arrays of a folder, or the array x of one file."""
    if not path.is_dir():
        return {"x": Shards([_map_file(path)])}
    parts: dict[str, list[Array]] = defaultdict(list)
    for file in sorted(path.iterdir(), key=_natural_order):
        if match := _FILE_NAME.fullmatch(file.name):
            parts[match[1]].append(_map_file(file))
    for name in parts:
        if (path / f"{name}.npy").exists() and len(parts[name]) > 1:
            raise ValueError(f"expected {name}.npy or parts of it, got both")
    if "x" not in parts:
        raise ValueError("expected x.npy, or x-0.npy, x-1.npy, ..., got no x")
    return {name: Shards(arrays) for name, arrays in parts.items()}


def _map_file(file: Path) -> Array:
    array: Array = np.load(file, mmap_mode="r", allow_pickle=False)
    is_grey = array.ndim == 4 and array.shape[1] == 1  # images [N, 1, H, H]
    return array[:, 0] if is_grey else array


def _natural_order(file: Path) -> list[Any]:
    """A sort key that puts x-2.npy before x-10.npy."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)]
