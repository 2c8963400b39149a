"""The range of images of floats, for arrays and tensors; needs no torch."""

import math

TOLERANCE = 0.01  # of values outside [0, 1], as interpolation leaves them


def range_problem(low: float, high: float) -> str | None:
    """A problem with floats from `low` to `high`, with a remedy; None if they are in [0, 1]."""
    if low >= -TOLERANCE and high <= 1 + TOLERANCE:
        return None
    if not math.isfinite(high - low):
        remedy = "replace NaN and infinite values"
    elif low >= -TOLERANCE:
        remedy = "divide by 255" if high <= 256 else f"divide by {high:g}"
    else:
        remedy = "subtract the least value and divide by the range"
    return f"expected floats in [0, 1], got values from {low:.4g} to {high:.4g}; {remedy}"
