"""A survey of images without labels, and the hints that follow from it.

Spots are the connected sets of pixels that are not background: they tell the number and the size
of objects that do not touch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from air.data.scenes import Array, SceneSplits
from air.data.user_images.picture_files import MAX_GREY_SPREAD
from air.data.user_images.preparation import (
    ImageSettings,
    border_median,
    convert_channels,
    to_bytes,
)
from air.data.user_images.sources import prepare_image, source_images

SAMPLE = 500  # images in a survey
BACKGROUND = 25  # brightness of the border, of 255, above which a background is not black
LIGHT = 127  # brightness of the border, of 255, above which a background is light

CONTRAST = 0.25  # of the strongest deviation from the background, above which a pixel is in a spot
LEAST_PIXELS = 4  # of a spot; smaller ones are specks
LEAST_SHARE = 0.15  # of the median area of a spot; smaller ones are parts or specks

FAINT = 51  # largest value, of 255, up to which images are nearly black
LARGE = 200  # side in pixels above which AIR needs much memory
OTHER_COUNTS = 0.3  # total variation distance of the counts of training and held-out scenes
MIN_HELD_OUT = 10  # scenes, below which this distance says little


class Survey(NamedTuple):
    """Sizes, colours and brightness of images, and the spots in them."""

    widths: tuple[int, int]  # least and greatest, in pixels
    heights: tuple[int, int]
    is_coloured: bool
    background: float  # median brightness of the outermost pixels, 0 to 255
    sides: list[list[float]]  # of each image: longer side of each spot, relative to the image's
    coverage: float  # fraction of the pixels that belong to spots

    @property
    def counts(self) -> list[int]:
        """The number of spots in each image."""
        return [len(sides) for sides in self.sides]

    @property
    def most(self) -> int:
        """The least n such that 99 % of the images have at most n spots."""
        return int(np.percentile(self.counts, 99, method="inverted_cdf"))

    def side(self, percent: float) -> float:
        """A percentile of the sides of single objects, relative to the image; 0 without spots.

        It is taken over the images with the most spots, in which objects hardly touch.
        """
        sides = [side for each in self.sides if len(each) == self.most for side in each]
        return float(np.percentile(sides, percent)) if sides else 0.0


def sample_images(path: Path, settings: ImageSettings, most: int) -> list[Array]:
    """Some images of a source, spread evenly over it: uint8 [C, h, w].

    They are prepared by the settings, but keep their size if none is given.

    Raises:
        DataError: If they cannot be read.
    """
    images = list(source_images(path, settings, lambda number: -(-number // most) or 1))
    images = images[:: -(-len(images) // most) or 1]  # a file can have many pages
    return [_prepare(pixels, settings, name) for name, pixels in images]


def _prepare(pixels: Array, settings: ImageSettings, name: str) -> Array:
    if settings.x_size is not None:
        prepared = prepare_image(name, pixels, settings).pixels
        return prepared if prepared.ndim == 3 else prepared[None]
    pixels = convert_channels(to_bytes(pixels[None], name), settings, name)[0]
    return ~pixels if settings.invert else pixels


def survey(images: Sequence[Array]) -> Survey:
    """Measures images, uint8 [C, h, w] of any sizes.

    Raises:
        ValueError: If there are no images.
    """
    if not len(images):
        raise ValueError("expected images, got none")
    borders = [border_median(image[None])[0] for image in images]
    deviations = [
        abs(image.astype(np.int16) - border[:, None, None]).max(0)
        for image, border in zip(images, borders, strict=True)
    ]
    threshold = CONTRAST * max(float(np.percentile(each, 99.9)) for each in deviations)
    found = [_areas_and_sides(deviation > max(threshold, 1)) for deviation in deviations]
    areas = np.array([area for spots in found for area, _ in spots])
    least = max(LEAST_PIXELS, LEAST_SHARE * float(np.median(areas)) if len(areas) else 0)
    heights, widths = ([image.shape[axis] for image in images] for axis in (1, 2))
    return Survey(
        widths=(min(widths), max(widths)),
        heights=(min(heights), max(heights)),
        is_coloured=any(_is_coloured(image) for image in images),
        background=float(np.median(np.concatenate(borders))),
        sides=[[side for area, side in spots if area >= least] for spots in found],
        coverage=float(areas.sum() / sum(deviation.size for deviation in deviations)),
    )


def _is_coloured(image: Array) -> bool:
    return len(image) >= 3 and np.ptp(image[:3].astype(np.int16), axis=0).max() > MAX_GREY_SPREAD


def _areas_and_sides(mask: Array) -> list[tuple[int, float]]:
    """The area in pixels, and the longer side relative to the image, of each connected part."""
    from scipy import ndimage  # its import would make every start of the program slower

    labels, number = ndimage.label(mask, np.ones((3, 3)))  # pixels that touch at a corner too
    areas = np.bincount(labels.ravel(), minlength=number + 1)[1:]
    places = ndimage.find_objects(labels)
    longest = max(mask.shape)
    return [
        (int(area), max(rows.stop - rows.start, columns.stop - columns.start) / longest)
        for area, (rows, columns) in zip(areas, places, strict=True)
    ]


def data_hints(splits: SceneSplits, num_steps: int, on_black: bool = True) -> list[str]:
    """Probable mistakes in scenes that can be trained on, one line each, with a remedy.

    Args:
        splits: The scenes.
        num_steps: The model's steps T, the maximum number of objects that it can count.
        on_black: Whether the model has no background but black.
    """
    x = splits.train.x if len(splits.train.x) else splits.test.x
    hints = brightness_hints(x, on_black)
    side = x.shape[-1]
    if side > LARGE:
        hints.append(
            f"images of {side} x {side} pixels need much memory and time; reduce them with --x-size"
        )
    counts = [scenes.counts for scenes in splits[:2] if scenes.counts is not None]
    most = max((int(part.max()) for part in counts if len(part)), default=0)
    if most > num_steps:
        hints.append(
            f"some scenes have {most} objects, but the model counts at most {num_steps}; raise "
            "--model-steps"
        )
    if len(counts) == 2 and all(map(len, counts)) and _counts_differ(*counts):
        train, test = (part.mean() for part in counts)
        hints.append(
            "the numbers of objects in held-out and training scenes differ "
            f"({test:.1f} and {train:.1f} on average); if the data are sorted, shuffle them"
        )
    return hints


def _counts_differ(train: Array, test: Array) -> bool:
    """Whether counts are sorted, or are distributed differently in two large enough sets."""
    steps = np.diff(np.concatenate((train, test)).astype(np.int64))
    if steps.any() and ((steps >= 0).all() or (steps <= 0).all()):
        return True
    size = int(max(train.max(), test.max())) + 1
    shares = [np.bincount(part, minlength=size) / len(part) for part in (train, test)]
    return len(test) >= MIN_HELD_OUT and abs(shares[0] - shares[1]).sum() / 2 > OTHER_COUNTS


def brightness_hints(images: Array, on_black: bool = True) -> list[str]:
    """Hints about the intensities of images, uint8 [N, (C,) H, H]; `on_black` as above."""
    if not len(images):
        return []
    sample = images[:: max(1, len(images) // SAMPLE)]
    largest = sample.max()
    if largest <= FAINT:
        return [
            f"the largest value in the images is {largest} of 255, nearly black; scale them "
            "to 0..255, or save images of 0 and 1 as bool"
        ]
    background = np.median(border_median(sample if sample.ndim == 4 else sample[:, None]))
    if not on_black or background <= BACKGROUND:
        return []
    if background > LIGHT:
        return [
            f"the background is light ({background:.0f} of 255), but AIR paints light "
            "objects on black; for dark objects on a light background, add --invert, or --preset "
            "background"
        ]
    return [
        f"the background is not black ({background:.0f} of 255); AIR may explain it by an "
        "object; --preset background models it"
    ]
