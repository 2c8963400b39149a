"""Scenes are hashed, split, written and read back; arrays of other kinds are named."""

import hashlib
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, assert_refused

import air.data.scenes
from air.data.scenes import MAX_COUNT, DataError, Scenes, sha256, split_scenes, write_scenes
from air.data.user_images.preparation import ImageSettings
from air.data.user_images.sources import load_data

X = np.random.default_rng(0).integers(0, 256, (30, 12, 12), np.uint8)
COUNTS, LABELS, BOXES = np.arange(30) % 3, np.zeros((30, 2), int), np.zeros((30, 2, 4))


def test_written_scenes_are_read_back(tmp_path: Path) -> None:
    for x in (X, X.reshape(10, 3, 12, 12)):
        n = len(x)
        scenes = Scenes(x, COUNTS[:n], COUNTS[:n], LABELS[:n], BOXES[:n])
        write_scenes(str(tmp_path / "new" / "x.npz"), scenes, scenes)
        train, test, _ = load_data(str(tmp_path / "new" / "x.npz"))
        for read in (train, test):
            assert np.array_equal(read.x, x)
            assert np.array_equal(np.asarray(read.counts), COUNTS[: len(x)])
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written .*; choose another path"):
        write_scenes(tmp_path / "file" / "x.npz", scenes, scenes)


