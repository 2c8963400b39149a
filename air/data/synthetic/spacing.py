"""Distances that the objects of a scene keep."""

from collections.abc import Sequence
from itertools import combinations

Box = tuple[int, int, int, int]  # (x0, y0, x1, y1) in pixels, x1 and y1 exclusive


def free_positions(size: int, taken: Sequence[int], distance: int) -> Sequence[int]:
    """The positions 0 to size - 1 along one axis at least `distance` from those taken."""
    if not distance:
        return range(size)
    return [p for p in range(size) if all(abs(p - other) >= distance for other in taken)]


def keep_gap(boxes: Sequence[Box], min_gap: float | None) -> bool:
    """Whether any two boxes are at least this far apart along x or along y."""
    return min_gap is None or all(
        max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3]) >= min_gap
        for a, b in combinations(boxes, 2)
    )
