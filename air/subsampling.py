"""Which images make up a batch."""

import torch
from torch import Tensor

_FRACTIONS = 1 << 24  # random positions within a stratum


def draw_indices(size: int, n: int, device: torch.device) -> Tensor:
    """Draws n indices below `size`; each is expected n / size times.

    By stratified sampling: one index from each n-th part of the range. So it costs n random
    numbers where ``torch.randperm``, which ``pyro.plate`` draws by, costs `size` of them, and a
    sum over the batch, scaled by size / n, stays an unbiased estimate of the sum over all.

    Args:
        size: How many there are to choose from; n * size below 2 ** 39.
        n: How many to draw, at most `size`.
        device: Where to draw them.

    Returns:
        Rising indices, int64 [n]. Two neighbours are the same where n does not divide `size` and
        both come from the one index that two parts share, which is rare in large data sets.
    """
    parts = torch.arange(n, device=device) * _FRACTIONS
    within = torch.randint(_FRACTIONS, (n,), device=device)
    # In integers, so that nothing is rounded; but on Apple's GPUs some versions divide as floats.
    return ((parts + within) * size // (n * _FRACTIONS)).clamp(max=size - 1)
