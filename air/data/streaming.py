"""Batches of images that stay in their files."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from air.subsampling import draw_indices


class StreamedImages:
    """Images in files. Each batch is read when a step needs it; memory holds one batch.

    Args:
        files: The images, uint8 [N, (C,) H, H]: a `Shards`, or another array that takes slices and
            rising indices.
        device: Device of the batches.
    """

    def __init__(self, files: Any, device: torch.device) -> None:  # noqa: ANN401
        self.files, self.device = files, device
        self._batch: Tensor | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rows: slice) -> Tensor:
        return torch.from_numpy(np.array(self.files[rows])).to(self.device)

    def draw(self, batch_size: int) -> Tensor:
        """Reads a batch of images chosen by `draw_indices`, or all images if there are no more.

        On a GPU, each batch overwrites the previous one in the same tensor, because a recorded step
        reads from a fixed address.
        """
        n = min(batch_size, len(self))
        indices = torch.arange(n)
        if n < len(self):
            indices = draw_indices(len(self), n, indices.device)  # on the CPU
        images = torch.from_numpy(self.files[indices.numpy()])
        if self.device.type == "cpu":
            return images
        if self._batch is None:
            self._batch = torch.empty_like(images, device=self.device)
        if self.device.type == "cuda":
            # From pinned memory, the copy does not wait for the steps that are still to be taken,
            # so that the next batch is read meanwhile. torch keeps the memory until it is copied.
            return self._batch.copy_(images.pin_memory(), non_blocking=True)
        return self._batch.copy_(images)
