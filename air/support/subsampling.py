"""Which images make up a batch."""

import torch
from torch import Tensor

_MAX_COARSE, _FINE = 1 << 15, 1 << 9  # their product: random positions within a stratum


def draw_indices(size: int, n: int, device: torch.device) -> Tensor:
    """Draws n indices below `size` by stratified sampling: one from each n-th part of the range.

    Each index is drawn n / size times on average. So a sum over the batch, scaled by size / n, is
    an unbiased estimate of the sum over all. Drawing takes n random numbers; `torch.randperm`,
    which `pyro.plate` uses, takes `size` of them.

    Args:
        size: Number of indices to choose from.
        n: Number of indices to draw, from 1 to `size`.
        device: Device that draws them.

    Returns:
        Rising indices, int64 [n]. If n does not divide `size`, neighbouring parts share an index,
        which both can draw; in large data sets such a repetition is rare.
    """
    # On a GPU, Inductor computes what follows from arange alone in 32 bits, without an error
    # (PyTorch issue 175966). So this product stays below 2**31, and the others below 2**62.
    coarse = max(1, min(_MAX_COARSE, (1 << 31) // n - 1, (1 << 62) // (n * size * _FINE)))
    within = torch.randint(coarse * _FINE, (n,), device=device)
    position = torch.arange(n, device=device) * coarse + within // _FINE
    position = position * _FINE + within % _FINE
    # Integers are not rounded. The clamp is for Apple's GPUs: some versions divide as floats.
    return (position * size // (n * coarse * _FINE)).clamp(max=size - 1)


def subsample_indices(
    data: Tensor, batch_size: int | None, num_images: int | None
) -> Tensor | None:
    """The indices of the images that a step uses, or None for all images.

    With `num_images`, the size of the whole data set, `data` is one batch of it and all is used.
    Otherwise `batch_size` images are drawn from it; None for all.
    """
    if num_images is not None:
        return torch.arange(len(data), device=data.device)
    n = min(batch_size or len(data), len(data))
    return draw_indices(len(data), n, data.device) if n < len(data) else None