def test_the_hash_is_of_shapes_and_bytes_and_none_is_no_array(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = np.arange(6, dtype=np.uint8)
    expected = hashlib.sha256(b"(6,)" + bytes(range(6)) + b"(2, 3)" + bytes(range(6))).hexdigest()
    assert sha256([rows, None, rows.reshape(2, 3)]) == expected
    assert len({sha256([rows]), sha256([rows[:5]]), sha256([rows[::-1]]), sha256([])}) == 4
    assert sha256([rows.repeat(2)[::2]]) == sha256([rows])  # not contiguous
    monkeypatch.setattr(air.data.scenes, "LARGE_BYTES", 1000)
    large = np.zeros((20_000, 2), np.uint8)
    same = sha256([large])
    for row, is_hashed in ((20, True), (21, False), (19_980, True)):  # every 20th row
        changed = large.copy()
        changed[row] = 1
        assert (sha256([changed]) != same) == is_hashed
    assert sha256([large[:-1]]) != same


def test_scenes_are_made_and_read_without_torch() -> None:
    code = """import sys, pkgutil, importlib, air.data
sys.modules["torch"] = sys.modules["pyro"] = None
for module in pkgutil.walk_packages(air.data.__path__, "air.data."):
    importlib.import_module(module.name)
import multi_mnist"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("num_scenes", "held_out"), [(2, 1), (19, 1), (20, 2), (60_000, 6000), (10**6, 10_000)]
)
def test_a_tenth_of_the_scenes_is_held_out_or_all_of_them(num_scenes: int, held_out: int) -> None:
    x = np.zeros((num_scenes, 1, 1), np.uint8)
    assert len(split_scenes({"x": x}).test.x) == held_out
    assert len(split_scenes({"x": x}, hold_out_all=True).test.x) == num_scenes


def test_all_scenes_of_a_file_can_be_held_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=X, counts=COUNTS)
    train, test, _ = load_data(tmp_path / "x.npz", hold_out_all=True)
    assert np.array_equal(test.x, X)
    assert np.array_equal(np.asarray(test.counts), COUNTS)
    assert len(train.x) == 0
    np.savez(tmp_path / "x.npz", x=X[:1])
    assert len(load_data(tmp_path / "x.npz", hold_out_all=True).test.x) == 1
    np.savez(tmp_path / "x.npz", x=X[:0], test_x=X)
    assert len(load_data(tmp_path / "x.npz", hold_out_all=True).test.x) == 30


def test_held_out_images_are_prepared_as_training_images_are(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=X[:, None] / 255, test_x=X[..., None])
    train, test, sha256 = load_data(tmp_path / "x.npz", ImageSettings(invert=True))
    assert np.array_equal(train.x, 255 - X)
    assert np.array_equal(test.x, 255 - X)
    assert sha256 != load_data(tmp_path / "x.npz").sha256


def test_optional_arrays_may_be_missing_and_other_arrays_are_ignored(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=X, y=np.array([[1], [2, 3]], object))  # y: as in Pyro's file
    train, test, _ = load_data(tmp_path / "x.npz")
    assert [train.x.tobytes(), test.x.tobytes()] == [X[:27].tobytes(), X[27:].tobytes()]
    assert train[1:] == test[1:] == (None,) * 7
    some: dict[str, Any] = {"counts": COUNTS.astype("i1"), "boxes": BOXES, "test_x": X[:5]}
    np.savez(tmp_path / "all.npz", x=X, labels=LABELS.astype("i4"), test_counts=COUNTS[:5], **some)
    train, test, _ = load_data(tmp_path / "all.npz")
    assert [a.dtype.name for a in train if a is not None] == ["uint8", "int64", "int64", "float32"]
    assert (len(test.x), *test[2:6]) == (5, None, None, None, None)


@pytest.mark.parametrize("kind", ["?", "i1", "u1", ">i2", "u2", ">u2", "u4", "u8", ">i8"])
def test_counts_of_every_whole_type_become_int64(kind: str, tmp_path: Path) -> None:
    counts = (COUNTS % 2).astype(kind)
    np.savez(tmp_path / "x.npz", x=X, counts=counts, boxes=np.full((30, 1, 4), 1e300))
    train, test, _ = load_data(tmp_path / "x.npz")
    for scenes, expected in ((train, counts[:27]), (test, counts[27:])):
        assert scenes.counts.dtype == np.dtype("int64")
        assert scenes.counts.dtype.isnative  # torch takes no other
        assert np.array_equal(scenes.counts, expected)


CASES: list[tuple[dict[str, Any], str]] = [
    ({"y": X, "z": X}, "expected images under the name x, got y, z"),
    ({"x": X, "test_x": X * 1.0}, "test_x is float64: expected .* from 0 to 255; divide"),
    ({"x": X[:1]}, "expected at least 2 images, one of them to hold out, got 1"),
    ({"x": X[:0]}, "expected at least 2 images, one of them to hold out, got 0"),
    ({"x": X[:0], "test_x": X}, "expected training and held-out images, got 0 and 30"),
    ({"x": X, "test_x": X[:0]}, "expected training and held-out images, got 30 and 0"),
    ({"x": X, "counts": COUNTS.astype(object)}, "it contains Python objects, which are never read"),
    (
        {"x": X, "counts": COUNTS[1:]},
        "expected an entry of counts for each of the 30 images, got 29",
    ),
    ({"x": X, "test_x": X[:5], "test_counts": COUNTS}, "an entry of test_counts for each of the 5"),
    ({"x": X, "counts": COUNTS / 1}, r"expected counts int64 \[30\], got float64 \[30\]"),
    ({"x": X, "counts": COUNTS[:, None]}, r"expected counts int64 \[30\], got int64 \[30, 1\]"),
    ({"x": X, "counts": np.int64(3)}, r"expected counts int64 \[30\], got int64 \[\]"),
    ({"x": X, "counts": COUNTS.astype("m8[s]")}, r"expected counts .*, got timedelta64\[s\]"),
    ({"x": X, "counts": -COUNTS}, "expected counts of at least 0, at most 10,000, got -2"),
    ({"x": X, "counts": COUNTS + MAX_COUNT}, "expected counts of .* at most 10,000, got 10002"),
    ({"x": X, "counts": COUNTS.astype("u8") - 1}, "at most 10,000, got 18446744073709551615"),
    ({"x": X, "boxes": BOXES[..., :3]}, r"expected boxes float32 \[30, M, 4\], got .*, 2, 3\]"),
    (
        {"x": X, "labels": LABELS[:, :1], "boxes": BOXES},
        r"expected boxes float32 \[30, 1, 4\], got float64 \[30, 2, 4\]",
    ),
    (
        {"x": X[:, None], "test_x": X.reshape(10, 3, 12, 12)},
        "x and test_x of one size and number of channels, got 12 x 12 x 1 and 12 x 12 x 3",
    ),
    ({"x": X, "test_x": X[:, 1:, 1:]}, "one size .*, got 12 x 12 x 1 and 11 x 11 x 1"),
]


@pytest.mark.parametrize(("arrays", "problem"), CASES, ids=[problem for _, problem in CASES])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_arrays_of_wrong_type_or_shape_are_named(
    arrays: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "mine.npz", **arrays)
    (tmp_path / "folder").mkdir()
    for name, array in arrays.items():
        np.save(tmp_path / "folder" / f"{name}.npy", array)
    for path in [tmp_path / "mine.npz"] + [tmp_path / "folder"] * ("x" in arrays):
        assert_refused(path, f": .*{problem}", partial(load_data, path))
