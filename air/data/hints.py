"""Hints about data that can be trained on, but are probably not what their owner means."""

from typing import Any

import numpy as np

from air.data.arrays import Array
from air.data.scenes import SceneSplits

SAMPLE = 500  # images that are looked at
FAINT = 51  # largest value, of 255, below which images are nearly black
BACKGROUND = 25  # median of the pixels, of 255, above which a background is not black
LARGE = 200  # side in pixels above which AIR needs much memory
OTHER_COUNTS = 0.3  # total variation distance of the counts of training and held-out scenes
MIN_HELD_OUT = 10  # scenes, of which the counts are compared


def data_hints(splits: SceneSplits, num_steps: int, on_black: bool = True) -> list[str]:
    """What is probably wrong with scenes, one line each, with its remedy.

    Args:
        splits: The scenes.
        num_steps: The model's steps T, which are the most objects that it can count.
        on_black: Whether the model has no background but black.
    """
    x: Any = splits.train.x if len(splits.train.x) else splits.test.x
    hints = brightness_hints(np.asarray(x[:: max(1, len(x) // SAMPLE)]), on_black)
    side = x.shape[-1]
    if side > LARGE:
        hints.append(
            f"images of {side} x {side} pixels need much memory and time; --x-size makes them "
            "smaller"
        )
    counts = [scenes.counts for scenes in splits[:2] if scenes.counts is not None]
    most = max((int(part.max()) for part in counts if len(part)), default=0)
    if most > num_steps:
        hints.append(
            f"some scenes hold {most} objects, more than the {num_steps} that the model can "
            "count; raise --model-steps"
        )
    if len(counts) == 2 and all(map(len, counts)) and _counts_differ(*counts):
        train, test = (part.mean() for part in counts)
        hints.append(
            f"the held-out scenes hold other numbers of objects than the training scenes "
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
    if not images.size:
        return []
    largest = int(images.max())
    if largest <= FAINT:
        return [
            f"the largest value of the images is {largest} of 255, nearly black; scale them to "
            "0..255, or store images of 0 and 1 as bool"
        ]
    median = float(np.median(images))
    if not on_black or median <= BACKGROUND:
        return []
    if median > 255 / 2:
        return [
            f"the images are light (median {median:.0f} of 255), but AIR paints light objects on "
            "black; for dark objects on a light background, add --invert, or --preset background"
        ]
    return [
        f"the background is not black (median {median:.0f} of 255); AIR may spend an object on it, "
        "unless --preset background models it"
    ]
