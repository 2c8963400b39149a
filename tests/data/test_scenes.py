"""Files of scenes: what fits is read, what does not is named, and nothing is ever unpickled."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from air.data.digits import DataError
from air.data.scenes import Scenes, load_file, write_scenes

X = np.random.default_rng(0).integers(0, 256, (30, 12, 12), np.uint8)
COUNTS, LABELS, BOXES = np.arange(30) % 3, np.zeros((30, 2), int), np.zeros((30, 2, 4))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read(tmp_path: Path) -> None:
    for x in (X, X.reshape(10, 3, 12, 12)):
        n = len(x)
        scenes = Scenes(x, COUNTS[:n], COUNTS[:n], LABELS[:n], BOXES[:n])
        write_scenes(tmp_path / "x.npz", scenes, scenes)
        train, test, _ = load_file(tmp_path / "x.npz")
        for read in (train, test):
            assert np.array_equal(read.x, x)
            assert np.array_equal(np.asarray(read.counts), COUNTS[: len(x)])


def test_one_channel_is_none(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", x=X[:, None], test_x=X)
    train, test, _ = load_file(tmp_path / "one.npz")
    assert train.x.shape == test.x.shape == X.shape


def test_files_of_others(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=X, y=np.array([[1], [2, 3]], object))  # y: as in Pyro's file
    train, test, _ = load_file(tmp_path / "x.npz")
    assert [train.x.tobytes(), test.x.tobytes()] == [X[:27].tobytes(), X[27:].tobytes()]
    assert train[1:] == test[1:] == (None,) * 4
    some: dict[str, Any] = {"counts": COUNTS.astype("i1"), "boxes": BOXES, "test_x": X[:5]}
    np.savez(tmp_path / "all.npz", x=X, labels=LABELS.astype("i4"), test_counts=COUNTS[:5], **some)
    train, test, _ = load_file(tmp_path / "all.npz")
    assert [a.dtype.name for a in train if a is not None] == ["uint8", "int64", "int64", "float32"]
    assert (len(test.x), *test[2:]) == (5, None, None, None)


def test_foreign_arrays_are_named(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"y": X}, "x is not a file in the archive"),
        ({"x": X.astype("u2")}, r"x uint16 \(30, 12, 12\), not uint8 NCHH"),
        ({"x": X[:, :9]}, r"x uint8 \(30, 9, 12\), not uint8 NCHH"),
        ({"x": X[:1]}, r"x uint8 \(1, 12, 12\), not uint8 NCHH, N > 1"),
        ({"x": X.astype(object)}, "Object arrays cannot be loaded"),
        ({"x": X, "counts": COUNTS[1:]}, r"counts int64 \(29,\), not i8 N,"),
        ({"x": X, "counts": COUNTS / 1}, r"counts float64 \(30,\), not i8 N,"),
        ({"x": X, "counts": -COUNTS}, "counts int64"),
        ({"x": X, "boxes": BOXES[..., :3]}, r"boxes float64 \(30, 2, 3\), not f4 NM4,"),
        ({"x": X, "labels": LABELS[:, :1], "boxes": BOXES}, r"boxes float64 \(30, 2, 4\)"),
        ({"x": X[:, None][:, :0]}, r"x uint8 \(30, 0, 12, 12\), not uint8 NCHH"),
        ({"x": X[:, :0, :0]}, r"x uint8 \(30, 0, 0\), not uint8 NCHH"),
        ({"x": X[0]}, r"x uint8 \(12, 12\), not uint8 NCHH"),
        ({"x": X[:, None], "test_x": X.reshape(10, 3, 12, 12)}, r"test_x uint8 \(10, 3, 12, 12\)"),
        ({"x": X, "test_x": X[:, 1:, 1:]}, r"test_x uint8 \(30, 11, 11\), not uint8 NCHH"),
    ]
    for arrays, problem in cases:
        np.savez(path := tmp_path / "mine.npz", **arrays)
        with pytest.raises(DataError, match=f"^{path}: expected scenes, got .*{problem}"):
            load_file(path)


def test_foreign_files_are_refused_and_never_unpickled(tmp_path: Path) -> None:
    (tmp_path / "pickle.npz").write_bytes(b"cbuiltins\nexit\n(tR.")  # would end the program
    (tmp_path / "text.npz").write_text("x")
    np.save(tmp_path / "array.npy", X)
    for path in map(tmp_path.joinpath, [*files(tmp_path), "missing.npz", "."]):
        with pytest.raises(DataError, match=f"^{path}: expected scenes, got [^\n]*$"):
            load_file(path)
