"""A survey of images without labels: how many objects there are, how large, on what background."""

from typing import NamedTuple

import numpy as np

from air.data.scenes import Array, SceneSplits, sample_rows
from air.data.spots import SpotFinder, fit_finder, noise, planes
from air.data.user_images.picture_files import MAX_GREY_SPREAD
from air.data.user_images.preparation import border_median

SAMPLE = 500  # images in a survey
DARK, LIGHT = 25, 230  # of 255: levels up to or from which a background is black or white
EVEN = 6.0  # standard deviation, of 255, up to which a background has one level
HALF = 127  # of 255: a background above it is light
FAINT = 51  # largest value, of 255, up to which images are nearly black
LARGE = 200  # side in pixels above which AIR needs much memory
OTHER_COUNTS = 0.3  # total variation distance of the counts of training and held-out scenes
MIN_HELD_OUT = 10  # scenes, below which this distance says little


class Survey(NamedTuple):
    """What a sample of images shows; lengths are relative to the side of an image."""

    images: int  # number of images that were looked at
    finder: SpotFinder
    counts: Array  # spots in each image, [images]
    sides: Array  # the longer side of each spot
    worths: Array  # squared deviation of each spot, summed over its pixels and channels
    centres: Array  # (x, y) of each spot, in [-1, 1], [spots, 2]
    level: float  # median brightness of the background, 0 to 255
    unevenness: float  # by how much it differs between and within images, 0 to 255
    noise: float  # standard deviation of the noise of a pixel, 0 to 1
    is_coloured: bool

    @property
    def most(self) -> int:
        """The least n such that 99 % of the images have at most n spots."""
        return int(np.percentile(self.counts, 99, method="inverted_cdf"))

    def side(self, percent: float) -> float:
        """A percentile of the sides of spots, relative to the image."""
        return float(np.percentile(self.sides, percent)) if len(self.sides) else 0.3

    @property
    def is_black(self) -> bool:
        return self.level <= DARK and self.unevenness <= EVEN

    @property
    def is_white(self) -> bool:
        return self.level >= LIGHT and self.unevenness <= EVEN


def survey(images: Array, x_size: int | None = None) -> Survey:
    """Surveys images, uint8 [N, (C,) L, L]; the same images give the same survey.

    Worths are those in images of `x_size` x `x_size` pixels, if it is given.
    """
    x = sample_rows(images, SAMPLE)
    x = x if x.ndim == 4 else x[:, None]
    side = x.shape[-1]
    finder = fit_finder(x)
    found = finder(x)
    boxes = np.concatenate([spots.boxes for spots in found])
    worths = np.concatenate([spots.worths for spots in found])
    level = planes(x) if finder.picture is None else np.broadcast_to(finder.picture, x.shape)
    rest = x - level
    return Survey(
        images=len(x),
        finder=finder,
        counts=np.array([len(spots) for spots in found]),
        sides=np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]) / side,
        worths=worths * ((x_size or side) / side) ** 2,
        centres=(boxes[:, :2] + boxes[:, 2:]) / side - 1,
        level=float(np.median(level)),
        unevenness=float(level.std()),
        noise=noise(rest.reshape(-1, side, side)) / 255,
        is_coloured=x.shape[1] >= 3
        and int(np.ptp(x[:, :3].astype(np.int16), axis=1).max()) > MAX_GREY_SPREAD,
    )


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
    sample = sample_rows(images, SAMPLE)
    largest = sample.max()
    if largest <= FAINT:
        return [
            f"the largest value in the images is {largest} of 255, nearly black; scale them "
            "to 0..255, or save images of 0 and 1 as bool"
        ]
    background = np.median(border_median(sample if sample.ndim == 4 else sample[:, None]))
    if not on_black or background <= DARK:
        return []
    if background > HALF:
        return [
            f"the background is light ({background:.0f} of 255), but AIR paints light "
            "objects on black; for dark objects on a light background, add --invert, or train with "
            "--background-model pca"
        ]
    return [
        f"the background is not black ({background:.0f} of 255); AIR may explain it by an "
        "object; a model trained with --background-model pca does not"
    ]
