"""Files of scenes are read and checked, and are never unpickled."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from air.data.arrays import DataError
from air.data.scenes import Scenes, first_held_out, load_file, write_scenes

X = np.random.default_rng(0).integers(0, 256, (30, 12, 12), np.uint8)
COUNTS, LABELS, BOXES = np.arange(30) % 3, np.zeros((30, 2), int), np.zeros((30, 2, 4))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_written_scenes_are_read_back(tmp_path: Path) -> None:
    for x in (X, X.reshape(10, 3, 12, 12)):
        n = len(x)
        scenes = Scenes(x, COUNTS[:n], COUNTS[:n], LABELS[:n], BOXES[:n])
        write_scenes(tmp_path / "x.npz", scenes, scenes)
        train, test, _ = load_file(tmp_path / "x.npz")
        for read in (train, test):
            assert np.array_equal(read.x, x)
            assert np.array_equal(np.asarray(read.counts), COUNTS[: len(x)])


@pytest.mark.parametrize(
    ("num_scenes", "held_out"), [(2, 1), (19, 1), (20, 2), (60_000, 6000), (10**6, 10_000)]
)
def test_a_tenth_of_the_scenes_is_held_out_or_all_of_them(num_scenes: int, held_out: int) -> None:
    assert num_scenes - first_held_out(num_scenes, hold_out_all=False) == held_out
    assert first_held_out(num_scenes, hold_out_all=True) == 0


def test_all_scenes_of_a_file_can_be_held_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=X, counts=COUNTS)
    train, test, _ = load_file(tmp_path / "x.npz", hold_out_all=True)
    assert np.array_equal(test.x, X)
    assert np.array_equal(np.asarray(test.counts), COUNTS)
    assert len(train.x) == 0


def test_an_axis_of_one_channel_is_dropped(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", x=X[:, None], test_x=X)
    train, test, _ = load_file(tmp_path / "one.npz")
    assert train.x.shape == test.x.shape == X.shape


def test_optional_arrays_may_be_missing_and_other_arrays_are_ignored(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=X, y=np.array([[1], [2, 3]], object))  # y: as in Pyro's file
    train, test, _ = load_file(tmp_path / "x.npz")
    assert [train.x.tobytes(), test.x.tobytes()] == [X[:27].tobytes(), X[27:].tobytes()]
    assert train[1:] == test[1:] == (None,) * 4
    some: dict[str, Any] = {"counts": COUNTS.astype("i1"), "boxes": BOXES, "test_x": X[:5]}
    np.savez(tmp_path / "all.npz", x=X, labels=LABELS.astype("i4"), test_counts=COUNTS[:5], **some)
    train, test, _ = load_file(tmp_path / "all.npz")
    assert [a.dtype.name for a in train if a is not None] == ["uint8", "int64", "int64", "float32"]
    assert (len(test.x), *test[2:]) == (5, None, None, None)


def test_an_array_of_wrong_type_or_shape_is_named(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"y": X}, "x is not a file in the archive"),
        (
            {"x": X.astype("u2")},
            r"expected x uint8 \[N, C, H, H\], N > 1, got uint16 \(30, 12, 12\)",
        ),
        ({"x": X[:, :9]}, r"expected x uint8 .*, got uint8 \(30, 9, 12\)"),
        ({"x": X[:1]}, r"expected x uint8 .*, N > 1, got uint8 \(1, 12, 12\)"),
        ({"x": X.astype(object)}, "Object arrays cannot be loaded"),
        ({"x": X, "counts": COUNTS[1:]}, r"expected counts int64 \[30\], N > 1, got int64 \(29,\)"),
        (
            {"x": X, "counts": COUNTS / 1},
            r"expected counts int64 \[30\], N > 1, got float64 \(30,\)",
        ),
        ({"x": X, "counts": -COUNTS}, "expected counts of at least 0, got -2"),
        (
            {"x": X, "boxes": BOXES[..., :3]},
            r"expected boxes float32 \[30, M, 4\], .*, got float64 \(30, 2, 3\)",
        ),
        (
            {"x": X, "labels": LABELS[:, :1], "boxes": BOXES},
            r"expected boxes float32 \[30, 1, 4\], .*, got float64 \(30, 2, 4\)",
        ),
        ({"x": X[:, None][:, :0]}, r"expected x uint8 .*, got uint8 \(30, 0, 12, 12\)"),
        ({"x": X[:, :0, :0]}, r"expected x uint8 .*, got uint8 \(30, 0, 0\)"),
        ({"x": X[0]}, r"expected x uint8 .*, got uint8 \(12, 12\)"),
        (
            {"x": X[:, None], "test_x": X.reshape(10, 3, 12, 12)},
            r"expected test_x uint8 \[N, 1, 12, 12\], .*, got uint8 \(10, 3, 12, 12\)",
        ),
        (
            {"x": X, "test_x": X[:, 1:, 1:]},
            r"expected test_x uint8 \[N, 1, 12, 12\], .*, got uint8 \(30, 11, 11\)",
        ),
    ]
    for arrays, problem in cases:
        np.savez(path := tmp_path / "mine.npz", **arrays)
        with pytest.raises(DataError, match=f"^{path}: no scenes: .*{problem}"):
            load_file(path)


def test_foreign_files_are_refused_and_never_unpickled(tmp_path: Path) -> None:
    (tmp_path / "pickle.npz").write_bytes(b"cbuiltins\nexit\n(tR.")  # would end the program
    (tmp_path / "text.npz").write_text("x")
    np.save(tmp_path / "array.npy", X)
    for path in map(tmp_path.joinpath, [*files(tmp_path), "missing.npz", "."]):
        with pytest.raises(DataError, match=f"^{path}: no scenes: [^\n]*$"):
            load_file(path)
