"""Scenes in .npy files are indexed like one array, and are the scenes of the .npz file."""

import json
import pickle
import tempfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import SMALL
from helpers import run as run_main

from air.data.arrays import Array, DataError
from air.data.preparation import ImageSettings
from air.data.scenes import load_file, write_scenes
from air.data.shards import Shards, map_scenes, natural_order
from multi_mnist import SceneSettings, load_scenes


@pytest.mark.parametrize("lengths", [[7], [1, 1, 5], [3, 4], [2, 0, 5], [0, 7]])
def test_shards_are_indexed_like_one_array(lengths: list[int]) -> None:
    rows = np.arange(7 * 9, dtype=np.uint8).reshape(7, 3, 3)
    shards = Shards(np.split(rows, np.cumsum(lengths)[:-1]))
    assert (shards.shape, shards.dtype, shards.ndim, len(shards)) == ((7, 3, 3), rows.dtype, 3, 7)
    np.testing.assert_array_equal(shards, rows)
    for low in range(-8, 9):
        for high in range(-8, 9):
            cut = shards[low:high]
            assert isinstance(cut, Shards)
            np.testing.assert_array_equal(cut, rows[low:high])
            for step in (2, 3, 10):
                np.testing.assert_array_equal(shards[low:high:step], rows[low:high:step])
    for indices in ([], [0], [6], [0, 0, 2, 2, 3], list(range(7))):
        chosen = np.array(indices, int)
        np.testing.assert_array_equal(shards[chosen], rows[chosen])
    for other in (rows[:, :1], rows[:, None], rows / 255):
        with pytest.raises(
            DataError, match=r"^x: expected parts of one type and shape, got .*uint8"
        ):
            Shards([rows, other])


def test_many_rows_are_read_as_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.arange(70 * 9, dtype=np.uint16).reshape(70, 3, 3) * 100
    shards = Shards([rows[:33], rows[33:]])
    at_once = np.asarray(shards)
    monkeypatch.setattr("air.data.shards.CHUNK", 4)
    np.testing.assert_array_equal(shards, at_once)
    np.testing.assert_array_equal(shards[np.arange(3, 50, 2)], at_once[3:50:2])


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    scenes = load_scenes(SceneSettings(num_scenes=60, num_test_scenes=12), cache_dir=tmp_path)
    write_scenes(tmp_path / "scenes.npz", scenes.train, scenes.test)
    return tmp_path / "scenes.npz"


