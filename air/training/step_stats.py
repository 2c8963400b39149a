"""Sums over training steps that do not make the program wait for its device."""

import math

import torch
from torch import Tensor


class StepStats:
    """Counts what steps bring, on their device: to read a loss is to wait for its step."""

    def __init__(self, device: torch.device) -> None:
        self.steps = 0
        self.sums = torch.zeros(4, device=device)
        # Sums over the steps that counted; how many did not, and how many of these follow upon
        # one another up to now.
        self.elbo, self.grad_norm, self.skipped, self.in_a_row = self.sums.unbind()

    def add(self, elbo: Tensor, grad_norm: Tensor, skipped: Tensor) -> None:
        """Counts one step."""
        self.steps += 1
        self.elbo += torch.where(skipped, 0.0, elbo)
        self.grad_norm += torch.where(skipped, 0.0, grad_norm)
        self.skipped += skipped
        self.in_a_row += 1
        self.in_a_row *= skipped

    def read(self) -> tuple[float, float, int]:
        """The steps' mean ELBO and gradient norm, and how many were skipped; begins anew."""
        elbo, grad_norm, skipped, _ = self.sums.tolist()
        counted = self.steps - skipped or math.nan
        self.steps = 0
        self.sums[:3] = 0
        return elbo / counted, grad_norm / counted, int(skipped)
