"""A sheet of objects that are grouped by z_what, so that one sees which kinds there are."""

import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image
from scipy.cluster.vq import kmeans2

from air.data.scenes import Array
from air.visualization.drawing import Pictures, caption, enlarge, tile

KINDS = 8  # groups of the k-means algorithm, at most
EXAMPLES, SIDE = 12, 48  # of each kind, and the pixels of one


def group_codes(codes: Array, kinds: int = KINDS) -> list[Array]:
    """Groups codes, [N, Z], by k-means.

    Returns:
        For each group that is not empty, the indices of its codes, those closest to its mean first;
        the largest group first.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a group is empty
        means, labels = kmeans2(codes, min(kinds, len(codes)), minit="++", seed=0)
    distances = np.linalg.norm(codes - means[labels], axis=1)
    members = [np.flatnonzero(labels == k) for k in range(len(means))]
    members = [rows[np.argsort(distances[rows])] for rows in members if len(rows)]
    return sorted(members, key=len, reverse=True)


def draw_kinds(crops: Sequence[Array], codes: Array) -> Pictures:
    """Draws the most typical objects of each kind in a row, with the number of the kind.

    Crops, uint8 [(C,) h, w], may have any size; codes are their z_what, [N, Z].
    """
    groups, blank = group_codes(codes), np.zeros((SIDE, SIDE, 3), np.uint8)
    cells = []
    for rows in groups:
        pictures = [Image.fromarray(enlarge(crops[i][None], 1)[0]) for i in rows[:EXAMPLES]]
        shown = [np.asarray(picture.resize((SIDE, SIDE))) for picture in pictures]
        number = caption(blank[: SIDE // 2], [str(len(rows))], SIDE // 4)
        cells += [number, *shown, *[blank] * (EXAMPLES - len(shown))]
    return tile(np.stack(cells), 1 + EXAMPLES)
