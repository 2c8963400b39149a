"""Images in .npy files that may be larger than memory: rows are read when they are needed."""

import re
from collections import defaultdict
from collections.abc import Sequence
from copy import copy
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from air.data.arrays import Array, DataError, sha256
from air.data.preparation import (
    CHUNK,
    ImageSettings,
    prepare,
    prepare_channels_first,
    to_channels_first,
)
from air.data.scenes import ARRAY_NAMES, IMAGES, SceneSplits, split_scenes

MAX_HASHED = 1000  # scenes in the hash, evenly spread: reading all could take hours
_FILE_NAME = re.compile(rf"({'|'.join(ARRAY_NAMES)})(?:-.*)?\.npy")


class Shards:
    """Memory-mapped arrays of images that are indexed like one array of bytes.

    A slice of step 1 is again a `Shards`; other slices and rising indices read their rows and
    prepare them.

    Args:
        parts: Images of any type and layout that `prepare` takes.
        settings: How to prepare them.
        name: Their name in messages.

    Raises:
        DataError: If the arrays differ in type, or in shape beyond their lengths, or cannot be
            prepared; also from every read of images that cannot be prepared.
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self, parts: Sequence[Array], settings: ImageSettings | None = None, name: str = "x"
    ) -> None:
        _check_parts(parts, name)
        self.settings, self.name = settings or ImageSettings(), name
        one = np.array(to_channels_first(parts[0], name)[:1])
        first, _ = prepare_channels_first(one, self.settings, name)
        self.shape, self.ndim = first.shape, first.ndim
        self._set_parts(parts)

    def _set_parts(self, parts: Sequence[Array]) -> None:
        self.parts = parts
        self._starts = [0, *accumulate(len(part) for part in parts)]
        self.shape = (self._starts[-1], *self.shape[1:])

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
        view = copy(self)  # a new one would read an image again
        view._set_parts([part for part in cut if len(part)] or cut[:1])
        return view

    def _read(self, rows: Array) -> Array:
        """The rows of these rising indices, in memory."""
        if len(rows) > CHUNK:  # memory holds few as they are: floats take eight times the bytes
            starts = range(0, len(rows), CHUNK)
            return np.concatenate([self._read(rows[start : start + CHUNK]) for start in starts])
        bounds = pairwise(np.searchsorted(rows, self._starts))  # of the indices in each part
        parts = zip(self.parts, self._starts, bounds, strict=False)
        found = [part[rows[low:high] - first] for part, first, (low, high) in parts]
        return prepare(np.concatenate(found), self.settings, self.name)[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:  # noqa: ANN401
        return self._read(np.arange(len(self))).astype(dtype or self.dtype, copy=False)


def map_scenes(
    path: Path | str, settings: ImageSettings | None = None, *, hold_out_all: bool = False
) -> SceneSplits:
    """Memory-maps training images, and loads held-out scenes.

    Args:
        path: A .npy file of images, or a folder of x.npy, counts.npy, ..., test_x.npy, ..., with
            the arrays of `load_file`. Each array may be split into files: x-0.npy, x-1.npy, ...
        settings: How to prepare the images.
        hold_out_all: If there is no test_x, hold out all scenes instead of the last tenth.

    Returns:
        Training scenes with x, a `Shards`; held-out scenes in memory; the SHA-256 of the held-out
        scenes and of `MAX_HASHED` or more training scenes.

    Raises:
        DataError: If the files have no scenes; the message is one line for the user.
    """
    arrays: dict[str, Any] = {}
    for name, parts in map_arrays(path).items():
        if name in IMAGES:
            arrays[name] = Shards(parts, settings, f"{path}: {name}")
        else:
            _check_parts(parts, f"{path}: {name}")
            arrays[name] = np.concatenate(parts)
    try:
        train, test = split_scenes(arrays, hold_out_all=hold_out_all)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    test = test._replace(x=np.asarray(test.x))
    some = np.asarray(train.x[:: max(len(train.x) // MAX_HASHED, 1)])  # which checks them too
    return SceneSplits(train, test, sha256([np.array(train.x.shape), some, *test]))


def holds_arrays(folder: Path) -> bool:
    """Whether a folder holds arrays of scenes, x.npy or x-....npy among them."""
    return any(folder.glob("x.npy")) or any(folder.glob("x-*.npy"))


def map_arrays(path: Path | str) -> dict[str, list[Array]]:
    """Memory-maps the arrays of a folder, or the array x of one file; each as its parts.

    Raises:
        DataError: If one of the files is no array, or there is no x.
    """
    path = Path(path)
    parts: dict[str, list[Array]] = defaultdict(list)
    if not path.is_dir():
        parts["x"] = [_map_file(path)]
    else:
        for file in sorted(path.iterdir(), key=natural_order):
            if match := _FILE_NAME.fullmatch(file.name):
                parts[match[1]].append(_map_file(file))
    for name in parts:
        if (path / f"{name}.npy").exists() and len(parts[name]) > 1:
            raise DataError(f"{path}: expected {name}.npy or parts of it, got both")
    if "x" not in parts:
        raise DataError(f"{path}: expected x.npy or its parts x-0.npy, x-1.npy, ..., got no x")
    return parts


def _check_parts(parts: Sequence[Array], name: str) -> None:
    kinds = {(str(part.dtype), part.shape[1:]) for part in parts}
    if len(kinds) > 1:
        held = " and ".join(f"{kind} {list(shape)}" for kind, shape in sorted(kinds)[:2])
        raise DataError(f"{name}: expected parts of one type and shape, got {held}")


def _map_file(file: Path) -> Array:
    try:
        array: Array = np.lib.format.open_memmap(file, mode="r")  # refuses Python objects
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or 'damaged'}") from error
    except Exception as error:  # NumPy raises errors of many types for foreign bytes
        raise DataError(f"{file}: damaged, or no .npy file of numbers") from error
    if array.ndim == 0:
        raise DataError(f"{file}: expected an array, got a single number")
    return array


def natural_order(file: Path | str) -> tuple[list[Any], str]:
    """A sort key that puts x-2.npy before x-10.npy, and x-01.npy before x-1.npy."""
    parts = re.split(r"(\d+)", str(file))
    return [int(part) if part.isdecimal() else part for part in parts], str(file)
