"""What is wrong with a model: signs of collapse that need no labels, and what is not finite.

AIR fails in two ways: it explains nothing and leaves every canvas empty, or it uses every step on
every scene that holds anything. The first shows in the ELBO, the second only in the counts.
"""

import torch
from torch import Tensor

from air.air import AIR
from air.evaluation.metrics import Evaluation, sample_elbo
from air.inference import forked_rng
from air.priors import PresencePrior

EMPTY_MARGIN = 2.0  # nats above the empty canvas that still count as having learnt nothing
COLLAPSE_FRACTION = 0.98  # of the scenes
MAX_CHECKED_IMAGES = 500  # images that are looked at for what is not finite


def empty_canvas_elbo(air: AIR, images: Tensor) -> float:
    """The mean log likelihood of images, [N, (C,) H, H], under a black canvas, in nats per image.

    It is what an AIR that never sees an object reaches, but for the log prior of zero objects.
    """
    total = 0.0
    for part in torch.split(images, 1000):
        prepared = air.to_images(part.to(air.h_init.device))
        total += float(air.likelihood.log_prob(prepared, torch.zeros_like(prepared)).double().sum())
    return total / len(images)


def collapse_alarm(result: Evaluation, empty_elbo: float) -> str | None:
    """One line that says how a model has collapsed and what to try, or None.

    Args:
        result: An evaluation, its scenes those of `empty_elbo`.
        empty_elbo: From `empty_canvas_elbo`.
    """
    histogram = result.count_histogram
    scenes, used, every_step = sum(histogram), sum(histogram[1:]), histogram[-1]
    if result.elbo < empty_elbo + EMPTY_MARGIN:
        return (
            f"the ELBO, {result.elbo:.1f} nats, is no better than that of leaving every canvas "
            f"empty, {empty_elbo:.1f}: nothing is explained; train longer, or try another --seed "
            f"or a higher --z-pres-prior"
        )
    if histogram[0] >= COLLAPSE_FRACTION * scenes:
        return (
            f"{histogram[0]} of {scenes} scenes are counted as empty; if they are not, try another "
            f"--seed or a higher --z-pres-prior"
        )
    if len(histogram) > 2 and every_step >= COLLAPSE_FRACTION * used:
        return (
            f"every one of the {len(histogram) - 1} steps is used on {every_step} of the {used} "
            f"scenes that are not counted as empty; if they hold fewer objects, try another "
            f"--seed or a lower --z-pres-prior"
        )
    return None


def first_not_finite(air: AIR, images: Tensor, z_pres_prior_p: PresencePrior | None) -> str:
    """Names the first of images, weights, terms of the ELBO and gradients that is not finite.

    Args:
        air: The model, with the gradients of its last step.
        images: It was trained on, [N, (C,) H, H].
        z_pres_prior_p: As for `AIR.model`.
    """
    if not images.isfinite().all():
        return "the images"
    for name, parameter in air.named_parameters():
        if not parameter.isfinite().all():
            return f"the weight {name}"
    with forked_rng(0, air.h_init.device):
        terms = sample_elbo(air, air.to_images(images[:MAX_CHECKED_IMAGES]), z_pres_prior_p)
    for name in ("kl_pres", "kl_where", "kl_what", "log_likelihood"):
        if not getattr(terms, name).isfinite().all():
            return name
    for name, parameter in air.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"the gradient of {name}"
    return "a sample"
