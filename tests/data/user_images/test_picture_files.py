"""Picture files of every kind show the pixels that people see; what is no picture is named."""

import io
import re
import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_refused
from PIL import Image, ImageCms

from air.data.scenes import Array, DataError, Scenes
from air.data.user_images.picture_files import MAX_PIXELS, read_picture, write_pictures

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (9, 12), np.uint8)
RGB = RNG.integers(0, 256, (9, 12, 3), np.uint8)
PAGES = RNG.integers(0, 256, (4, 9, 12), np.uint8)


def read(path: Path, alpha_over: str = "black") -> Array:
    """The pixels of a picture of one page."""
    ((name, pixels),) = read_picture(path, alpha_over)
    assert name == str(path)
    assert pixels.dtype == np.uint8
    return pixels


def refused(path: Path, problem: str = "") -> None:
    start = f"{path}: cannot be read as a picture: "
    assert_refused(start, re.escape(problem), lambda: list(read_picture(path)))


GREY_PICTURES: dict[str, Callable[[], Image.Image]] = {
    "8 bits": lambda: Image.fromarray(GREY),
    "16 bits": lambda: Image.fromarray(GREY.astype(np.uint16) * 257),
    "palette": lambda: _with_palette(GREY),
    "RGB": lambda: Image.fromarray(GREY).convert("RGB"),
    "opaque LA": lambda: Image.fromarray(GREY).convert("LA"),
    "opaque RGBA": lambda: Image.fromarray(GREY).convert("RGBA"),
    "float": lambda: Image.fromarray(np.float32(GREY / 255)),
    "32 bits": lambda: Image.fromarray(GREY.astype(np.int32) * 257),
    "big-endian": lambda: Image.fromarray(GREY.astype(">u2") * 257),
}


def _with_palette(grey: Array) -> Image.Image:
    picture = Image.fromarray(255 - grey, "P")
    picture.putpalette([value for value in range(255, -1, -1) for _ in range(3)])
    return picture


