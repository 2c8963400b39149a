"""Digits are the same from every form of MNIST's files; damaged files and downloads are refused."""

import gzip
import hashlib
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from helpers import files, write_idx

import air.data.synthetic.digits
from air.data.scenes import Array, DataError
from air.data.synthetic.digits import (
    MNIST_FILES,
    download_mnist,
    resize_digit,
    rotate_digit,
)
from air.multi_mnist import SceneSettings, load_scenes

SMALL = partial(SceneSettings, num_scenes=300, num_test_scenes=40)
TRAIN_IMAGES, _, TEST_IMAGES, TEST_LABELS = MNIST_FILES


def test_digits_are_rotated_about_their_centre(digits: list[Array]) -> None:
    for digit in digits[0][::400]:
        turned = rotate_digit(digit, 90.0)
        assert np.array_equal(turned, np.rot90(digit))
        there_and_back = rotate_digit(rotate_digit(digit, 30.0), -30.0).astype(float)
        assert abs(there_and_back - digit).mean() < 0.15 * digit.mean()


def test_resizing_averages_over_areas(digits: list[Array]) -> None:
    for digit, side in product(digits[0][::400], [4, 9, 16, 21, 22, 28, 31, 50]):
        # On a grid that divides both the old and the new pixels.
        fine = np.kron(digit.astype(int), np.ones((side, side), int))
        sums = fine.reshape(side, 28, side, 28).sum((1, 3))
        assert np.array_equal(resize_digit(digit, side), (sums + 392) // 784)


def test_every_form_of_idx_files_gives_the_same_scenes(digits: list[Array], tmp_path: Path) -> None:
    load = partial(load_scenes, SMALL(digits="mnist"), cache_dir=tmp_path / "cache")
    write_idx(tmp_path / "torch" / "MNIST" / "raw", digits)
    embedded = load_scenes(SMALL(), cache_dir=tmp_path / "cache").sha256
    assert load(mnist_dir=tmp_path / "torch").sha256 == embedded
    assert load(mnist_dir=write_idx(tmp_path / "plain", digits, packed=False)).sha256 == embedded
    other = write_idx(tmp_path / "other", [255 - digits[0], *digits[1:]])
    assert load(mnist_dir=other).sha256 != embedded
    for images in (digits[0][:9], digits[0] * 0):
        folder = write_idx(tmp_path / "bad", [images, *digits[1:]])
        with pytest.raises(DataError, match=r"bad: expected a label for each image, and no image"):
            load(mnist_dir=folder)


def test_a_damaged_idx_file_is_named(digits: list[Array], tmp_path: Path) -> None:
    for name, old, new, problem in (
        (TRAIN_IMAGES, slice(-1, None), b"", "cannot reshape array"),
        (TRAIN_IMAGES, slice(9, None), b"", "buffer is smaller"),
        (TRAIN_IMAGES, slice(None), gzip.compress(b"1234567")[:-9], "buffer is smaller"),
        (TEST_IMAGES, slice(4, None), bytes(12), r"header \[2051, 0, 0, 0\]"),
        (TEST_LABELS, slice(0, 4), b"\0\0\x08\x03", r"header \[2051, 1000\]"),
    ):
        data = bytearray((path := write_idx(tmp_path, digits, packed=False) / name).read_bytes())
        data[old] = new
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"^{path}: expected IDX .*, got .*{problem}"):
            load_scenes(SMALL(digits="mnist"), cache_dir=tmp_path / "c", mnist_dir=tmp_path)


def test_a_download_is_checked_and_tries_the_next_mirror(
    digits: list[Array], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, folder = write_idx(tmp_path / "served", digits), tmp_path / "mnist"
    sums = {n: hashlib.sha256((served / f"{n}.gz").read_bytes()).hexdigest() for n in MNIST_FILES}
    monkeypatch.setattr(air.data.synthetic.digits, "MNIST_FILES", sums)
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *arguments: None)
    handler = partial(SimpleHTTPRequestHandler, directory=str(served))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        mirrors = "http://127.0.0.1:9/", f"http://127.0.0.1:{server.server_port}/"  # 9 is down
        whole = (first := served / f"{TRAIN_IMAGES}.gz").read_bytes()
        first.write_bytes(gzip.compress(b"other"))
        tried = rf"{mirrors[0]} \(ConnectionError\), {mirrors[1]} \(ValueError\)"
        with pytest.raises(DataError, match=f"^MNIST: tried {tried}; get its .* --mnist-dir$"):
            download_mnist(folder, mirrors)
        assert not files(folder)
        first.write_bytes(whole)
        download_mnist(folder, mirrors)
        server.shutdown()
    assert files(folder) == files(served)
    assert len(load_scenes(SMALL(digits="mnist"), cache_dir=tmp_path).train.x) == 300
