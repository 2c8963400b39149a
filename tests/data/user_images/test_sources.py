"""The same images are the same scenes, in whatever files they are stored."""

import os
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from helpers import SETTINGS, assert_refused, small_air, weights
from PIL import Image

from air.data.scenes import Array, DataError, Scenes
from air.data.user_images import sources
from air.data.user_images.picture_files import write_pictures
from air.data.user_images.preparation import ImageSettings, prepare, to_channels_first
from air.data.user_images.sources import find_files, load_data, natural_order, read_images
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
    **options: Any,  # noqa: ANN401  # of Pillow
) -> Path:
    """Saves a picture of each image, [h, w] or [C, h, w]."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(x):
        picture = Image.fromarray(image if image.ndim == 2 else image.transpose(1, 2, 0))
        picture.save(folder / f"{i}.{suffix}", **options)
    return folder


def save_stack(path: Path, **options: Any) -> Path:  # noqa: ANN401
    first, *others = map(Image.fromarray, X)
    first.save(path, save_all=True, append_images=others, **options)
    return path


def save_arrays(path: Path, x: Any) -> Path:  # noqa: ANN401  # an array, or what torch saves
    """Saves images in the format that the suffix says, in lower or upper case."""
    with path.open("wb") as file:
        if path.suffix.lower() == ".npz":
            np.savez(file, x=x)
        elif path.suffix.lower() == ".npy":
            np.save(file, x)
        elif path.suffix in (".pt", ".pth"):
            torch.save(x, file)
        else:
            with h5py.File(file, "w") as hdf5:
                hdf5["x"] = x
    return path


WAYS: dict[str, Callable[[Path], Path]] = {
    "PNG": lambda to: save_pictures(to / "a"),
    "WebP": lambda to: save_pictures(to / "a", suffix="webp", lossless=True),
    "TIFF stack": lambda to: save_stack(to / "a.tif", compression="tiff_lzw"),
    "folder of a stack": lambda to: save_stack(to / "a.tif").parent,
    "npz": lambda to: save_arrays(to / "a.npz", X),
    "NPZ": lambda to: save_arrays(to / "a.NPZ", X),
    "npy": lambda to: save_arrays(to / "a.npy", X),
    "npy of Fortran": lambda to: save_arrays(to / "a.NPY", np.asfortranarray(X / 255)),
    "npy in a folder": lambda to: save_arrays(to / "x.npy", X[..., None]).parent,
    "npy of channels": lambda to: save_arrays(to / "a.npy", X[:, None]),
    "HDF5": lambda to: save_arrays(to / "a.h5", X),
    "tensor": lambda to: save_arrays(to / "a.pt", torch.from_numpy(X)),
    "tensors": lambda to: save_arrays(to / "a.pth", {"x": torch.from_numpy(X / 255), "n": 3}),
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
    names, pixels, _ = zip(*read_images(str(path), AS_THEY_ARE), strict=True)
    assert np.array_equal(np.stack(pixels), X)
    source = find_files(path)[0]
    is_one_by_one = source.name.startswith("0.")
    files = [
        f"{source.with_stem(str(i))}" if is_one_by_one else f"{source}[{i}]" for i in range(30)
    ]
    assert list(names) == files


@pytest.mark.parametrize(
    "settings",
    [
        ImageSettings(x_size=8, crop=False),
        ImageSettings(x_size=8, crop=True, invert=True),
        ImageSettings(x_size=20, crop=False, channels=3),
        ImageSettings(channels=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("x", [X, COLOURS, COLOURS[..., :7]], ids=["grey", "RGB", "wide"])
def test_every_source_is_prepared_alike(x: Array, settings: ImageSettings, tmp_path: Path) -> None:
    if x.shape[-1] == 7:
        settings = replace(settings, x_size=6, crop=settings.crop or False)
    expected, placement = prepare(to_channels_first(x, "x"), settings, "x")
    last = x.transpose(0, 2, 3, 1) if x.ndim == 4 else x[..., None]
    for source in (
        save_pictures(tmp_path / "pictures", x),
        save_arrays(tmp_path / "a.npz", last / 255),
        save_arrays(tmp_path / "a.npy", last),
        save_arrays(tmp_path / "a.h5", x),
    ):
        images = list(read_images(source, settings))
        assert np.array_equal(np.stack([image.pixels for image in images]), expected)
        assert {image.placement for image in images} == {placement}
        train, test, _ = load_data(source, settings)
        assert len(train.x) + len(test.x) == 30
        assert train.x.shape[1:] == test.x.shape[1:] == expected.shape[1:]
        assert np.array_equal(np.asarray(train.x[:9]), expected[:9])


def test_tiny_pictures_keep_their_axes(tmp_path: Path) -> None:
    for shape in ((3, 3, 4), (3, 4, 3), (3, 2, 5), (1, 6, 3)):
        x = RNG.integers(0, 256, (1, *shape), np.uint8)
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


@pytest.mark.parametrize("most", [4000, 9])
def test_some_training_images_are_kept_in_a_larger_size(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_ORIGINALS", most)
    settings = ImageSettings(x_size=6, spot_size=12, crop=False)
    grey_and_colours = save_pictures(tmp_path / "mixed", X[:10])
    save_pictures(grey_and_colours / "b", COLOURS[:10])
    with_test = save_pictures(tmp_path / "b")
    save_pictures(with_test / "test", X[:5])
    folders = save_pictures(tmp_path / "a"), with_test, grey_and_colours
    for source in (*folders, save_arrays(tmp_path / "x.npy", X)):
        train = load_data(source, settings).train
        large, rows = train.spot_images
        # Without a folder test, some of the pictures picked are held out later.
        assert len(rows) == len(train.x) if most > 30 else most - 3 <= len(rows) <= most
        assert len({*rows.tolist()}) == len(rows)
        assert np.array_equal(prepare(to_channels_first(large, ""), settings, "")[0], train.x[rows])
        without = load_data(source, replace(settings, spot_size=None)).train
        assert np.array_equal(without.x, train.x)
        assert without.spot_images[0] is without.x


def test_the_subfolder_test_is_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = Scenes(X, np.arange(30) % 3), Scenes(X[:7], np.arange(7) % 2)
    write_pictures(tmp_path / "a", dict(zip(("", "test"), scenes, strict=True)))
    monkeypatch.chdir(tmp_path / "a")
    for path, hold_out_all in ((".", True), (tmp_path / "a", False)):
        found = load_data(path, hold_out_all=hold_out_all)
        for read, written in zip(found, scenes, strict=False):
            assert isinstance(read, Scenes)
            assert np.array_equal(read.x, written.x)
            assert np.array_equal(np.asarray(read.counts), np.asarray(written.counts))
    save_pictures(tmp_path / "b" / "train" / "test")  # not on top
    assert len(load_data(tmp_path / "b").test.x) == 3
    save_pictures(tmp_path / "c" / "test")
    refused(tmp_path / "c", "expected training and held-out .* got 0 and 30", one_by_one=False)


def test_counts_come_from_the_names_of_pictures(tmp_path: Path) -> None:
    for i, image in enumerate(X):
        Image.fromarray(image).save(tmp_path / f"{i:02}_{i % 3}-objects.png")
    found = load_data(tmp_path, ImageSettings(count_pattern=r"_(\d+)-objects"))
    assert np.array_equal(np.asarray(found.test.counts), (np.arange(30) % 3)[9::10])
    found = load_data(tmp_path)
    assert found.train.counts is found.test.counts is None
    with pytest.raises(DataError, match=r"00_0-objects.png: --count-pattern matches no count in"):
        load_data(tmp_path, ImageSettings(count_pattern="(y)"))
    (tmp_path / "counts.csv").write_text("00_0-objects.png,0\n")
    with pytest.raises(DataError, match=r"counts.csv: no count of 01_1-objects.png; expected a"):
        load_data(tmp_path)
    lines = [f"{i:02}_{i % 3}-objects.png,{10_001 if i == 4 else 1}\n" for i in range(30)]
    (tmp_path / "counts.csv").write_text("".join(lines))
    with pytest.raises(DataError, match=r"expected counts of .* at most 10,000, got 10001"):
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
    save_arrays(tmp_path / "a.npz", clear)
    for over, value in (("black", 0), ("white", 255)):
        settings = ImageSettings(alpha_over=over, channels=1)  # type: ignore[arg-type]
        for source in ("a", "a.npz"):
            assert (load_data(tmp_path / source, settings).train.x == value).all()


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
    for link, place in (("nowhere.png", "nowhere"), ("self.png", "self.png"), ("loop", ".")):
        (folder / link).symlink_to(place)
    (folder / "sub").mkdir()
    (folder / "sub" / "up").symlink_to("..")
    assert len(find_files(str(folder))) == 6
    train, test, _ = load_data(folder)
    assert len(train.x) + len(test.x) == 6
    found = {image.pixels.tobytes() for image in read_images(folder, AS_THEY_ARE)}
    assert found == {image.tobytes() for image in X[:6]}


def test_pictures_are_in_their_natural_order() -> None:
    expected = ["x-01.png", "x-1.png", "x-2.png", "x-2a.png", "x-٣", "x-10.png", "x-²", "y"]
    assert sorted(reversed(expected), key=natural_order) == expected


def test_links_are_followed(tmp_path: Path) -> None:
    save_pictures(tmp_path / "elsewhere" / "deep")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "test").symlink_to(tmp_path / "elsewhere" / "deep")
    (tmp_path / "a" / "x.png").symlink_to(tmp_path / "elsewhere" / "deep" / "0.png")
    (tmp_path / "b").symlink_to("a")
    assert [len(scenes.x) for scenes in load_data(tmp_path / "b")[:2]] == [1, 30]
    (tmp_path / "elsewhere" / "again").symlink_to("deep")
    assert len(find_files(tmp_path / "elsewhere")) == 30


def test_a_folder_is_a_folder_whatever_its_name(tmp_path: Path) -> None:
    for suffix in ("npz", "png"):
        folder = save_pictures(tmp_path / f"a.{suffix}")
        assert len(load_data(folder).train.x) == 27
        assert len(list(read_images(folder, AS_THEY_ARE))) == len(find_files(str(folder))) == 30
    save_arrays(tmp_path / "a.npz" / "x.npy", X[:10])
    assert find_files(tmp_path / "a.npz") == [tmp_path / "a.npz"]
    assert len(load_data(tmp_path / "a.npz").train.x) == 9


def refused(
    path: Path, problem: str, settings: ImageSettings = AS_THEY_ARE, one_by_one: bool = True
) -> None:
    assert_refused(path, problem, lambda: load_data(path, settings))
    if one_by_one:
        assert_refused(path, problem, lambda: list(read_images(path, settings)))


def test_other_files_are_refused_with_a_list_of_sources(tmp_path: Path) -> None:
    taken = r"expected a picture \(PNG, .*a folder of pictures, a .npz, .npy, .h5 or .pt file"
    for name in ("m.mat", "a.csv", "a.npz.gz", "a.2024"):
        (tmp_path / name).write_text("1,2\n3,4\n")
        refused(tmp_path / name, f"{name} is a {Path(name).suffix} file: {taken}")
    for name in ("missing", "missing.png", "a.csv/b"):
        refused(tmp_path / name, f"{Path(name).name} does not exist: {taken}")
    refused(tmp_path / ("long" * 99), "File name too long")
    refused(tmp_path / "missing.npz", "No such file or directory")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "counts.npy").write_bytes(b"")
    refused(tmp_path / "empty", f"empty contains no pictures: {taken}")
    (tmp_path / "text").write_text("no picture")
    refused(tmp_path / "text", "cannot be read as a picture: the file is of another kind")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", f"pipe is neither a file nor a folder: {taken}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_must_not_be_read_is_named(tmp_path: Path) -> None:
    save_pictures(tmp_path / "a" / "b")
    (tmp_path / "a" / "b").chmod(0)
    try:
        refused(tmp_path / "a", "Permission denied")
    finally:
        (tmp_path / "a" / "b").chmod(0o700)


def test_pictures_that_do_not_fit_are_named_with_a_remedy(tmp_path: Path) -> None:
    save_pictures(tmp_path / "a", X[:2])
    save_pictures(tmp_path / "a" / "b", X[:, 2:, 2:])
    sizes = r"different sizes, 12 x 12 \(.*0.png\) and 10 x 10 \(.*b/0.png\): --x-size H"
    refused(tmp_path / "a", sizes, one_by_one=False)
    save_pictures(tmp_path / "wide", X[:, 2:])
    refused(tmp_path / "wide", "0.png has images of 12 x 10 pixels, which are not square: --x-size")
    save_pictures(tmp_path / "one", X[:1])
    refused(tmp_path / "one", "at least 2 images, .* got 1", one_by_one=False)
    (tmp_path / "one" / "1.png").write_bytes(b"no picture")
    refused(tmp_path / "one", "1.png: cannot be read as a picture: the file is of another kind")


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
