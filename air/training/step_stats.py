"""Sums over training steps, kept on the device: reading a loss would wait for its step."""

import math

import torch
from torch import Tensor


class StepStats:
    """Sums over the steps since the last `read`.

    Attributes:
        steps: Number of steps.
        sums: ELBO and gradient norm, summed over the steps that were not skipped; number of steps
            skipped; number of steps skipped in a row up to now, [4].
    """

    def __init__(self, device: torch.device) -> None:
        self.steps = 0
        self.sums = torch.zeros(4, device=device)
        self.elbo, self.grad_norm, self.skipped, self.skipped_in_a_row = self.sums.unbind()

    def add(self, elbo: Tensor, grad_norm: Tensor, skipped: Tensor) -> None:
        """Adds one step."""
        self.steps += 1
        self.elbo += torch.where(skipped, 0.0, elbo)
        self.grad_norm += torch.where(skipped, 0.0, grad_norm)
        self.skipped += skipped
        self.skipped_in_a_row += 1
        self.skipped_in_a_row *= skipped

    def read(self) -> tuple[float, float, int]:
        """Mean ELBO, mean gradient norm and number of skipped steps; resets the sums."""
        elbo, grad_norm, skipped, _ = self.sums.tolist()
        counted = self.steps - skipped or math.nan
        self.steps = 0
        self.sums[:3] = 0
        return elbo / counted, grad_norm / counted, int(skipped)
