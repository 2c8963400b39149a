"""Images of every type, layout, size and colour become the bytes that they show."""

import re

import numpy as np
import pytest
from helpers import assert_refused
from PIL import Image

from air.data.scenes import Array
from air.data.user_images.preparation import (
    CHUNK,
    ImageSettings,
    Placement,
    border_median,
    lay_over,
    prepare,
    to_bytes,
    to_channels_first,
    to_grey,
)

AS_THEY_ARE = ImageSettings()
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (3, 9, 9), np.uint8)
RGB = RNG.integers(0, 256, (3, 3, 9, 9), np.uint8)


def prepared(images: Array, settings: ImageSettings = AS_THEY_ARE) -> tuple[Array, Placement]:
    return prepare(to_channels_first(images, "x"), settings, "x")


def refused(images: Array, problem: str, settings: ImageSettings = AS_THEY_ARE) -> None:
    assert_refused("", problem, lambda: prepared(images, settings))


@pytest.mark.parametrize(
    "images",
    [
        GREY,
        GREY.astype(np.uint16) * 257,
        GREY.astype(">u2") * 257,
        *[(GREY / 255).astype(kind) for kind in ("f2", "f4", "f8", ">f2", ">f4", ">f8", "g")],
        GREY / 255 + RNG.uniform(-0.0015, 0.0015, GREY.shape),  # as after interpolation
        np.asfortranarray(GREY),
        GREY[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1],  # negative strides
    ],
    ids=lambda images: f"{images.dtype.str}{images.shape}",
)
def test_grey_images_of_every_type_are_the_same_bytes(images: Array) -> None:
    done, placement = prepared(images)
    assert np.array_equal(done, GREY)
    assert done.dtype == np.uint8
    assert done.flags.c_contiguous  # torch takes no negative strides
    assert placement == Placement()


def test_black_and_white_are_0_and_255() -> None:
    ink = GREY > 99
    assert np.array_equal(prepared(ink)[0], 255 * ink)
    for white in (True, np.uint8(255), np.uint16(65535), np.float16(1), np.float64(1.01)):
        assert to_bytes(np.array([white, white]), "x").tolist() == [255, 255]
    every = np.arange(65536, dtype=np.uint16)
    assert np.array_equal(to_bytes(every, "x"), np.round(every / 257).astype(np.uint8))
    assert np.array_equal(to_bytes(np.arange(256) / 255, "x"), np.arange(256))


@pytest.mark.parametrize(
    ("shape", "channels_first"),
    [
        ((5, 9, 9), (5, 1, 9, 9)),
        ((5, 1, 9, 9), (5, 1, 9, 9)),
        ((5, 9, 9, 1), (5, 1, 9, 9)),
        ((5, 3, 9, 9), (5, 3, 9, 9)),
        ((5, 9, 9, 3), (5, 3, 9, 9)),
        ((5, 9, 7, 4), (5, 4, 9, 7)),
        ((5, 4, 4, 3), (5, 3, 4, 4)),
        ((5, 4, 4, 4), (5, 4, 4, 4)),
        ((5, 7, 9, 9), (5, 7, 9, 9)),
        ((5, 2, 9, 7), (5, 2, 9, 7)),
        ((0, 9, 9), (0, 1, 9, 9)),
    ],
)
def test_the_axis_of_channels_is_found(
    shape: tuple[int, ...], channels_first: tuple[int, ...]
) -> None:
    images = np.arange(np.prod(shape)).reshape(shape)
    found = to_channels_first(images, "x")
    assert found.shape == channels_first
    moved = shape != channels_first and len(shape) == 4
    assert np.array_equal(found, np.moveaxis(images, -1, 1) if moved else found)


