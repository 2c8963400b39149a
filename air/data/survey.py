"""Looks at images without labels: their sizes and colours, and the spots on their background."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from air.data.arrays import Array
from air.data.pictures import MAX_GREY_SPREAD
from air.data.preparation import ImageSettings, border_median, convert_channels, to_bytes
from air.data.sources import prepare_image, source_images

CONTRAST = 0.25  # of the strongest deviation from the background, above which a pixel is ink
SEEN_IN = 0.01  # fraction of the images in which a number of spots is seen, to be believed
LEAST_PIXELS = 4  # of a spot; smaller ones are specks
LEAST_SHARE = 0.15  # of the median area of a spot; smaller ones are parts or specks
NEIGHBOURS = np.ones((3, 3), int)  # pixels that touch at a corner belong together


class Survey(NamedTuple):
    """What images look like. A spot is a connected set of pixels that are not background."""

    images: int
    sizes: tuple[int, int, int, int]  # least and greatest width, least and greatest height
    is_coloured: bool
    background: float  # median intensity of the border, 0 to 255
    ink: float  # fraction of the pixels that belong to spots
    sides: list[list[float]]  # of each image: longer side of each spot, relative to the image's

    @property
    def spots(self) -> Array:
        """The number of images by number of spots."""
        return np.bincount([len(sides) for sides in self.sides])

    @property
    def most_spots(self) -> int:
        """The greatest number of spots that one image in a hundred, or more, shows."""
        return int(np.flatnonzero(self.spots >= SEEN_IN * self.images)[-1])

    def side(self, percent: float) -> float:
        """A percentile of the sides of single objects, relative to the image; 0 without spots.

        It is taken over the images with the most spots, where no spot is two objects that touch.
        """
        crowded = [sides for sides in self.sides if len(sides) == self.most_spots]
        sides = [side for image in crowded for side in image]
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
    """Looks at images, uint8 [C, h, w] of any sizes.

    Raises:
        ValueError: If there are no images.
    """
    if not images:
        raise ValueError("there are no images to look at")
    widths, heights = ([image.shape[axis] for image in images] for axis in (2, 1))
    borders = [border_median(image[None])[0] for image in images]
    deviations = [
        abs(image.astype(np.int16) - border[:, None, None]).max(0)
        for image, border in zip(images, borders, strict=True)
    ]
    threshold = CONTRAST * max(float(np.percentile(each, 99.9)) for each in deviations)
    found = [_spots(deviation > max(threshold, 1)) for deviation in deviations]
    areas = np.array([area for spots in found for area, _ in spots])
    least = max(LEAST_PIXELS, LEAST_SHARE * float(np.median(areas)) if len(areas) else 0)
    pixels = sum(deviation.size for deviation in deviations)
    return Survey(
        images=len(images),
        sizes=(min(widths), max(widths), min(heights), max(heights)),
        is_coloured=any(_is_coloured(image) for image in images),
        background=float(np.median(np.concatenate(borders))),
        ink=float(areas.sum() / pixels),
        sides=[[side for area, side in spots if area >= least] for spots in found],
    )


def _spots(ink: Array) -> list[tuple[int, float]]:
    """The area, and the longer side relative to the image, of each connected set of pixels."""
    labels, number = ndimage.label(ink, NEIGHBOURS)
    areas = np.bincount(labels.ravel(), minlength=number + 1)[1:]
    places = ndimage.find_objects(labels)
    longest = max(ink.shape)
    return [
        (int(area), max(rows.stop - rows.start, columns.stop - columns.start) / longest)
        for area, (rows, columns) in zip(areas, places, strict=True)
    ]


def _is_coloured(image: Array) -> bool:
    channels = image[:3].astype(np.int16) if len(image) >= 3 else image[:1]
    spread = channels.max(0) - channels.min(0)
    return bool(spread.max() > MAX_GREY_SPREAD)
