"""The distribution of z_pres."""

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor


class Presence(dist.Bernoulli):  # type: ignore[misc]  # Pyro's is untyped
    """A Bernoulli that draws by comparing its probabilities with uniform random numbers.

    So eager and compiled steps draw the same numbers on every device. On a GPU, torch's own
    Bernoulli draws other numbers than the code that Inductor makes of it, and a probability that is
    NaN would end the process; here the step is skipped.
    """

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            probs = self.probs.expand(self._extended_shape(sample_shape))
            return (torch.rand_like(probs) < probs).to(probs.dtype)