@pytest.mark.parametrize(
    ("suffix", "kinds", "options"),
    [
        ("png", "8 bits,16 bits,palette,RGB,opaque LA,opaque RGBA", {}),
        ("PNG", "8 bits", {"optimize": True}),
        ("bmp", "8 bits,palette,RGB", {}),
        ("gif", "8 bits,palette,RGB", {}),
        ("webp", "8 bits,RGB,opaque LA,opaque RGBA", {"lossless": True, "exact": True}),
        ("tif", "8 bits,16 bits,palette,RGB,opaque LA,opaque RGBA,float,32 bits,big-endian", {}),
        ("tiff", "8 bits,16 bits,RGB,float", {"compression": "tiff_lzw"}),
        ("TIF", "8 bits,16 bits,RGB", {"compression": "tiff_adobe_deflate"}),
        ("tif", "8 bits,16 bits,RGB", {"big_tiff": True}),
        ("pgm", "8 bits,16 bits", {}),
        ("ppm", "RGB", {}),
        ("", "8 bits", {"format": "PNG"}),
    ],
)
def test_grey_pixels_are_the_same_in_every_format(
    suffix: str, kinds: str, options: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / f"a [1] ü.{suffix}".removesuffix(".")
    for kind in kinds.split(","):
        GREY_PICTURES[kind]().save(path, **options)
        assert np.array_equal(read(path), GREY[None]), kind


def test_colours_are_the_same_in_every_format(tmp_path: Path) -> None:
    for suffix in ("png", "bmp", "webp", "tif", "ppm"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(RGB).save(path, **{"lossless": True} if suffix == "webp" else {})
        assert np.array_equal(read(path), RGB.transpose(2, 0, 1)), suffix


def test_lossy_formats_are_close(tmp_path: Path) -> None:
    smooth = np.add.outer(np.arange(40), np.arange(50)).astype(np.uint8) * 2
    for suffix, mode in (("jpg", "L"), ("jpeg", "RGB"), ("JPG", "CMYK"), ("webp", "RGB")):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(smooth).convert("RGB").convert(mode).save(path, quality=95)
        pixels = read(path).astype(int)
        assert abs(pixels - smooth).max() <= 6


def test_black_and_white_is_0_and_255(tmp_path: Path) -> None:
    ink = GREY > 127
    for suffix in ("png", "tif", "bmp", "pbm", "gif"):
        Image.fromarray(ink).save(tmp_path / f"a.{suffix}")
        assert np.array_equal(read(tmp_path / f"a.{suffix}"), 255 * ink[None])
    Image.fromarray(ink).save(tmp_path / "fax.tif", compression="group4")
    assert np.array_equal(read(tmp_path / "fax.tif"), 255 * ink[None])


@pytest.mark.parametrize("background", ["black", "white"])
@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "tRNS"])
def test_transparent_pixels_show_the_background(mode: str, background: str, tmp_path: Path) -> None:
    rgba = np.dstack([RGB, np.where(GREY > 99, 255, 0 if mode in ("P", "tRNS") else GREY)])
    picture = Image.fromarray(rgba.astype(np.uint8))
    options: dict[str, Any] = {}
    if mode in ("LA", "RGBA"):
        picture = picture.convert(mode)
    elif mode == "P":
        picture = picture.quantize(200)
    else:
        picture, options = Image.fromarray(GREY), {"transparency": int(GREY[0, 0])}
    picture.save(tmp_path / "a.png", **options)
    with Image.open(tmp_path / "a.png") as opened:
        seen = opened.convert("RGBA")
    assert np.asarray(seen)[..., 3].min() == 0
    behind = Image.new("RGBA", seen.size, background)
    expected = np.asarray(Image.alpha_composite(behind, seen))[..., :3].transpose(2, 0, 1)
    found = read(tmp_path / "a.png", background)
    assert abs(np.broadcast_to(found, expected.shape) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("suffix", "options"),
    [("tif", {"compression": "tiff_lzw"}), ("png", {}), ("gif", {}), ("webp", {"lossless": True})],
)
def test_each_page_is_an_image(suffix: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    first, *others = map(Image.fromarray, PAGES)
    first.save(path, save_all=True, append_images=others, **options)
    names, pixels = zip(*read_picture(str(path)), strict=True)
    assert names == tuple(f"{path}[{i}]" for i in range(4))
    assert np.array_equal(np.stack(pixels)[:, 0], PAGES)


def test_pages_may_differ_and_previews_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    pages = Image.fromarray(GREY), Image.fromarray(RGB), Image.fromarray(GREY[:3, :4])
    pages[2].encoderinfo = {"tiffinfo": {254: 1}}  # a smaller version of another page
    pages[0].save(path, save_all=True, append_images=pages[1:])
    assert [pixels.shape for _, pixels in read_picture(path)] == [(1, 9, 12), (3, 9, 12)]
    picture = Image.fromarray(RGB)
    picture.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[picture.resize((4, 3))])
    assert read(tmp_path / "a.jpg").shape == (3, 9, 12)