@pytest.mark.parametrize(
    ("images", "problem"),
    [
        (np.array(1.0), "x has the shape of a single number: expected "),
        (GREY[0], r"x has the shape 9 x 9: expected \[N, H, H\]"),
        (GREY[None, None], "x has the shape 1 x 1 x 3 x 9 x 9: "),
        (GREY[:, :0], "x has the shape 3 x 0 x 9: .* no axis of length 0"),
        (RGB[0].transpose(1, 2, 0), r"x has the shape 9 x 9 x 3, as one image .* \[None\]"),
        (GREY.astype("i8"), r"x is int64: expected bool, uint8, .* with .astype\('uint8'\)"),
        (GREY.astype("c8"), r"x is complex64: expected bool, uint8, uint16, or floats in \[0, 1\]"),
        (GREY.astype("M8[s]"), r"x is datetime64\[s\]: expected "),
        (np.zeros((3, 9, 9), "i4,f4"), "x is .*f0.*: expected "),
        (GREY.astype(object), "x is object: expected "),
        (GREY.astype("f4"), r"x is float32: expected .* from \d+ to 25\d; divide by 255"),
        (GREY.astype("f8") * 257, "x is float64: .*; divide by 6[0-9]{4}"),
        (GREY / 127.5 - 1, "x is float64: .* from -.*; subtract the least value"),
        (np.where(GREY > 3, 0.5, np.nan), "x is float64: .* from nan to nan; replace NaN"),
        (np.where(GREY > 3, 0.5, np.inf), "x is float64: .* from 0.5 to inf; replace NaN"),
    ],
    ids=lambda given: given if isinstance(given, str) else f"{given.dtype.str}{given.shape}",
)
def test_images_of_other_types_are_refused_with_a_remedy(images: Array, problem: str) -> None:
    refused(images, f"^{problem}")


def test_grey_is_pillows_grey() -> None:
    picture = Image.fromarray(RGB[0].transpose(1, 2, 0))
    assert np.array_equal(to_grey(RGB[:1])[0, 0], np.asarray(picture.convert("L")))
    assert np.array_equal(prepared(RGB, ImageSettings(channels=1))[0], to_grey(RGB)[:, 0])


def test_alpha_over_is_exact_for_all_bytes() -> None:
    colours, alpha = np.divmod(np.arange(65536), 256)
    for background, behind in (("black", 0), ("white", 255)):
        expected = (colours * alpha + behind * (255 - alpha)) / 255
        images = (part.astype(np.uint8).reshape(1, 1, 256, 256) for part in (colours, alpha))
        assert np.array_equal(lay_over(*images, background).ravel(), np.round(expected))


@pytest.mark.parametrize(
    ("given", "asked", "found"),
    [(1, 1, 1), (1, 3, 3), (2, 1, 1), (2, 3, 3), (3, 1, 1), (3, 3, 3), (4, 1, 1), (4, 3, 3)]
    + [(n, n, n) for n in (2, 4, 5)]
    + [(n, None, n) for n in (2, 3, 4, 5)],
)
def test_channels_are_brought_to_a_number(given: int, asked: int | None, found: int) -> None:
    images = RNG.integers(0, 256, (2, given, 9, 9), np.uint8)
    images[:, 1:] = images[:, :1]  # grey stays grey
    if given in (2, 4) and asked in (1, 3):
        images[:, -1] = 255  # opaque
    done, _ = prepared(images, ImageSettings(channels=asked))
    assert done.shape == ((2, 9, 9) if found == 1 else (2, found, 9, 9))
    assert np.array_equal(done.reshape(2, found, 9, 9), images[:, [0] * found])


@pytest.mark.parametrize(("given", "asked"), [(5, 3), (5, 1), (1, 2), (3, 4), (2, 4), (4, 2)])
def test_other_numbers_of_channels_are_refused(given: int, asked: int) -> None:
    problem = f"^x has {given} channels, expected {asked}; only grey and RGB .*--channels 3"
    refused(np.zeros((2, given, 9, 9), np.uint8), problem, ImageSettings(channels=asked))


def test_inverting_is_255_minus_the_bytes() -> None:
    for images in (GREY, RGB, GREY / 255):
        assert np.array_equal(
            prepared(images, ImageSettings(invert=True))[0], 255 - prepared(images)[0]
        )


