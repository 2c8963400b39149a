"""Which images make up a batch, and batches of images that stay in their files."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

_MAX_FRACTIONS = 1 << 24  # random positions within a stratum


def draw_indices(size: int, n: int, device: torch.device) -> Tensor:
    """Draws n indices below `size`; each is expected n / size times.

    By stratified sampling: one index from each n-th part of the range. So it costs n random
    numbers where ``torch.randperm``, which ``pyro.plate`` draws by, costs `size` of them, and a
    sum over the batch, scaled by size / n, stays an unbiased estimate of the sum over all.

    Args:
        size: How many there are to choose from.
        n: How many to draw, at most `size`.
        device: Where to draw them.

    Returns:
        Rising indices, int64 [n]. Two neighbours are the same where n does not divide `size` and
        both come from the one index that two parts share, which is rare in large data sets.
    """
    fractions = min(_MAX_FRACTIONS, (1 << 62) // (n * size))  # what 64 bits can hold
    parts = torch.arange(n, device=device) * fractions
    within = torch.randint(fractions, (n,), device=device)
    # In integers, so that nothing is rounded; but on Apple's GPUs some versions divide as floats.
    return ((parts + within) * size // (n * fractions)).clamp(max=size - 1)


def subsample_indices(
    data: Tensor, batch_size: int | None, num_images: int | None
) -> Tensor | None:
    """Which of `data` a step is to use, as `AIR.guide` takes these arguments; None for all."""
    if num_images is not None:
        return torch.arange(len(data), device=data.device)
    n = min(batch_size or len(data), len(data))
    return draw_indices(len(data), n, data.device) if n < len(data) else None


class StreamedImages:
    """Images in files, of which batches are read as steps need them; no more are in memory.

    Args:
        files: The images, uint8 [N, (C,) H, H], as an array, or what can be indexed like one by
            slices and by rising indices.
        device: Where the batches go.
    """

    def __init__(self, files: Any, device: torch.device) -> None:  # noqa: ANN401
        self.files, self.device = files, device
        self._batch: Tensor | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rows: slice) -> Tensor:
        return torch.from_numpy(np.array(self.files[rows])).to(self.device)

    def draw(self, batch_size: int) -> Tensor:
        """A batch, drawn as `draw_indices` does on a CPU; all images if there are no more.

        On a GPU it is the same tensor every time, overwritten: a recorded step reads it there.
        """
        n = min(batch_size, len(self))
        indices = torch.arange(n)
        if n < len(self):
            indices = draw_indices(len(self), n, indices.device)
        images = torch.from_numpy(self.files[indices.numpy()])
        if self.device.type == "cpu":
            return images
        if self._batch is None:
            self._batch = images.to(self.device)
        return self._batch.copy_(images)
