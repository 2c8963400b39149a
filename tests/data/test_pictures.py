"""Files of images: what fits the model is read as it is, what does not is named."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from air.data.arrays import Array, DataError
from air.data.pictures import read_array, read_image, read_pictures

GREY = np.random.default_rng(0).integers(0, 256, (12, 12), np.uint8)
RGB = np.random.default_rng(1).integers(0, 256, (12, 12, 3), np.uint8)


def write(path: Path, pixels: Array = GREY) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def test_an_image_is_read_pixel_by_pixel(tmp_path: Path) -> None:
    assert np.array_equal(read_image(write(tmp_path / "a.png"), 12, 1), GREY)
    assert np.array_equal(read_image(write(tmp_path / "b.bmp", RGB), 12, 3), RGB.transpose(2, 0, 1))
    black_and_white = GREY > 127
    read = read_image(write(tmp_path / "c.png", black_and_white), 12, 1)
    assert np.array_equal(read, 255 * black_and_white)


def test_every_image_has_a_name(tmp_path: Path) -> None:
    png, npz = write(tmp_path / "a.png"), tmp_path / "b.npz"
    np.savez(npz, x=np.stack([GREY, GREY.T])[:, None])
    ((name, image),) = read_pictures(png, 12, 1)
    assert name == str(png)
    assert np.array_equal(image, GREY)
    (first, one), (second, other) = read_pictures(npz, 12, 1)
    assert (first, second) == (f"{npz}[0]", f"{npz}[1]")
    assert np.array_equal(one, GREY)
    assert np.array_equal(other, GREY.T)


@pytest.mark.parametrize("channels", [2, 3])
def test_an_array_has_the_channels_of_the_model(channels: int, tmp_path: Path) -> None:
    x = np.random.default_rng(2).integers(0, 256, (5, channels, 12, 12), np.uint8)
    np.savez(tmp_path / "a.npz", x=x)
    assert np.array_equal(read_array(tmp_path / "a.npz", 12, channels), x)


@pytest.mark.parametrize(
    ("x", "side", "channels", "problem"),
    [
        (np.zeros((2, 12, 12)), 12, 1, r"\(N, 12, 12\), got float64 \(2, 12, 12\)"),
        (np.zeros((2, 12, 12)), 12, 3, r"\(N, 3, 12, 12\), got float64 \(2, 12, 12\)"),
        (np.stack([GREY]), 13, 1, r"\(N, 13, 13\), got uint8 \(1, 12, 12\)"),
        (np.stack([GREY])[:0], 12, 1, r"\(N, 12, 12\), got uint8 \(0, 12, 12\)"),
        (GREY, 12, 1, r"\(N, 12, 12\), got uint8 \(12, 12\)"),
    ],
    ids=str,
)
def test_an_array_that_does_not_fit_is_named(
    x: Array, side: int, channels: int, problem: str, tmp_path: Path
) -> None:
    np.savez(path := tmp_path / "a.npz", x=x)
    with pytest.raises(DataError, match=f"^{path}: expected x uint8 {problem}$"):
        read_array(path, side, channels)


def test_files_of_other_kinds_are_named_and_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", x=np.array([{}], object))
    np.savez(tmp_path / "no_x.npz", y=GREY)
    (tmp_path / "pickle.npz").write_bytes(b"cbuiltins\nexit\n(tR.")  # would end the program
    for name in ("objects.npz", "no_x.npz", "pickle.npz", "missing.npz"):
        with pytest.raises(DataError, match=f"^{tmp_path / name}: expected images x, got "):
            read_array(tmp_path / name, 12, 1)


def test_an_image_that_does_not_fit_is_named(tmp_path: Path) -> None:
    grey, rgb = write(tmp_path / "grey.png"), write(tmp_path / "rgb.png", RGB)
    cut, text = tmp_path / "cut.png", tmp_path / "text.png"
    cut.write_bytes(grey.read_bytes()[:60])
    text.write_text("no image")
    for path, side, channels, problem in (
        (rgb, 12, 1, "expected mode L or 1, got RGB"),
        (grey, 12, 3, "expected mode RGB, got L"),
        (grey, 12, 2, "expected mode none, but an .npz with 2 channels, got L"),
        (grey, 13, 1, r"expected 13 x 13 pixels, got \(12, 12\)"),
        (cut, 12, 1, ""),
        (text, 12, 1, "cannot identify"),
        (tmp_path / "missing.png", 12, 1, "No such file"),
    ):
        with pytest.raises(DataError, match=f"^{path}: no image for this model: .*{problem}"):
            read_image(path, side, channels)


def test_formats_that_can_run_programs_are_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 12\n%%EndComments\n")
    with pytest.raises(DataError, match=r"a.png: no image for this model: cannot identify"):
        read_image(path, 12, 3)