def test_photographs_are_turned_as_their_camera_was(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # turn by 90 degrees to the right
    for suffix in ("jpg", "png", "webp", "tif"):
        smooth = np.repeat(np.arange(0, 240, 12, dtype=np.uint8)[:, None], 15, 1)
        Image.fromarray(smooth).save(tmp_path / f"a.{suffix}", exif=exif)  # a plain TIFF
        turned = read(tmp_path / f"a.{suffix}")[0].astype(int)
        assert turned.shape == (15, 20)
        assert abs(turned - smooth[::-1].T).max() <= 5


def test_other_spaces_of_colours_become_rgb(tmp_path: Path) -> None:
    srgb, lab = (ImageCms.createProfile(name) for name in ("sRGB", "LAB"))
    transform = ImageCms.buildTransform(srgb, lab, "RGB", "LAB")
    picture = Image.fromarray(RGB)
    in_lab = ImageCms.applyTransform(picture, transform)
    assert in_lab
    for other in (picture.convert("CMYK"), picture.convert("YCbCr"), in_lab):
        for options in ({}, {"compression": "tiff_lzw"}) if other is in_lab else ({},):
            other.save(tmp_path / "a.tif", **options)
            off = abs(read(tmp_path / "a.tif") - RGB.transpose(2, 0, 1).astype(int))
            assert off.mean() < 3
            assert off.max() < 20


@pytest.mark.parametrize(
    ("pixels", "problem"),
    [
        (np.float32(GREY), "the picture is float32: expected floats in [0, 1], got values from 0 "),
        (np.int32(GREY) - 200, "expected pixels of 8 or 16 bits, got numbers from -"),
        (np.int32(GREY) * 999, "expected pixels of 8 or 16 bits, got numbers from 0 to 24"),
    ],
)
def test_numbers_of_unknown_scale_are_refused(pixels: Array, problem: str, tmp_path: Path) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    refused(tmp_path / "a.tif", problem)


def png_bytes(width: int, height: int) -> bytes:
    """A small PNG file that declares a size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + data + chunk(b"IEND", b"")


def tiff_bytes(*sizes: tuple[int, int]) -> bytes:
    """A small TIFF file with pages that declare sizes."""
    content = b"II*\0" + struct.pack("<I", 8)
    for i, (width, height) in enumerate(sizes):
        tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 0), (277, 1),
                (278, height), (279, min(width * height, 2**32 - 1))]  # fmt: skip
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
        following = len(content) + 2 + len(entries) + 4 if i + 1 < len(sizes) else 0
        content += struct.pack("<H", len(tags)) + entries + struct.pack("<I", following)
    return content + bytes(1000)


@pytest.mark.parametrize(
    "content",
    [
        png_bytes(2**31 - 1, 2**31 - 1),
        png_bytes(MAX_PIXELS + 1, 1),
        png_bytes(12_000, 12_000),
        b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(300),
        b"P5 60000 60000 255\n" + bytes(300),
        b"BM"
        + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 1, 1, 0, 0),
        tiff_bytes((60000, 60000)),
    ],
    ids=["png", "long", "png12k", "gif", "pgm", "bmp", "tif"],
)
def test_a_small_file_that_declares_a_huge_picture_takes_no_memory(
    content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "bomb.png").write_bytes(content)
    tracemalloc.start()
    refused(tmp_path / "bomb.png")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 22


def test_a_huge_later_page_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(tiff_bytes((3, 3), (3, 2), (11_000, 11_000)))
    pages = read_picture(tmp_path / "a.tif")
    assert [next(pages)[1].shape, next(pages)[1].shape] == [(1, 3, 3), (1, 2, 3)]
    with pytest.raises(DataError, match=r"a.tif\[2\]: .* declares 11000 x 11000 pixels, more than"):
        next(pages)


def test_foreign_and_damaged_files_are_named(tmp_path: Path) -> None:
    png = io.BytesIO()
    Image.fromarray(GREY).save(png, "PNG")
    contents = {
        "empty": (b"", "another kind"),
        "text": (b"no image", "another kind"),
        "cut": (png.getvalue()[:60], ""),
        "PostScript, which can run programs": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%EOF\n", "another kind"),
        "pickle": (b"cbuiltins\nexit\n(tR.", "another kind"),  # would end the program
    }
    for name, (content, problem) in contents.items():
        (tmp_path / f"{name}.png").write_bytes(content)
        refused(tmp_path / f"{name}.png", problem)
    refused(tmp_path / "missing.png", "No such file")
    refused(tmp_path, "Is a directory")


def test_warnings_of_the_caller_are_left_alone(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(
        tmp_path / "a.tif", save_all=True, append_images=[Image.fromarray(GREY)]
    )
    for _ in read_picture(tmp_path / "a.tif"):
        with pytest.warns(UserWarning, match="mine"):
            warnings.warn("mine", stacklevel=1)


@pytest.mark.parametrize("channels", [1, 3])
def test_written_pictures_are_read_back(channels: int, tmp_path: Path) -> None:
    shape = (3, 12, 12) if channels == 1 else (3, 3, 12, 12)
    x = RNG.integers(0, 256, shape, np.uint8)
    scenes = Scenes(x, np.array([2, 0, 1]))
    write_pictures(tmp_path / "new" / "a", {"": scenes, "test": Scenes(x[::-1])})
    for i in range(3):
        for folder, expected in ((".", x), ("test", x[::-1])):
            found = read(tmp_path / "new" / "a" / folder / f"0000{i}.png")
            assert np.array_equal(found, expected[i].reshape(channels, 12, 12))
    lines = (tmp_path / "new" / "a" / "counts.csv").read_text().splitlines()
    assert lines == ["name,count", "00000.png,2", "00001.png,0", "00002.png,1"]


def test_a_folder_of_pictures_is_written_as_a_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = {"": Scenes(PAGES[:, :, :9])}
    (tmp_path / "old").mkdir()
    with pytest.raises(DataError, match=r"old: expected a new folder, got one that exists"):
        write_pictures(tmp_path / "old", scenes)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/new: cannot be written .*; choose another path"):
        write_pictures(str(tmp_path / "file" / "new"), scenes)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_pictures(tmp_path / "new", scenes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "old"]
