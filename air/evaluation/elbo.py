"""The ELBO of images, sampled and split into its terms, and a tighter bound of log p(x)."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyro.poutine as poutine
import torch
from torch import Tensor

from air.air import AIR
from air.marginal import sample_paths
from air.priors import PresencePrior
from air.support.checks import check_whole
from air.support.handlers import closed
from air.support.images import to_tensor


class ElboTerms(NamedTuple):
    """The terms of one sample of the ELBO for each image, in nats, [B] each."""

    log_likelihood: Tensor
    kl_pres: Tensor  # log q(z_pres) - log p(z_pres) of the sample
    kl_where: Tensor
    kl_what: Tensor  # with the latents of an object that a subclass of AIR adds
    kl_background: Tensor  # zero without a model of the background
    counts: Tensor  # objects in the sample
    baseline_squares: Tensor  # squared errors of the baseline, summed over the steps that use it

    @property
    def elbo(self) -> Tensor:
        """The sampled ELBO, [B], which is also the log of an importance weight p(x, z) / q(z)."""
        kl_objects = self.kl_pres + self.kl_where + self.kl_what
        return self.log_likelihood - kl_objects - self.kl_background


@torch.no_grad()
def sample_elbo(air: AIR, images: Tensor, z_pres_prior_p: PresencePrior | None = None) -> ElboTerms:
    """Samples z from the guide once for each image, [B, (C,) H, H].

    Raises:
        ValueError: If the images have another shape, type or range than `AIR.to_images` takes.
    """
    images = to_tensor(images).to(air.h_init.device)
    air.check_images(images)
    if not len(images):
        blank = images.new_zeros(1, *images.shape[1:])
        return ElboTerms._make(part[:0] for part in sample_elbo(air, blank, z_pres_prior_p))
    arguments: Any = {"data": images, "z_pres_prior_p": z_pres_prior_p}
    with closed(air):
        guide: Any = poutine.trace(air.guide).get_trace(**arguments)
        model: Any = poutine.trace(poutine.replay(air.model, trace=guide)).get_trace(**arguments)
    guide.compute_log_prob()
    model.compute_log_prob()
    presence = [guide.nodes[f"z_pres_{t}"] for t in range(air.num_steps)]

    def cost(name: str) -> Tensor:
        difference: Tensor = guide.nodes[name]["log_prob"] - model.nodes[name]["log_prob"]
        return difference

    def costs(sites: Sequence[str]) -> Tensor:  # [T, B]
        steps = range(air.num_steps)
        return torch.stack([torch.stack([cost(f"{z}_{t}") for z in sites]).sum(0) for t in steps])

    first = [name for name in guide.nodes if name.startswith("z_") and name.endswith("_0")]
    others = [name[:-2] for name in first if name not in ("z_pres_0", "z_where_0")]
    pres, where, what = costs(["z_pres"]), costs(["z_where"]), costs(others)
    likelihood = model.nodes["obs"]["log_prob"]
    squares = torch.zeros_like(likelihood)
    background = torch.zeros_like(likelihood) if air.background is None else cost("z_background")
    if air.use_baselines:
        values = [node["infer"]["baseline"]["baseline_value"] for node in presence]
        baseline = torch.stack([value.reshape(-1) for value in values])
        # The baseline of z_pres_t predicts the terms that depend on z_pres_t: the likelihood, and
        # the costs of step t and of all later steps.
        dependent = likelihood - (pres + where + what).flip(0).cumsum(0).flip(0)
        used = torch.stack([torch.ones_like(squares)] + [n["value"][:, 0] for n in presence[:-1]])
        squares = (used * (dependent - baseline) ** 2).sum(0)
    counts = sum(node["value"][:, 0] for node in presence).long()
    kls = pres.sum(0), where.sum(0), what.sum(0), background
    return ElboTerms(likelihood, *kls, counts, squares)


@torch.no_grad()
def importance_weighted_bound(
    air: AIR, images: Tensor, samples: int, z_pres_prior_p: PresencePrior | None = None
) -> Tensor:
    """A lower bound of log p(x) for each image in nats, [B]: the log of the mean importance weight.

    With more samples the bound rises to log p(x) (Burda et al. 2016, arXiv:1509.00519). The count
    is summed out, which makes it tighter for the same passes through the nets; but for an AIR
    without masking, whose counts are drawn. The samples are drawn one after another, so that memory
    does not grow with their number.

    Raises:
        ValueError: If there is no sample, or for images as in `sample_elbo`.
    """
    check_whole("samples", samples, 1)
    images = to_tensor(images).to(air.h_init.device)
    air.check_images(images)
    log_sum = torch.full((len(images),), -math.inf, device=images.device)
    for _ in range(samples):
        if air.use_masking and len(images):
            with closed(air):
                paths = sample_paths(air, air.to_images(images), z_pres_prior_p)
            log_weights = paths.log_weights[:, 0].logsumexp(1)
        else:
            log_weights = sample_elbo(air, images, z_pres_prior_p).elbo
        log_sum = torch.logaddexp(log_sum.to(log_weights), log_weights)
    return log_sum - math.log(samples)
