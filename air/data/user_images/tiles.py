"""Large pictures: cut into overlapping square tiles, and the best view of each object in them.

A box or tile is (x0, y0, x1, y1) in pixels of the picture, x1 and y1 exclusive.
"""

from itertools import product

import numpy as np

from air.data.scenes import Array

# Boxes of two tiles show one object if more than this part of the smaller one lies in the other.
SAME = 0.5
SAME_CUT = 0.1  # the same for a box that a tile cuts: the model may paint what it cannot see
TOUCHING = 0.01  # pixels between a box and the side of a tile, up to which the side cuts it


def cut_tiles(height: int, width: int, side: int) -> list[tuple[int, int, int, int]]:
    """The tiles of a picture, row by row, of `side` x `side` pixels unless the picture is smaller.

    Neighbours share half a tile or more, so that an object no larger than half a tile lies whole
    in one of them. The last ones in a row and in a column end at the border of the picture.
    """
    rows, columns = (
        [*range(0, length - side, max(side // 2, 1)), max(length - side, 0)]
        for length in (height, width)
    )
    return [(x, y, min(x + side, width), min(y + side, height)) for y, x in product(rows, columns)]


def best_views(boxes: Array, tiles: Array, found_in: Array) -> list[tuple[int, bool]]:
    """Picks one of the boxes that several tiles have of the same object.

    A box that no inner side of its tile cuts is better than one that is cut; among equals, the box
    nearest to the middle of its tile is best.

    Args:
        boxes: The boxes found in all tiles, [K, 4], none of them empty.
        tiles: All tiles of the picture, [N, 4].
        found_in: The row of the tile of each box, [K].

    Returns:
        The row of each box that is picked, and whether a side of its tile cuts it.
    """
    around, border = tiles[found_in], [*tiles.min(0)[:2], *tiles.max(0)[2:]]
    cut = (boxes - around) * [1, 1, -1, -1] <= TOUCHING
    torn = (cut & (around != border)).any(1)
    off = np.hypot(*(boxes - around).reshape(-1, 2, 2).sum(1).T)  # twice that of the middles
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    best = np.zeros(len(boxes), bool)
    for i in np.lexsort((off, torn)):
        others = best & (found_in != found_in[i])
        low = np.maximum(boxes[others, :2], boxes[i, :2])
        shared = (np.minimum(boxes[others, 2:], boxes[i, 2:]) - low).clip(0).prod(1)
        least = (SAME_CUT if torn[i] else SAME) * np.minimum(areas[others], areas[i])
        best[i] = not (shared > least).any()
    return [(i, bool(cut[i].any())) for i in np.flatnonzero(best).tolist()]