def test_an_unzipped_file_holds_the_same_scenes(npz: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(npz) as archive:
        archive.extractall(tmp_path / "folder")
    x = np.load(tmp_path / "folder" / "x.npy")
    (tmp_path / "folder" / "x.npy").unlink()
    for k, part in enumerate(np.array_split(x, 11)):  # x-10 comes after x-2
        np.save(tmp_path / "folder" / f"x-{k}.npy", part)
    whole, mapped = load_file(npz), map_scenes(tmp_path / "folder")
    assert isinstance(mapped.train.x, Shards)
    np.testing.assert_array_equal(mapped.train.x, whole.train.x)
    for ours, its in zip(mapped.test, whole.test, strict=True):
        np.testing.assert_array_equal(ours, its)
    assert mapped.sha256 == map_scenes(str(tmp_path / "folder")).sha256
    np.save(tmp_path / "folder" / "x-0.npy", 255 - x[:6])
    assert mapped.sha256 != map_scenes(tmp_path / "folder").sha256


@pytest.mark.parametrize("held_out", [True, False])
def test_files_are_prepared_as_in_memory(held_out: bool, tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((30, 12, 9, 3)).astype(">f4")
    counts = (np.arange(30) % 3).astype(">u2")
    arrays = {"x": x, "counts": counts} | ({"test_x": x[:7]} if held_out else {})
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    settings = ImageSettings(x_size=8, crop=False, channels=1, invert=True)
    whole, mapped = load_file(tmp_path / "a.npz", settings), map_scenes(tmp_path, settings)
    for ours, its in zip([*mapped.train, *mapped.test], [*whole.train, *whole.test], strict=True):
        np.testing.assert_array_equal(ours, its)
        assert ours is None or ours.dtype == np.asarray(its).dtype
    batch = mapped.train.x[np.array([0, 2, 2, 5])]
    np.testing.assert_array_equal(batch, whole.train.x[[0, 2, 2, 5]])


def test_the_last_images_of_a_file_are_held_out(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (30, 1, 9, 9), np.uint8)
    np.save(tmp_path / "images.npy", x)
    train, test, _ = map_scenes(tmp_path / "images.npy")
    np.testing.assert_array_equal(train.x, x[:27, 0])
    np.testing.assert_array_equal(test.x, x[27:, 0])
    assert (test.counts, test.boxes) == (None, None)
    train, test, _ = map_scenes(tmp_path / "images.npy", hold_out_all=True)
    np.testing.assert_array_equal(test.x, x[:, 0])
    np.save(tmp_path / "images.npy", np.asfortranarray(x[:19]))  # few are no fault
    assert len(map_scenes(tmp_path / "images.npy").train.x) == 18


def refused(path: Path, problem: str) -> None:
    with pytest.raises(DataError, match=problem) as error:
        map_scenes(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


OK = np.zeros((40, 9, 9), np.uint8)


@pytest.mark.parametrize(
    ("name", "array", "problem"),
    [
        ("x-0", OK, "expected x.npy or parts of it, got both"),
        ("x", OK[:1], "expected at least 2 images, .* got 1"),
        ("x", OK[:0], "expected at least 2 images, .* got 0"),
        ("x", OK[0], "x has the shape 9 x 9"),
        ("x", np.zeros(3), "x has the shape 3: "),
        ("x", np.array(3), "x.npy: expected an array, got a single number"),
        ("x", OK.astype(int), r"x is int64: expected .*astype\('uint8'\)"),
        ("x", OK[:, :8], "x has images of 9 x 8 pixels, which are not square"),
        ("x", np.full((40, 9, 9), 255.0), "x is float64 from 255 to 255: .*; divide by 255"),
        ("x", np.zeros((40, 9, 9), "i4,f4"), "x is .*: expected bool, uint8"),
        ("x", OK.astype("M8[s]"), "x is datetime64"),
        ("counts", np.zeros(3, int), "an entry of counts for each image of x, got 3 for 40 images"),
        ("counts", np.zeros(40), r"expected counts int64 \[40\], got float64"),
        ("counts", np.zeros(40, "i4,f4"), "expected counts int64"),
        ("counts", np.array(4), "counts.npy: expected an array, got a single number"),
        ("counts", np.full(40, 2**40), "expected counts of .* at most 10,000, got 1099511627776"),
        ("test_x", np.zeros((4, 8, 8), np.uint8), "one size .*, got 9 x 9 x 1 and 8 x 8 x 1"),
        ("test_x", OK[:0], "expected images in x and test_x, got 40 and 0"),
    ],
)
def test_arrays_that_are_no_scenes_are_named(
    name: str, array: Array, problem: str, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    np.save(folder / "x.npy", OK)
    np.save(folder / f"{name}.npy", array)
    refused(folder, problem)


def test_parts_that_differ_are_named(tmp_path: Path) -> None:
    for name, one, other in (
        ("x", OK, OK[:, :8]),
        ("x", OK, OK > 0),
        ("counts", np.zeros(40, int), np.zeros(40, "i4,f4")),
        ("boxes", np.zeros((40, 1, 4)), np.zeros((40, 2, 4))),
    ):
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        np.save(folder / "x-0.npy", OK)
        np.save(folder / f"{name}-0.npy", one)
        np.save(folder / f"{name}-1.npy", other)
        refused(folder, f": {name}: expected parts of one type and shape, got ")


def test_foreign_and_damaged_files_are_named_and_never_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    refused(tmp_path, r"expected x\.npy or its parts .*, got no x")
    refused(path, "No such file")
    np.save(path, OK)
    whole = path.read_bytes()
    long = whole.replace(b"(40, 9, 9), }", b"(9**9, 9, 9)}").replace(b"9**9", b"9999")
    pickled = pickle.dumps([1, 2])
    for content in (b"", b"\x93NUMPY", whole[:300], long, b"cbuiltins\nexit\n(tR.", pickled, b"PK"):
        path.write_bytes(content)
        refused(path, "a.npy: damaged, or no .npy file of numbers")
    np.savez(tmp_path / "b.npz", x=OK)
    (tmp_path / "b.npz").rename(tmp_path / "b.npy")
    refused(tmp_path / "b.npy", "b.npy: damaged, or no .npy file of numbers")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)  # to see it refused
    refused(tmp_path / "objects.npy", "damaged, or no .npy file of numbers")
    (tmp_path / "folder" / "x.npy").mkdir(parents=True)
    refused(tmp_path / "folder", "x.npy: Is a directory")


def test_a_value_out_of_range_is_named_when_it_is_read(tmp_path: Path) -> None:
    x = np.zeros((4000, 3, 3), np.float32)
    x[1001, 1, 1] = 255
    np.save(tmp_path / "x.npy", x)
    train = map_scenes(tmp_path).train.x  # looks at every third image
    assert (train[:1001].shape, train[1002:].shape) == ((1001, 3, 3), (2598, 3, 3))
    with pytest.raises(DataError, match=f"^{tmp_path}: x is float32 from 0 to 255: .*divide by"):
        train[np.arange(990, 1010)]


def test_memory_holds_few_of_the_images(tmp_path: Path) -> None:
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float64, (20_000, 20, 20))
    del x  # 64 MB on disk
    tracemalloc.start()
    scenes = map_scenes(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(scenes.train.x), len(scenes.test.x)) == (18_000, 2000)
    assert peak < 20e6


def test_files_are_in_their_natural_order() -> None:
    names = ["x-01.npy", "x-1.npy", "x-2.npy", "x-2a.npy", "x-10.npy", "x-²", "x-٣", "y"]
    expected = ["x-01.npy", "x-1.npy", "x-2.npy", "x-2a.npy", "x-٣", "x-10.npy", "x-²", "y"]
    assert sorted(names, key=natural_order) == expected
    assert sorted(reversed(names), key=natural_order) == expected


@pytest.mark.slow
def test_the_program_trains_on_a_folder_as_on_the_file(
    npz: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    with zipfile.ZipFile(npz) as archive:
        archive.extractall(tmp_path / "folder")
    flags = SMALL.split(" -n ")[1]
    elbos = []
    for data in (npz, tmp_path / "folder"):
        done = run_main(f"-n {flags} --data {data} --output-dir {data}-run", tmp_path, environment)
        assert done.returncode == 0, done.stderr
        lines = Path(f"{data}-run/metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        elbos.append([(r["step"], r.get("elbo"), r.get("eval_elbo")) for r in records])
    assert elbos[0] == elbos[1]
    resumed = run_main(f"--resume {tmp_path / 'folder-run'} -n 6", tmp_path, environment)
    assert resumed.returncode == 0, resumed.stderr
