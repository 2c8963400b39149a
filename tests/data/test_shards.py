"""Scenes in .npy files are indexed like one array, and are the scenes of the .npz file."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import SMALL
from helpers import run as run_main

from air.data.arrays import Array, DataError
from air.data.scenes import load_file, write_scenes
from air.data.shards import Shards, load_data
from multi_mnist import SceneSettings, load_scenes


@pytest.mark.parametrize("lengths", [[7], [1, 1, 5], [3, 4], [2, 0, 5]])
def test_shards_are_indexed_like_one_array(lengths: list[int]) -> None:
    rows = np.arange(7 * 6).reshape(7, 2, 3)
    shards = Shards(np.split(rows, np.cumsum(lengths)[:-1]))
    assert (shards.shape, shards.dtype, shards.ndim, len(shards)) == ((7, 2, 3), rows.dtype, 3, 7)
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
    with pytest.raises(ValueError, match=r"expected parts of one type and shape, got .*\(\d, \d\)"):
        Shards([rows, rows[:, :1]])


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
    whole, mapped = load_file(npz), load_data(tmp_path / "folder")
    assert isinstance(mapped.train.x, Shards)
    np.testing.assert_array_equal(mapped.train.x, whole.train.x)
    for ours, its in zip(mapped.test, whole.test, strict=True):
        np.testing.assert_array_equal(ours, its)
    assert mapped.sha256 == load_data(tmp_path / "folder").sha256
    np.save(tmp_path / "folder" / "x-0.npy", 255 - x[:6])
    assert mapped.sha256 != load_data(tmp_path / "folder").sha256


def test_the_last_images_of_a_file_are_held_out(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (30, 1, 9, 9), np.uint8)
    np.save(tmp_path / "images.npy", x)
    train, test, _ = load_data(tmp_path / "images.npy")
    np.testing.assert_array_equal(train.x, x[:27, 0])
    np.testing.assert_array_equal(test.x, x[27:, 0])
    assert (test.counts, test.boxes) == (None, None)
    train, test, _ = load_data(tmp_path / "images.npy", hold_out_all=True)
    np.testing.assert_array_equal(test.x, x[:, 0])


def test_arrays_that_are_no_scenes_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    bad: dict[str, tuple[Array, str]] = {
        "x-0.npy": (np.zeros((4, 9, 9)), "uint8"),
        "x-1.npy": (np.zeros((4, 9, 8), np.uint8), "no scenes: expected"),
        "counts.npy": (np.zeros(3, int), "lengths"),
        "test_x.npy": (np.zeros((4, 8, 8), np.uint8), "no scenes: expected .* one shape"),
    }
    with pytest.raises(DataError, match=r"expected x\.npy, .* got no x"):
        load_data(folder)
    for name, (array, problem) in bad.items():
        if name != "x-0.npy":
            np.save(folder / "x.npy", np.zeros((40, 9, 9), np.uint8))
        np.save(folder / name, array)
        with pytest.raises(DataError, match=problem) as refused:
            load_data(folder)
        assert "\n" not in str(refused.value)
        (folder / name).unlink()
    for content in (b"", b"\x93NUMPY", (folder / "x.npy").read_bytes()[:300]):
        (tmp_path / "damaged.npy").write_bytes(content)
        with pytest.raises(DataError, match="no scenes"):
            load_data(tmp_path / "damaged.npy")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(DataError, match="no scenes"):
        load_data(tmp_path / "objects.npy")


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
