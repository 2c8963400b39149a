"""Alarms of a failed training run that need no labels: collapse, and values that are not finite.

AIR collapses in two ways. Either it infers no object in any scene, and the ELBO is low; or it uses
every step in every scene that is not empty, and only the inferred counts show it.
"""

import torch
from torch import Tensor

from air.air import AIR
from air.evaluation.elbo import sample_elbo
from air.evaluation.metrics import Evaluation
from air.inference import forked_rng
from air.priors import PresencePrior
from air.support.handlers import closed

EMPTY_MARGIN = 2.0  # nats above the empty canvas; an ELBO below this margin is a collapse
COLLAPSE_FRACTION = 0.98  # of the scenes; so many scenes with the same count are a collapse
MAX_CHECKED_IMAGES = 500  # images whose ELBO terms are checked for values that are not finite


@torch.no_grad()
def empty_canvas_elbo(air: AIR, images: Tensor) -> float:
    """The mean log likelihood of images, [N, (C,) H, H], without objects, in nats per image.

    It is the ELBO of an AIR that never infers an object, without the log prior of zero objects.
    With a model of the background, that is the background that the guide infers; else it is black.

    Raises:
        ValueError: If there are no images.
    """
    if not len(images):
        raise ValueError("there are no images, so their likelihood has no mean")
    air.check_images(images)
    total = 0.0
    for part in torch.split(images, 1000):
        prepared = air.to_images(part.to(air.h_init.device))
        empty, cost = torch.zeros_like(prepared), prepared.new_zeros(())
        if air.background is not None:
            empty, cost = air.background.infer(prepared)
        log_probs = air.likelihood.log_prob(prepared, empty) - cost
        total += float(log_probs.cpu().double().sum())  # MPS has no float64
    return total / len(images)


def collapse_alarm(result: Evaluation, empty_elbo: float) -> str | None:
    """Describes in one line how a model has collapsed and what to try; None without collapse.

    `empty_elbo` is the `empty_canvas_elbo` of the same scenes.
    """
    histogram = result.count_histogram
    scenes, used, every_step = sum(histogram), sum(histogram[1:]), histogram[-1]
    if result.elbo < empty_elbo + EMPTY_MARGIN:
        return (
            f"the ELBO, {result.elbo:.1f} nats, is no better than the ELBO of canvases without "
            f"objects, {empty_elbo:.1f}: the model explains no object; train longer, or try "
            f"another --seed or a higher --z-pres-prior"
        )
    if histogram[0] >= COLLAPSE_FRACTION * scenes:
        return (
            f"the model counts no object in {histogram[0]} of {scenes} scenes; if these scenes "
            f"hold objects, try another --seed or a higher --z-pres-prior"
        )
    if len(histogram) > 2 and every_step >= COLLAPSE_FRACTION * used:
        return (
            f"the model uses all {len(histogram) - 1} steps on {every_step} of the {used} scenes "
            f"in which it counts an object; if these scenes hold fewer objects, try another "
            f"--seed or a lower --z-pres-prior"
        )
    return None


def first_not_finite(air: AIR, images: Tensor, z_pres_prior_p: PresencePrior | None) -> str:
    """Names the first of images, weights, ELBO terms and gradients that is not finite.

    Bytes are always finite, so images of bytes are not searched: a copy of them all might not fit
    into memory.

    Args:
        air: The model, with the gradients of its last step.
        images: The images of the last step, [N, (C,) H, H].
        z_pres_prior_p: As for `AIR.model`.
    """
    if images.is_floating_point() and not images.isfinite().all():
        return "the images"
    for name, parameter in air.named_parameters():
        if not parameter.isfinite().all():
            return f"the weight {name}"
    with closed(air), forked_rng(0, air.h_init.device):
        terms = sample_elbo(air, air.to_images(images[:MAX_CHECKED_IMAGES]), z_pres_prior_p)
    for name in ("kl_pres", "kl_where", "kl_what", "kl_background", "log_likelihood"):
        if not getattr(terms, name).isfinite().all():
            return name
    for name, parameter in air.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"the gradient of {name}"
    return "a sample"
