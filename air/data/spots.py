"""Spots: what a threshold sees of the objects in images, without labels.

The background of an image is a plane through its border, or the median of all images where this
explains more (a fixed camera). Colours count by how rare they are in the background (by their
Mahalanobis distance), so that a red apple stands out from grey gravel that is as light. What
deviates by more than a threshold falls into connected parts. A part that is much smaller than
others belongs to a larger part beside it, such as the dot of an i; far from all others it is an
object of its own, such as a ball. Where most parts are so small, they are dust.

No single threshold and no single blur suit all images. So those are taken whose counts hardly
change with the threshold: the right count is the one that many thresholds agree on.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from air.data.scenes import Array, sample_rows

BLURS = 0.0, 0.01, 0.02  # standard deviations that are tried, in sides of an image
# Thresholds that are tried, relative to the strongest deviation of a typical image.
CONTRASTS = 0.12, 0.18, 0.27, 0.4, 0.6
MARGIN = 0.01  # of the agreement, by which a greater blur or threshold must be better
NOISE = 4.0  # least threshold, in standard deviations of the background's noise
LEAST_THRESHOLD = 2.0  # of 255
LEAST_AREA = 4  # pixels of a spot; smaller ones are specks
SMALL = 0.15  # of the typical area, below which a spot can be a part of another
NEAR = 0.35  # of the typical side, below which a small spot belongs to its neighbour
WHOLE = 0.9  # of an image's side, from which a typical spot is the background
CLOSE = 12  # of 255, up to which a pixel is explained by the background
# The covariance of colours is that of the pixels nearest to the background, this share of all,
# found in so many turns. Standard deviations below the last value, of 255, count as this value.
NEAREST, TURNS, EVEN_COLOUR = 0.85, 4, 4.0
MOST_PIXELS = 1_000_000  # about so many, evenly spread, are used for it
FIXED = 0.02  # share of all pixels that one background must explain more than planes do
FIT_SAMPLE = 200  # images from which a finder is fitted
EDGE = 20  # the border of an image is this part of its side wide
REFITS = 6  # of the plane, each without the pixels far from the last


class Spots(NamedTuple):
    """The spots in an image."""

    boxes: Array  # (x0, y0, x1, y1) in pixels, x1 and y1 exclusive, [n, 4]
    areas: Array  # pixels, [n]
    # The squared deviation from the background, of intensities in [0, 1], summed over pixels and
    # channels, [n].
    worths: Array
    sure: bool  # whether another threshold finds as many

    def __len__(self) -> int:
        return len(self.areas)


class SpotFinder(NamedTuple):
    """Finds spots in images; see the head of this file. `fit_finder` chooses its values."""

    picture: Array | None  # the background of all images, [C, H, H]; None for a plane in each
    blur: float  # standard deviation in pixels
    thresholds: tuple[float, float]  # deviations; the first one decides, both agree where sure
    area: float  # typical area of a spot in pixels
    side: float  # typical longer side of a spot in pixels
    specks: bool  # whether small parts are objects, or parts of one, or else dust
    agreement: float  # share of the images in which both thresholds find as many
    colours: Array | None = None  # as `colour_weights` returns them

    def __call__(self, images: Array) -> list[Spots]:
        """The spots in images, uint8 [N, (C,) H, H]."""
        off = deviations(images, self.picture)
        found = []
        blurred = _blur(distances(off, self.colours), self.blur)
        both = (_parts(blurred > each) for each in self.thresholds)
        for raw, *parts in zip(off, *both, strict=True):
            spots, other = map(self._join, parts)
            boxes, areas = _boxes_and_areas(spots)
            squares = np.square(raw / 255).sum(0)
            worths = [squares[y0:y1, x0:x1].sum() for x0, y0, x1, y1 in boxes]
            found.append(Spots(boxes, areas, np.array(worths), len(spots) == len(other)))
        return found

    def hide(self, images: Array, found: Sequence[Spots]) -> Array:
        """The pixels in the boxes of the spots found in images and beside them, bool [N, H, H]."""
        hidden = np.zeros((len(images), *images.shape[-2:]), bool)
        for image, spots in zip(hidden, found, strict=True):
            for x0, y0, x1, y1 in spots.boxes:
                image[max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1] = True
        return hidden

    def cover(self, images: Array, found: Sequence[Spots]) -> Array:
        """The pixels of the spots found in images, and those that touch them, bool [N, H, H]."""
        from scipy import ndimage

        off = distances(deviations(images, self.picture), self.colours)
        spots = _fill_holes(_blur(off, self.blur) > self.thresholds[0])
        return ndimage.binary_dilation(spots, _in_plane(corners=True)) & self.hide(images, found)

    def _join(self, parts: list["_Part"]) -> list["_Part"]:
        """Parts without specks, in which small ones are joined to a larger one beside them."""
        large = [part for part in parts if part[4] >= SMALL * self.area]
        if not self.specks:
            return large
        small = [part for part in parts if LEAST_AREA <= part[4] < SMALL * self.area]
        alone = []
        for part in small:
            gaps = [_gap(part, each) for each in large]
            if gaps and min(gaps) <= NEAR * self.side:
                k = int(np.argmin(gaps))
                large[k] = _union(large[k], part)
            else:
                alone.append(part)
        return large + alone


def fit_finder(images: Array) -> SpotFinder:
    """The finder that suits images, uint8 [N, (C,) H, H], of which a sample is used.

    The result depends on the images alone.
    """
    x = sample_rows(images, FIT_SAMPLE)
    x = x if x.ndim == 4 else x[:, None]
    picture = np.median(x, 0)
    of_plane, of_picture = (deviations(x, each) for each in (None, picture))
    near = [float((np.abs(off).max(1) <= CLOSE).mean()) for off in (of_plane, of_picture)]
    background, off = (picture, of_picture) if near[1] > near[0] + FIXED else (None, of_plane)
    colours = colour_weights(off)
    off = distances(off, colours)
    best = None
    for blur in BLURS:
        pixels = blur * x.shape[-1]
        blurred = _blur(off, pixels)
        least = max(NOISE * noise(blurred), LEAST_THRESHOLD)
        peaks = np.percentile(blurred, 99.9, axis=(1, 2))
        peaks = peaks[peaks >= least]  # others are empty
        if not len(peaks):
            continue
        thresholds = [c * float(np.median(peaks)) for c in CONTRASTS]
        counted = []
        for threshold in (each for each in thresholds if each >= least):
            parts = _parts(blurred > threshold)
            boxes, areas = _boxes_and_areas([p for each in parts for p in each])
            if not len(areas):
                continue
            # Half of all area is in spots of at least this area: specks do not count.
            sides = (boxes[:, 2:] - boxes[:, :2]).max(1)
            typical = _weighted_median(areas, areas), _weighted_median(sides, areas)
            if typical[1] >= WHOLE * x.shape[-1]:
                continue
            both = threshold, threshold
            finder = SpotFinder(background, pixels, both, *typical, True, 0.0, colours)
            counts = [len(finder._join(each)) for each in parts]
            if sum(counts) > 2 * (areas >= SMALL * typical[0]).sum():
                finder = finder._replace(specks=False)
                counts = [len(finder._join(each)) for each in parts]
            counted.append((finder, counts))
        for (finder, counts), (other, other_counts) in pairwise(counted):
            agreement = float(np.equal(counts, other_counts).mean())
            if best is None or agreement > best.agreement + MARGIN:
                both = finder.thresholds[0], other.thresholds[0]
                best = finder._replace(thresholds=both, agreement=agreement)
    return best or SpotFinder(None, 0.0, (255.0, 255.0), 1.0, 1.0, True, 0.0)


def deviations(images: Array, picture: Array | None) -> Array:
    """The difference of each pixel from the background: float32 [N, C, H, H], -255 to 255.

    Args:
        images: uint8 [N, (C,) H, H].
        picture: The background, [C, H, H]; None for a plane through the border of each image.
    """
    x = (images if images.ndim == 4 else images[:, None]).astype(np.float32)
    level = planes(x) if picture is None else picture.astype(np.float32)
    return x - level


def colour_weights(deviations: Array) -> Array | None:
    """The matrix that makes the colours of a background equally likely, [C, C]; None if C = 1.

    It is the inverse square root of their covariance, and the identity where a background is even.

    Args:
        deviations: As `deviations` returns them, [N, C, H, H].
    """
    channels = deviations.shape[1]
    if channels == 1:
        return None
    x = deviations.transpose(1, 0, 2, 3).reshape(channels, -1)
    x = x[:, :: max(1, x.shape[1] // MOST_PIXELS)].astype(np.float64)
    even, nearest = EVEN_COLOUR**2 * np.eye(channels), x
    for _ in range(TURNS):
        covariance = nearest @ nearest.T / nearest.shape[1]
        far = (x * np.linalg.solve(covariance + even, x)).sum(0)
        nearest = x[:, far <= np.quantile(far, NEAREST)]
    variances, axes = np.linalg.eigh(covariance)
    return (axes * (EVEN_COLOUR / np.sqrt(variances + EVEN_COLOUR**2))) @ axes.T


def distances(deviations: Array, colours: Array | None) -> Array:
    """How far each pixel is from the background, [N, C, H, H] to [N, H, H], 0 to 255."""
    if colours is not None:
        deviations = np.einsum("cd,ndhw->nchw", colours.astype(np.float32), deviations)
    return np.abs(deviations).max(1)


def planes(x: Array) -> Array:
    """A plane through the border of each channel of images [N, C, h, w].

    It is fitted again and again without the pixels that lie far from the last one.
    """
    height, width = x.shape[2:]
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    basis = np.stack([np.ones_like(rows), rows / height - 0.5, columns / width - 0.5], -1)
    edge, b = np.ones((height, width), bool), max(1, min(height, width) // EDGE)
    edge[b:-b, b:-b] = False
    points, values = basis[edge], x[:, :, edge]
    products = (points[:, :, None] * points[:, None]).reshape(len(points), 9)
    near = np.abs(values - np.median(values, 2, keepdims=True))
    keep = (near <= np.maximum(3 * np.median(near, 2, keepdims=True), CLOSE)).astype(np.float32)
    for _ in range(REFITS):
        left = (keep @ products).reshape(*keep.shape[:2], 3, 3) + 1e-3 * np.eye(3)
        fit = np.linalg.solve(left, ((keep * values) @ points)[..., None])[..., 0]
        off = np.abs(values - fit @ points.T)
        keep = (off <= np.maximum(2 * np.median(off, 2, keepdims=True), 2)).astype(np.float32)
    return (fit @ basis.reshape(-1, 3).T).reshape(x.shape).astype(np.float32)


def noise(deviations: Array) -> float:
    """The standard deviation of the noise of pixels, from those beside each other."""
    steps = np.abs(np.diff(deviations.astype(np.float32), axis=2))
    return float(np.median(steps)) / (0.6745 * 2**0.5)


_Part = tuple[int, int, int, int, int]  # x0, y0, x1, y1, area


def _blur(deviations: Array, sd: float) -> Array:
    from scipy import ndimage  # its import would make every start of the program slower

    return ndimage.gaussian_filter(deviations, (0, sd, sd)) if sd else deviations


def _fill_holes(masks: Array) -> Array:
    """Masks [N, H, H] with what the masks enclose."""
    from scipy import ndimage

    labels, number = ndimage.label(~masks, _in_plane(corners=False))
    outside = np.zeros(number + 1, bool)
    for side in (labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]):
        outside[side.ravel()] = True
    outside[0] = False  # the label of the masks themselves
    return ~outside[labels]


def _parts(masks: Array) -> list[list[_Part]]:
    """The connected parts of each mask, [N, H, H], with their holes filled."""
    from scipy import ndimage

    # Pixels that touch at a corner are connected too.
    labels, number = ndimage.label(_fill_holes(masks), _in_plane(corners=True))
    areas = np.bincount(labels.ravel(), minlength=number + 1)[1:].tolist()
    parts: list[list[_Part]] = [[] for _ in masks]
    for area, (k, rows, columns) in zip(areas, ndimage.find_objects(labels), strict=True):
        parts[k.start].append((columns.start, rows.start, columns.stop, rows.stop, area))
    return parts


def _in_plane(corners: bool) -> Array:
    """The neighbours of a pixel in the same image, [3, 3, 3], as `scipy.ndimage` takes them."""
    near = np.abs(np.mgrid[-1:2, -1:2, -1:2])
    return (near[0] == 0) & (near.sum(0) <= (2 if corners else 1))


def _gap(part: _Part, other: _Part) -> float:
    """The distance of two boxes in pixels."""
    across = max(other[0] - part[2], part[0] - other[2], 0)
    down = max(other[1] - part[3], part[1] - other[3], 0)
    return float(np.hypot(across, down))


def _union(part: _Part, other: _Part) -> _Part:
    low = min(part[0], other[0]), min(part[1], other[1])
    return *low, max(part[2], other[2]), max(part[3], other[3]), part[4] + other[4]


def _boxes_and_areas(parts: Sequence[_Part]) -> tuple[Array, Array]:
    table = np.array(parts, np.int64).reshape(-1, 5)
    return table[:, :4], table[:, 4]


def _weighted_median(values: Array, weights: Array) -> float:
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(total, total[-1] / 2)])