@pytest.mark.parametrize(("height", "width"), [(9, 9), (12, 7), (7, 12), (8, 9), (40, 3), (1, 30)])
@pytest.mark.parametrize("side", [5, 9, 16])
def test_resizing_is_pillows_of_a_picture_in_the_middle(height: int, width: int, side: int) -> None:
    image = RNG.integers(0, 256, (height, width), np.uint8)
    (done,), placement = prepared(image[None, None], ImageSettings(x_size=side, crop=False))
    new = [max(1, round(n * side / max(height, width))) for n in (width, height)]
    small = Image.fromarray(image).resize((new[0], new[1]), Image.Resampling.LANCZOS)
    left, top = (side - new[0]) // 2, (side - new[1]) // 2
    edge = [*image[0], *image[-1], *image[:, 0], *image[:, -1]]
    expected = Image.new("L", (side, side), int(np.median(edge)))
    expected.paste(small, (left, top))
    assert np.array_equal(done, np.asarray(expected))
    corners = placement.to_original([left, top, left + new[0], top + new[1]])
    assert corners == pytest.approx([0, 0, width, height])


@pytest.mark.parametrize("shape", [(2, 3, 9, 9), (1, 1, 12, 7), (1, 1, 12, 6), (2, 3, 7, 13)])
def test_cropping_is_a_slice_from_the_middle(shape: tuple[int, ...]) -> None:
    images = RNG.integers(0, 256, shape, np.uint8)
    done, placement = prepared(images, ImageSettings(x_size=6, crop=True))
    x0, y0, x1, y1 = map(int, placement.to_original([0, 0, 6, 6]))
    assert np.array_equal(done.reshape(*shape[:2], 6, 6), images[:, :, y0:y1, x0:x1])
    assert abs(x0 - (shape[3] - x1)) <= 1
    assert abs(y0 - (shape[2] - y1)) <= 1
    assert not np.may_share_memory(done, images)  # which are large


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (AS_THEY_ARE, "^x has images of 12 x 9 pixels, which are not square: --x-size H .* --crop"),
        (ImageSettings(x_size=9), "^x has images of 12 x 9 .*, expected 9 x 9: --no-crop"),
        (ImageSettings(x_size=10, crop=True), "too small to crop to 10 x 10; use --no-crop"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_a_remedy(
    settings: ImageSettings, problem: str
) -> None:
    refused(np.zeros((2, 9, 12), np.uint8), problem, settings)


def test_many_images_are_prepared_as_one_by_one() -> None:
    images = RNG.random((2 * CHUNK + 3, 4, 6))
    settings = ImageSettings(x_size=4, crop=False, invert=True, channels=3)
    done, _ = prepared(images, settings)
    assert len(done) == len(images)
    for i in (0, CHUNK - 1, CHUNK, 2 * CHUNK, 2 * CHUNK + 2):
        assert np.array_equal(done[i], prepared(images[i : i + 1], settings)[0][0])
    assert len(prepared(images[:0], settings)[0]) == 0
    images[CHUNK + 7, 1, 1] = 7
    refused(images, "x is float64: .* from .* to 7; divide by 255", settings)


def test_arrays_are_not_copied_without_need_nor_beyond_the_limit_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for images in (GREY, RGB, GREY[:, None]):
        assert np.may_share_memory(prepared(images)[0], images)
    monkeypatch.setattr("air.data.user_images.preparation.MAX_BYTES", 9 * CHUNK)
    large = np.zeros((CHUNK + 1, 3, 3), np.uint8)
    assert np.may_share_memory(prepared(large)[0], large)
    problem = r"x takes 9,009 bytes of memory, .* 9,000; save .* uint8 \[N, H, H\] or .* .npy file"
    for converted in (large / 255, np.asfortranarray(large)):
        refused(converted, problem)
    prepared(large, ImageSettings(x_size=2, crop=True))  # smaller


def test_the_border_has_its_median() -> None:
    image = np.full((1, 1, 5, 6), 200, np.uint8)
    image[0, 0, 1:-1, 1:-1] = 0
    image[0, 0, 0, :4] = 9
    assert border_median(image).tolist() == [[200]]


@pytest.mark.parametrize(
    ("name", "value"),
    [("count_pattern", "(a)(b)"), ("count_pattern", "a"), ("count_pattern", "("), ("x_size", 0),
     ("channels", 0), ("alpha_over", "red"), ("crop", 1)],
)  # fmt: skip
def test_settings_out_of_bounds_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got {re.escape(repr(value))}"):
        ImageSettings(**{name: value})  # type: ignore[arg-type]
