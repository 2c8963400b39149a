"""The exact expectation over the count: AIR with z_pres summed out.

The guide depends on z_pres only through stopping. So one run of the guide with every step active
is enough, and with q(n) = (1 - q_{n+1}) q_1 ... q_n the ELBO of the run is

    sum_n q(n) [log p(x | z_1..n) + log p(n) - log q(n)] + sum_t q(n >= t) [log p(z_t) - log q(z_t)]

where z_t is (z_where_t, z_what_t). Its expectation is AIR's own ELBO. No z_pres is sampled, so no
score-function gradient and no baseline are needed. The first sum costs T + 1 sums over pixels and
no further pass through a net. In Pyro, `poutine.scale` weights each object by q(n >= t), and a
`pyro.factor` adds the first sum. Section 11 of ``air/tutorial`` derives it.
"""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from air.air import AIR, Latents
from air.priors import PresencePrior, check_presence_prior, count_log_probs
from air.support.checks import check_call

CountTerm = Callable[[Tensor, Tensor, int], None]  # of images, log q(n), and the size of the data


class AllStepsActive(Messenger):
    """Runs AIR's guide with every step active, and records q(z_pres_t = 1 | z_pres_{t-1} = 1).

    The sites of z_pres are hidden from outer handlers; the costs of z_where_t and z_what_t are
    multiplied by q(n >= t).

    Args:
        use_means: Whether z_where and z_what are their means instead of samples.
    """

    def __init__(self, use_means: bool = False) -> None:
        super().__init__()
        self.use_means = use_means
        self.presence: list[Tensor] = []  # q_t, T times [B, 1]
        self._at_least: Any = 1.0  # q(n >= t), [B]

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"].startswith("z_pres"):
            q = msg["fn"].mean
            self.presence.append(q)
            self._at_least = self._at_least * q[:, 0]
            msg["value"], msg["done"], msg["stop"] = torch.ones_like(q), True, True
        elif msg["name"].startswith("z_"):
            msg["scale"] = msg["scale"] * self._at_least
            if self.use_means:
                msg["value"], msg["done"] = msg["fn"].mean, True


class MarginalAIR:
    """`model` and `guide` for SVI, which train an AIR with its count summed out.

    They take the arguments of `AIR.model` and `AIR.guide`. They never use the baseline, so an AIR
    with ``use_baselines=False`` is faster.

    Args:
        air: The model.
        count_term: Adds a term to the loss; see `air.training.teacher.Teacher`.

    Raises:
        ValueError: If the AIR does not use masking.
    """

    def __init__(self, air: AIR, count_term: CountTerm | None = None) -> None:
        if not air.use_masking:
            raise ValueError(
                "the exact expectation over the count needs masking, because finished steps must "
                "cost nothing; without masking, use the score function (--estimator score)"
            )
        self.air = air
        self.count_term = count_term

    def guide(
        self,
        data: Tensor,
        batch_size: int | None = None,
        z_pres_prior_p: PresencePrior | None = None,
        num_images: int | None = None,
    ) -> Latents:
        """q(z_where, z_what | x) for T objects, and the probability of each object."""
        check_presence_prior(z_pres_prior_p)
        with AllStepsActive() as steps:
            latents = self.air.guide(data, batch_size, num_images=num_images)
        # A point mass hands q_t to the model; its log probability is zero.
        pyro.sample("presence", dist.Delta(torch.cat(steps.presence, 1), event_dim=2))
        return latents

    def model(
        self,
        data: Tensor,
        batch_size: int | None = None,
        z_pres_prior_p: PresencePrior | None = None,
        num_images: int | None = None,
    ) -> None:
        """p(x, z_where, z_what), with the expectation over n under the guide's q(n)."""
        air = self.air
        check_call(data, batch_size, num_images)
        n = min(batch_size or len(data), len(data))
        one = air.h_init.new_ones(())  # not 1.0, which would be copied from the host to the device
        anything = dist.Normal(one.new_zeros(n, air.num_steps), one).to_event(2)
        with poutine.mask(mask=False):  # costs nothing, since the value comes from the guide
            presence = pyro.sample("presence", anything)
        with air.images_of(data, batch_size, z_pres_prior_p, num_images) as images:
            steps = [one * p for p in air.presence(z_pres_prior_p)]
            log_prior, log_q = count_log_probs(torch.stack(steps)), count_log_probs(presence)
            background = None if air.background is None else air.background.model(images, n)
            always, objects = images.new_ones(n, 1), []
            tiny = torch.finfo(presence.dtype).tiny  # Pyro does not accept a scale of zero
            for t, at_least in enumerate(accumulate(presence.unbind(1), torch.mul)):
                with poutine.scale(scale=at_least.clamp(min=tiny)):
                    objects.append(air.sample_object(t, always))
            painted = air.paint(*zip(*objects, strict=True))
            empty = torch.zeros_like(images) if background is None else background
            canvases = accumulate(painted.unbind(), air.likelihood.add, initial=empty)
            log_likelihoods = [air.likelihood.log_prob(images, canvas) for canvas in canvases]
            terms = torch.stack(log_likelihoods, 1) + log_prior - log_q
            pyro.factor("obs", (log_q.exp() * terms).sum(1))
        if self.count_term is not None:
            self.count_term(images, log_q, num_images or len(data))
