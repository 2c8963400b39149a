"""Sums over training steps, kept on the device: reading a loss would wait for its step."""

import math

import torch
from torch import Tensor


class StepStats:
    """Sums over the steps since the last `read`.

    Attributes:
        sums: Number of steps; ELBO and gradient norm, summed over the steps that were not skipped;
            number of steps skipped; number of steps skipped in a row up to now, [5].
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(5, device=device)

    def with_step(self, elbo: Tensor, grad_norm: Tensor, skipped: Tensor) -> Tensor:
        """The sums with one more step, for `sums`, in a tensor of its own."""
        steps, elbos, norms, num_skipped, in_a_row = self.sums.unbind()
        with_step = (
            steps + 1,
            elbos + torch.where(skipped, 0.0, elbo),
            norms + torch.where(skipped, 0.0, grad_norm),
            num_skipped + skipped,
            (in_a_row + 1) * skipped,
        )
        return torch.stack(with_step)

    @property
    def skipped_in_a_row(self) -> int:
        """The number of steps skipped up to now; reading it waits for the device."""
        return int(self.sums[4])

    def read(self) -> tuple[float, float, int]:
        """Mean ELBO, mean gradient norm and number of skipped steps; resets their sums."""
        steps, elbo, grad_norm, skipped, _ = self.sums.tolist()
        counted = steps - skipped or math.nan
        self.sums[:4] = 0
        return elbo / counted, grad_norm / counted, int(skipped)

    def state_dict(self) -> dict[str, int | Tensor]:
        """The sums, for a checkpoint."""
        return {"steps": int(self.sums[0]), "sums": self.sums[1:].clone()}

    def load_state_dict(self, state: dict[str, int | Tensor]) -> None:
        """Restores the sums that `state_dict` returned."""
        self.sums[0] = state["steps"]
        self.sums[1:] = torch.as_tensor(state["sums"])
