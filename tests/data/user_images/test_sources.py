"""The same images are the same scenes, in whatever files they are stored."""

import os
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from helpers import SETTINGS, small_air, weights
from PIL import Image

from air.data.scenes import Array, DataError, Scenes
from air.data.user_images.picture_files import write_pictures
from air.data.user_images.preparation import ImageSettings, prepare
from air.data.user_images.sources import (
    find_pictures,
    is_folder_of_pictures,
    load_data,
    natural_order,
    read_images,
)
from air.evaluation import HeldOut
from air.support.images import to_tensor
from air.training import Trainer

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (30, 12, 12), np.uint8)
COLOURS = RNG.integers(0, 256, (30, 3, 12, 12), np.uint8)
AS_THEY_ARE = ImageSettings()


def save_pictures(
    folder: Path,
    x: Array = X,
    suffix: str = "png",
    mode: str | None = None,
    **options: Any,  # noqa: ANN401  # of Pillow
) -> Path:
    """Saves a picture of each image, [h, w] or [C, h, w]."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(x):
        picture = Image.fromarray(image if image.ndim == 2 else image.transpose(1, 2, 0))
        picture = picture.convert(mode) if mode else picture
        picture.save(folder / f"{i}.{suffix}", **options)
    return folder


def save_stack(path: Path, **options: Any) -> Path:  # noqa: ANN401
    first, *others = map(Image.fromarray, X)
    first.save(path, save_all=True, append_images=others, **options)
    return path


def save_npz(path: Path, x: Array) -> Path:
    with path.open("wb") as file:
        np.savez(file, x=x)
    return path


def save_npy(path: Path, x: Array) -> Path:
    with path.open("wb") as file:
        np.save(file, x)
    return path


def save_hdf5(path: Path, x: Array) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=x, compression="gzip")
    return path


def save_pt(path: Path, held: object) -> Path:
    torch.save(held, path)
    return path


WAYS: dict[str, Callable[[Path], Path]] = {
    "PNG": lambda to: save_pictures(to / "a"),
    "16-bit PNG": lambda to: save_pictures(to / "a", X.astype(np.uint16) * 257),
    "RGB PNG": lambda to: save_pictures(to / "a", mode="RGB"),
    "opaque RGBA": lambda to: save_pictures(to / "a", mode="RGBA"),
    "opaque LA": lambda to: save_pictures(to / "a", mode="LA"),
    "palette": lambda to: save_pictures(to / "a", mode="P"),
    "TIFF": lambda to: save_pictures(to / "a", suffix="TIF"),
    "float TIFF": lambda to: save_pictures(to / "a", (X / 255).astype("f4"), "tiff"),
    "BMP": lambda to: save_pictures(to / "a", suffix="bmp"),
    "GIF": lambda to: save_pictures(to / "a", suffix="gif"),
    "WebP": lambda to: save_pictures(to / "a", suffix="webp", lossless=True),
    "PGM": lambda to: save_pictures(to / "a", suffix="pgm"),
    "TIFF stack": lambda to: save_stack(to / "a.tif", compression="tiff_lzw"),
    "folder of a stack": lambda to: save_stack(to / "a.tif").parent,
    "animation": lambda to: save_stack(to / "a.png"),
    "npz": lambda to: save_npz(to / "a.npz", X),
    "npz of uint16": lambda to: save_npz(to / "a.NPZ", X.astype(np.uint16) * 257),
    "npz of float16": lambda to: save_npz(to / "a.npz", (X / 255).astype("f2")),
    "npz of float32": lambda to: save_npz(to / "a.npz", (X / 255).astype("f4")[:, None]),
    "npz of float64": lambda to: save_npz(to / "a.npz", (X / 255)[..., None]),
    "npz of big-endian": lambda to: save_npz(to / "a.npz", X.astype(">u2") * 257),
    "npy": lambda to: save_npy(to / "a.npy", X),
    "npy of Fortran": lambda to: save_npy(to / "a.NPY", np.asfortranarray(X / 255)),
    "npy in a folder": lambda to: save_npy(to / "x.npy", X[..., None]).parent,
    "npy of bytes and channels": lambda to: save_npy(to / "a.npy", X[:, None]),
    "npy of big-endian": lambda to: save_npy(to / "a.npy", (X / 255).astype(">f4")),
    "HDF5": lambda to: save_hdf5(to / "a.h5", X),
    "HDF5 of floats": lambda to: save_hdf5(to / "a.hdf5", X / 255),
    "tensor": lambda to: save_pt(to / "a.pt", torch.from_numpy(X)),
    "tensors": lambda to: save_pt(to / "a.pth", {"x": torch.from_numpy(X / 255), "n": 3}),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_same_images_are_the_same_scenes(way: str, tmp_path: Path) -> None:
    path = WAYS[way](tmp_path)
    train, test, _ = load_data(str(path))
    both = np.concatenate([train.x, test.x])
    order = np.argsort([image.tobytes() for image in both])
    expected = np.argsort([image.tobytes() for image in X])
    assert np.array_equal(both[order], X[expected])
    assert len(test.x) == 3
    assert both.dtype == np.uint8
    one_by_one = [image.pixels for image in read_images(str(path), AS_THEY_ARE)]
    assert np.array_equal(np.stack(one_by_one), X)


@pytest.mark.parametrize("way", ["PNG", "npz", "npy", "HDF5", "tensor"])
def test_names_tell_file_and_place(way: str, tmp_path: Path) -> None:
    path = WAYS[way](tmp_path)
    names = [image.name for image in read_images(path, AS_THEY_ARE)]
    expected = [str(path / f"{i}.png") if way == "PNG" else f"{path}[{i}]" for i in range(30)]
    assert names == expected


def test_lossy_pictures_are_close(tmp_path: Path) -> None:
    smooth = np.tile(np.arange(0, 240, 20, dtype=np.uint8), (30, 12, 1))
    found = load_data(save_pictures(tmp_path, smooth, "jpg", quality=95))
    assert abs(found.train.x.astype(int) - smooth[:27]).max() < 5


@pytest.mark.parametrize(
    "settings",
    [
        ImageSettings(x_size=8, crop=False),
        ImageSettings(x_size=8, crop=True, invert=True),
        ImageSettings(x_size=20, crop=False, channels=3),
        ImageSettings(channels=1),
        ImageSettings(channels=3, invert=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("x", [X, COLOURS], ids=["grey", "RGB"])
def test_every_source_is_prepared_alike(x: Array, settings: ImageSettings, tmp_path: Path) -> None:
    expected, placement = prepare(x, settings)
    last = x.transpose(0, 2, 3, 1) if x.ndim == 4 else x[..., None]
    for source in (
        save_pictures(tmp_path / "pictures", x),
        save_npz(tmp_path / "a.npz", last / 255),
        save_npy(tmp_path / "a.npy", last),
        save_hdf5(tmp_path / "a.h5", x),
    ):
        images = list(read_images(source, settings))
        assert np.array_equal(np.stack([image.pixels for image in images]), expected)
        assert {image.placement for image in images} == {placement}
        train, test, _ = load_data(source, settings)
        assert len(train.x) + len(test.x) == 30
        assert train.x.shape[1:] == test.x.shape[1:] == expected.shape[1:]
        assert np.array_equal(np.asarray(train.x[:9]), expected[:9])


def test_arrays_that_are_not_square_are_read_one_by_one(tmp_path: Path) -> None:
    wide = RNG.integers(0, 256, (4, 7, 12, 3), np.uint8)
    settings = ImageSettings(x_size=6, crop=False)
    for source in (save_npy(tmp_path / "a.npy", wide), save_npz(tmp_path / "a.npz", wide)):
        images = [image.pixels for image in read_images(source, settings)]
        assert np.array_equal(np.stack(images), prepare(wide, settings)[0])


def test_tiny_pictures_keep_their_axes(tmp_path: Path) -> None:
    for shape in ((3, 3, 4), (3, 4, 3), (3, 2, 5), (1, 6, 3)):
        x = RNG.integers(0, 256, (20, *shape), np.uint8)
        save_pictures(tmp_path / str(shape), x if shape[0] == 3 else x[:, 0])
        settings = ImageSettings(x_size=2, crop=True)
        first = next(read_images(tmp_path / str(shape), settings)).pixels
        top, left = (shape[1] - 2) // 2, (shape[2] - 2) // 2
        assert np.array_equal(
            first.reshape(shape[0], 2, 2), x[0, :, top : top + 2, left : left + 2]
        )


def test_every_tenth_picture_is_held_out(tmp_path: Path) -> None:
    found = load_data(save_pictures(tmp_path / "a"))
    assert np.array_equal(found.test.x, X[9::10])
    assert np.array_equal(found.train.x, np.delete(X, [9, 19, 29], 0))
    few = load_data(save_pictures(tmp_path / "few", X[:3]))
    assert np.array_equal(few.test.x, X[2:3])
    assert np.array_equal(load_data(tmp_path / "a", hold_out_all=True).test.x, X)
    save_pictures(tmp_path / "one", X[:1])
    assert len(load_data(tmp_path / "one", hold_out_all=True).test.x) == 1


def test_the_subfolder_test_is_held_out(tmp_path: Path) -> None:
    scenes = Scenes(X, np.arange(30) % 3), Scenes(X[:7], np.arange(7) % 2)
    write_pictures(tmp_path / "a", dict(zip(("", "test"), scenes, strict=True)))
    for hold_out_all in (True, False):
        found = load_data(tmp_path / "a", hold_out_all=hold_out_all)
        for read, written in zip(found, scenes, strict=False):
            assert isinstance(read, Scenes)
            assert np.array_equal(read.x, written.x)
            assert np.array_equal(np.asarray(read.counts), np.asarray(written.counts))
    save_pictures(tmp_path / "b" / "train" / "test")  # not on top
    assert len(load_data(tmp_path / "b").test.x) == 3
    save_pictures(tmp_path / "c" / "test")
    with pytest.raises(DataError, match=f"^{tmp_path}/c: .* got all 30 in the subfolder test"):
        load_data(tmp_path / "c")


def test_counts_come_from_the_names_of_pictures(tmp_path: Path) -> None:
    for i, image in enumerate(X):
        Image.fromarray(image).save(tmp_path / f"{i:02}_{i % 3}-objects.png")
    for pattern, expected in ((r"_(\d+)-objects", np.arange(30) % 3), (None, None)):
        found = load_data(tmp_path, ImageSettings(count_pattern=pattern))
        if expected is None:
            assert found.train.counts is found.test.counts is None
        else:
            assert np.array_equal(np.asarray(found.test.counts), expected[9::10])
    with pytest.raises(DataError, match=r"00_0-objects.png: --count-pattern matches no count in"):
        load_data(tmp_path, ImageSettings(count_pattern="(y)"))
    (tmp_path / "counts.csv").write_text("00_0-objects.png,0\n")
    with pytest.raises(DataError, match=r"counts.csv: no count of 01_1-objects.png; expected a"):
        load_data(tmp_path)


def test_one_coloured_picture_makes_all_coloured(tmp_path: Path) -> None:
    save_pictures(tmp_path, X)
    Image.fromarray(COLOURS[0].transpose(1, 2, 0)).save(tmp_path / "4.png")
    train, test, _ = load_data(tmp_path)
    assert train.x.shape == (27, 3, 12, 12)
    assert np.array_equal(train.x[4], COLOURS[0])
    assert np.array_equal(test.x, np.stack([X[9::10]] * 3, 1))
    assert load_data(tmp_path, ImageSettings(channels=1)).train.x.shape == (27, 12, 12)


def test_transparency_is_laid_over_what_is_asked_for(tmp_path: Path) -> None:
    clear = np.zeros((2, 4, 12, 12), np.uint8)
    save_pictures(tmp_path / "a", clear)
    np.savez(tmp_path / "a.npz", x=clear)
    for over, value in (("black", 0), ("white", 255)):
        settings = ImageSettings(alpha_over=over, channels=1)  # type: ignore[arg-type]
        for source in ("a", "a.npz"):
            assert (load_data(tmp_path / source, settings).train.x == value).all()


def test_a_large_folder_of_all_formats(tmp_path: Path) -> None:
    suffixes = ["png", "PNG", "bmp", "gif", "tif", "TIFF", "webp", "pgm", "jpg", "jpeg"]
    for i in range(500):
        folder = tmp_path / f"{i % 7}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(X[i % 30]).save(folder / f"{i}.{suffixes[i % 10]}")
    train, test, _ = load_data(tmp_path)
    assert (train.x.shape, test.x.shape) == ((450, 12, 12), (50, 12, 12))
    assert len(find_pictures(tmp_path)) == 500


def test_memory_holds_one_picture_at_a_time(tmp_path: Path) -> None:
    side, number = 400, 60
    large = np.zeros((side, side), np.uint8)
    save_pictures(tmp_path, np.broadcast_to(large, (number, side, side)))
    settings = ImageSettings(x_size=20, crop=True)
    uses: list[Callable[[], object]] = [
        lambda: sum(1 for _ in read_images(tmp_path, settings)),
        lambda: load_data(tmp_path, settings),
    ]
    for use in uses:
        tracemalloc.start()
        use()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 10 * large.nbytes < number * large.nbytes / 5


def test_odd_names_and_files_that_are_no_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "a [1] *ü"
    names = [b"a b.png", b"[x].png", b"\xff\xfe.png", "ü.PNG".encode(), b"-n.png", b"*.png"]
    folder.mkdir()
    for encoded, image in zip(names, X, strict=False):
        with open(os.fsencode(folder) + b"/" + encoded, "wb") as file:
            Image.fromarray(image).save(file, "PNG")
    for name in (".hidden.png", ".DS_Store", "._a b.png", "Thumbs.db", "notes.txt", "x.npz"):
        (folder / name).write_text("no picture")
    (folder / ".git").mkdir()
    (folder / ".git" / "a.png").write_text("no picture")
    (folder / "folder.png").mkdir()
    (folder / "nowhere.png").symlink_to("nowhere")
    (folder / "self.png").symlink_to("self.png")
    (folder / "loop").symlink_to(".")
    (folder / "sub").mkdir()
    (folder / "sub" / "up").symlink_to("..")
    assert len(find_pictures(str(folder))) == 6
    train, test, _ = load_data(folder)
    assert len(train.x) + len(test.x) == 6
    found = {image.pixels.tobytes() for image in read_images(folder, AS_THEY_ARE)}
    assert found == {image.tobytes() for image in X[:6]}


def test_pictures_are_in_their_natural_order() -> None:
    expected = ["x-01.png", "x-1.png", "x-2.png", "x-2a.png", "x-٣", "x-10.png", "x-²", "y"]
    assert sorted(sorted(expected), key=natural_order) == expected
    assert sorted(reversed(expected), key=natural_order) == expected


def test_links_are_followed(tmp_path: Path) -> None:
    save_pictures(tmp_path / "elsewhere" / "deep")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "test").symlink_to(tmp_path / "elsewhere" / "deep")
    (tmp_path / "a" / "x.png").symlink_to(tmp_path / "elsewhere" / "deep" / "0.png")
    (tmp_path / "b").symlink_to("a")
    assert [len(scenes.x) for scenes in load_data(tmp_path / "b")[:2]] == [1, 30]
    (tmp_path / "elsewhere" / "again").symlink_to("deep")
    assert len(find_pictures(tmp_path / "elsewhere")) == 30


def test_a_folder_is_a_folder_whatever_its_name(tmp_path: Path) -> None:
    for suffix in ("npz", "npy", "h5", "pt", "csv", "png"):
        folder = save_pictures(tmp_path / f"a.{suffix}")
        assert is_folder_of_pictures(str(folder))
        assert len(load_data(folder).train.x) == 27
        assert len(list(read_images(folder, AS_THEY_ARE))) == 30
    save_npy(tmp_path / "a.npz" / "x.npy", X[:10])
    assert not is_folder_of_pictures(tmp_path / "a.npz")
    assert len(load_data(tmp_path / "a.npz").train.x) == 9


def refused(
    path: Path, problem: str, settings: ImageSettings = AS_THEY_ARE, one_by_one: bool = True
) -> None:
    """Both functions end with one line that begins with the path."""
    ways: list[Callable[[], object]] = [
        lambda: load_data(path, settings),
        lambda: list(read_images(path, settings)),
    ]
    for way in ways if one_by_one else ways[:1]:
        with pytest.raises(DataError) as error:
            way()
        message = str(error.value)
        assert re.search(problem, message), message
        assert message.startswith(str(path)), message
        assert "\n" not in message


def test_other_files_are_refused_with_a_list_of_sources(tmp_path: Path) -> None:
    taken = r"expected a picture \(PNG, .*a folder of pictures, a .npz, .npy, .h5 or .pt file"
    for name in ("m.mat", "a.csv", "a.txt", "a.pkl", "a.npz.gz", "a.2024"):
        (tmp_path / name).write_text("1,2\n3,4\n")
        refused(tmp_path / name, f"{name} is a {Path(name).suffix} file: {taken}")
    refused(tmp_path / "missing", f"missing does not exist: {taken}")
    refused(tmp_path / "missing.png", f"missing.png does not exist: {taken}")
    refused(tmp_path / "a.csv" / "b", f"b does not exist: {taken}")
    refused(tmp_path / ("long" * 99), "File name too long")
    for suffix in ("npz", "npy", "h5", "pt"):
        refused(tmp_path / f"missing.{suffix}", "No such file or directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", f"empty contains no pictures: {taken}")
    (tmp_path / "empty" / "counts.npy").write_bytes(b"")
    refused(tmp_path / "empty", f"empty contains no pictures: {taken}")
    (tmp_path / "text").write_text("no picture")
    refused(tmp_path / "text", "cannot be read as a picture: the file is of another kind")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", f"pipe is neither a file nor a folder: {taken}")


@pytest.mark.parametrize("suffix", ["npz", "npy", "h5", "hdf5", "pt", "pth", "png", "tif", "jpg"])
def test_empty_and_foreign_files_are_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    for content in (b"", b"text", b"\x80\x04K\x01.", b"PK\x05\x06" + bytes(18), bytes(5000)):
        path.write_bytes(content)
        refused(path, "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_must_not_be_read_is_named(tmp_path: Path) -> None:
    for suffix in ("npz", "npy", "h5", "pt", "png"):
        (tmp_path / f"a.{suffix}").touch(0)
        refused(tmp_path / f"a.{suffix}", "Permission denied")
    save_pictures(tmp_path / "a" / "b")
    (tmp_path / "a" / "b").chmod(0)
    try:
        refused(tmp_path / "a", "Permission denied")
    finally:
        (tmp_path / "a" / "b").chmod(0o700)


def test_pictures_that_do_not_fit_are_named_with_a_remedy(tmp_path: Path) -> None:
    save_pictures(tmp_path / "a", X[:2])
    save_pictures(tmp_path / "a" / "b", X[:, 2:, 2:])
    refused(
        tmp_path / "a",
        r"pictures of different sizes, 12 x 12 \(.*0.png\) and 10 x 10 \(.*b/0.png\): --x-size H",
        one_by_one=False,
    )
    save_pictures(tmp_path / "wide", X[:, 2:])
    remedy = "0.png has images of 12 x 10 pixels, which are not square: --x-size H .* --crop crops"
    refused(tmp_path / "wide", remedy)
    refused(
        tmp_path / "wide",
        "too small to crop to 11 x 11",
        ImageSettings(x_size=11, crop=True),
    )
    for size, crop in ((11, False), (10, True)):
        settings = ImageSettings(x_size=size, crop=crop)
        assert load_data(tmp_path / "wide", settings).train.x.shape == (27, size, size)
    save_pictures(tmp_path / "one", X[:1])
    refused(tmp_path / "one", "at least 2 pictures, .* got 1", one_by_one=False)
    (tmp_path / "one" / "1.png").write_bytes(b"no picture")
    refused(tmp_path / "one", "1.png: cannot be read as a picture: the file is of another kind")


@pytest.mark.parametrize(
    ("x", "problem"),
    [
        (X / 1.0, "is float64: .* from 0 to 2..; divide by 255"),
        (X / 127.5 - 1, "subtract the least value"),
        (np.full((30, 9, 9), np.nan), "replace NaN and infinite values"),
        (X.astype(int), r"int64: .*astype\('uint8'\)"),
        (X.astype("c16"), "complex128: expected bool"),
        (X[0], "has the shape 12 x 12: expected "),
        (np.uint8(3), "single number"),
        (X[:, :7], "images of 12 x 7 pixels, which are not square"),
        (np.zeros((30, 0, 0), np.uint8), "no axis of length 0"),
    ],
    ids=lambda given: given if isinstance(given, str) else str(given.dtype),
)
def test_arrays_that_do_not_fit_are_named_with_a_remedy(
    x: Array, problem: str, tmp_path: Path
) -> None:
    for write in (save_npz, save_npy, save_hdf5) if np.ndim(x) else (save_npz, save_npy):
        name = {"save_npz": "a.npz", "save_npy": "a.npy", "save_hdf5": "a.h5"}[write.__name__]
        refused(write(tmp_path / name, x), problem)
    five = save_npz(tmp_path / "five.npz", np.zeros((30, 5, 9, 9), np.uint8))
    refused(five, "5 channels, expected 3; only grey and RGB", ImageSettings(channels=3))


def test_a_checkpoint_is_no_data(tmp_path: Path) -> None:
    torch.save({"format": 3, "config": {}, "model": {}, "step": 1}, tmp_path / "checkpoint.pt")
    refused(tmp_path / "checkpoint.pt", "got the checkpoint of a model, which --load takes")


def test_prepared_images_stay_in_a_file_that_may_be_larger_than_memory(tmp_path: Path) -> None:
    """The file is sparse: it takes no disk."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    number = 2 * memory // 900
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.uint8, (number, 1, 30, 30))
    x[-20_000] = 7
    del x
    np.save(tmp_path / "test_x.npy", np.zeros((9, 30, 30), np.uint8))
    tracemalloc.start()
    train, test, _ = load_data(tmp_path)
    images = to_tensor(train.x)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6
    assert images.shape == (number, 30, 30)
    assert images[torch.tensor([0, number - 20_000])].amax((1, 2)).tolist() == [0, 7]
    assert len(test.x) == 9


@pytest.mark.slow
def test_training_on_a_memory_mapped_array_is_training_in_memory(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    trained, settings = [], replace(SETTINGS, num_steps=3)
    for x in (X[:27], load_data(tmp_path).train.x):
        torch.manual_seed(1)
        done = Trainer(small_air(), to_tensor(x), HeldOut(to_tensor(X[27:])), settings)
        for _ in done.train():
            pass
        trained.append(weights(done))
    assert all(map(torch.equal, *trained))
