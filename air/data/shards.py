"""Scenes in .npy files that need not fit into memory: read where and when they are needed."""

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from air.data.digits import Array, DataError, sha256
from air.data.scenes import FORM, Scenes, SceneSplits, load_file, number_held_out, read_split

MAX_HASHED = 1000  # scenes that go into the hash, evenly spread: to read all might take hours
_NAME = re.compile(rf"((?:test_)?(?:{'|'.join(FORM)}))(?:-.*)?\.npy")


class Shards:
    """Arrays one behind the other, as one array of rows none of which is in memory.

    A slice of it is the same kind of thing, but rows by a step or by rising indices are read.

    Args:
        parts: Memory-mapped arrays.

    Raises:
        ValueError: If they differ in more than their lengths.
    """

    def __init__(self, parts: Sequence[Array]) -> None:
        forms = {(part.dtype, part.shape[1:]) for part in parts}
        if len(forms) > 1:
            raise ValueError(f"parts of {len(forms)} forms: {forms}")
        self.parts = parts
        self._begins = [0, *accumulate(len(part) for part in parts)]
        self.shape = self._begins[-1], *parts[0].shape[1:]
        self.dtype, self.ndim = parts[0].dtype, len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Array) -> Any:  # noqa: ANN401
        if not isinstance(rows, slice):
            edges = np.searchsorted(rows, self._begins)
            read = zip(self.parts, self._begins, pairwise(edges), strict=False)
            return np.concatenate([p[rows[low:high] - begin] for p, begin, (low, high) in read])
        start, stop, step = rows.indices(len(self))
        if step != 1:
            return self[np.arange(start, stop, step)]
        found = zip(self.parts, self._begins, strict=False)
        cut = [p[max(start - begin, 0) : max(stop - begin, 0)] for p, begin in found]
        return Shards([p for p in cut if len(p)] or cut[:1])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:  # noqa: ANN401
        return np.concatenate(self.parts, dtype=dtype)


def load_data(path: Path, *, hold_out_all: bool = False) -> SceneSplits:
    """Scenes of one's own, by `scene_files.load_file` or, from .npy files, by `map_scenes`."""
    load = map_scenes if path.is_dir() or path.suffix == ".npy" else load_file
    return load(path, hold_out_all=hold_out_all)


def map_scenes(path: Path, *, hold_out_all: bool = False) -> SceneSplits:
    """Scenes of which those to train on stay in their files.

    Args:
        path: A .npy file of images, or a folder of x.npy, counts.npy, ..., test_x.npy, ... as they
            are in an .npz file, each whole or in parts: x-0.npy, x-1.npy, ...
        hold_out_all: Where there is no test_x, hold out all of x and not a part.

    Returns:
        Training scenes whose x is a `Shards` and which have nothing else, held-out scenes in
        memory, and the SHA-256 of these and of some of the former.

    Raises:
        DataError: If there are no scenes; the message is one line for the user.
    """
    try:
        arrays = _map_arrays(path)
        x = arrays["x"]
        lengths = {name: len(a) for name, a in arrays.items() if not name.startswith("test_")}
        if len(set(lengths.values())) > 1 or x.dtype != np.uint8:
            raise ValueError(f"lengths {lengths}, x of {x.dtype}, not uint8")
        held_out = {name: np.asarray(a) for name, a in arrays.items() if name.startswith("test_")}
        if "test_x" not in held_out:
            held = number_held_out(len(x), hold_out_all)
            held_out = {f"test_{name}": np.asarray(arrays[name][-held:]) for name in lengths}
            x = x[:-held]
        test = read_split(held_out, "test_", {"4": 4})
        if x.shape[1:] != test.x.shape[1:] or (len(x) < 2 and not hold_out_all):
            raise ValueError(f"x {x.shape}, test_x {test.x.shape}")
    except Exception as error:  # foreign bytes make NumPy raise anything
        raise DataError(f"{path}: expected scenes, got {error}") from error
    some = np.asarray(x[:: max(len(x) // MAX_HASHED, 1)])
    hashed = sha256([np.array(x.shape), some, *test])
    train: Any = x  # as good as an array, where batches are drawn
    return SceneSplits(Scenes(train, None, None, None, None), test, hashed)


def _map_arrays(path: Path) -> dict[str, Shards]:
    """The arrays of a folder, or the one of a file, by name."""

    def in_numbers(file: Path) -> list[tuple[int, str]]:  # x-2 is before x-10
        return [(int(part or 0), "") if part.isdigit() else (0, part)
                for part in re.split(r"(\d+)", file.name)]  # fmt: skip

    named: dict[str, list[Array]] = defaultdict(list)
    for file in sorted(path.iterdir(), key=in_numbers) if path.is_dir() else [path]:
        match = _NAME.fullmatch(file.name)
        if match or file == path:
            part = np.load(file, mmap_mode="r", allow_pickle=False)
            if part.ndim == 4 and part.shape[1] == 1:  # as it is in memory
                part = part[:, 0]
            named[match[1] if match and file != path else "x"].append(part)
    for name, parts in named.items():
        if path.is_dir() and (path / f"{name}.npy").exists() and len(parts) > 1:
            raise ValueError(f"{name}.npy beside parts of it")
    if "x" not in named:
        raise ValueError("no x.npy, and no x-0.npy, x-1.npy, ...")
    return {name: Shards(parts) for name, parts in named.items()}
