"""Refinement: latents fitted to each badly explained scene by itself, and objects merged.

The guide infers a scene in one pass. Now and then it puts one window over two close objects, though
the model explains the scene better by two. Such a scene is explained badly, which shows without
labels: in the relative residual, |x - canvas|^2 / |x|^2. For these scenes, hypotheses with one
object more, one fewer or one elsewhere are fitted by gradient steps on their ELBO. (Kim et al.
2018, arXiv:1802.02550, refine the latents of a VAE so.) Then, in every scene, two close objects
that one object explains as well become one, see `air.merging`.

A hypothesis has a count n, of which it is certain, and for each object a Normal q(z_where) and
q(z_what), whose means are fitted. Given n, its ELBO is E_q[log p(x | z)] - sum_t KL(q || p). The
hypothesis with the highest score wins: ELBO + `TRUST` log g(n), where g(n) is the guide's q(n), but
at least `LEAST_PROB`.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import avg_pool2d

from air.air import AIR
from air.merging import (
    CLOSE,
    NUM_TRIES,
    closest_windows,
    in_use,
    merge,
    paint_scenes,
    relative_residual,
    window_at,
)
from air.spatial_transformer import image_to_window, positive_scale

BADLY_EXPLAINED = 0.2  # relative residual above which a scene is refined
NUM_STEPS = 100  # of Adam
WHERE_RATE, WHAT_RATE = 0.05, 0.1  # learning rates of the means
SAMPLES = 8  # in the ELBO by which hypotheses are compared
# Power of the guide's q(n), which takes the place of the count's prior. The ELBO alone is no good
# judge of the count: a further object also explains what no code of one object can. Guides can be
# too certain, so no q(n) counts as less than `LEAST_PROB`.
TRUST, LEAST_PROB = 5.0, 3e-4
MAX_AT_ONCE = 256  # hypotheses, to bound the memory
SPLIT = 0.6  # from the centre of a window to those of its two halves, in half sides


class SceneLatents(NamedTuple):
    """The latents inferred in B scenes."""

    count_probs: Tensor  # q(n), [B, T + 1]
    where: Tensor  # means of z_where, [B, T, 3]
    what: Tensor  # means of z_what, [B, T, Z]
    where_sd: Tensor  # standard deviations of z_where, [B, T, 3]


class Hypotheses(NamedTuple):
    """K hypotheses, each about one scene."""

    scenes: Tensor  # indices of the scenes, [K]
    counts: Tensor  # [K]
    where: Tensor  # z_where at which fitting starts, [K, T, 3]


@torch.no_grad()
def refine_scenes(air: AIR, images: Tensor, found: SceneLatents) -> SceneLatents:
    """Refines the latents of the scenes that are explained badly, and merges close objects.

    Args:
        air: The model.
        images: The scenes, as `AIR.to_images` returns them, [B, (C,) H, H].
        found: What the guide inferred.

    Returns:
        The latents. For a scene that was explained badly, q(n) is proportional to exp(score) of the
        best hypothesis with n objects, and zero where no hypothesis has n. Where two objects become
        one, the probabilities of both counts change places. Neither is a posterior, so calibration
        of refined counts says little. All other scenes stay as they are.
    """
    counts = found.count_probs.argmax(1)
    canvas = paint_scenes(air, found.where, found.what, counts)
    scenes = (relative_residual(images, canvas) > BADLY_EXPLAINED).nonzero()[:, 0]
    if len(scenes):
        found = _fit_scenes(air, images, found, scenes, images - canvas)
    return _merge_scenes(air, images, found)


def _fit_scenes(
    air: AIR, images: Tensor, found: SceneLatents, scenes: Tensor, residual: Tensor
) -> SceneLatents:
    """Fits hypotheses about the scenes with these indices; keeps the best."""
    used = in_use(air, found.count_probs.argmax(1))
    sds = found.where_sd[used] if used.any() else found.where_sd.flatten(0, 1)
    where_sd = sds.median(0).values  # in all hypotheses, [3]
    starts = list(make_hypotheses(air, residual, found, scenes))
    hypotheses = Hypotheses._make(map(torch.cat, zip(*starts, strict=True)))
    parts = []
    indices = torch.arange(len(hypotheses.scenes), device=images.device)
    for k in torch.split(indices, MAX_AT_ONCE):
        part = Hypotheses._make(each[k] for each in hypotheses)
        parts.append(_fit(air, images[part.scenes], part, where_sd))
    elbos, where, what = map(torch.cat, zip(*parts, strict=True))
    probs = found.count_probs[hypotheses.scenes, hypotheses.counts].clamp(min=LEAST_PROB)
    return _with_winners(found, hypotheses, elbos + TRUST * probs.log(), where, what)


def _merge_scenes(air: AIR, images: Tensor, found: SceneLatents) -> SceneLatents:
    """Merges the two closest objects of each scene if they are one, but only once a scene."""
    counts = found.count_probs.argmax(1)
    close = (closest_windows(found.where, counts)[0] < CLOSE).nonzero()[:, 0]
    if not len(close):
        return found
    probs, where, what = found.count_probs.clone(), found.where.clone(), found.what.clone()
    for k in torch.split(close, MAX_AT_ONCE // NUM_TRIES):
        merged = merge(air, images[k], where[k], what[k], counts[k])
        scenes = k[merged.are_one]
        where[scenes], what[scenes] = merged.where[merged.are_one], merged.what[merged.are_one]
        both = torch.stack((counts[scenes] - 1, counts[scenes]), 1)
        probs[scenes] = probs[scenes].scatter(1, both, probs[scenes].gather(1, both.flip(1)))
    return found._replace(count_probs=probs, where=where, what=what)


def make_hypotheses(
    air: AIR, residual: Tensor, found: SceneLatents, scenes: Tensor
) -> Iterator[Hypotheses]:
    """Hypotheses about scenes: three about each, and six more for each object in it.

    Args:
        air: The model.
        residual: Images minus their canvases, [B, (C,) H, H].
        found: What the guide inferred.
        scenes: Indices of the scenes, [F].
    """
    counts = found.count_probs.argmax(1)
    used = in_use(air, counts)
    scales = found.where[..., 0][used]
    scale = positive_scale(scales.median() if len(scales) else air.z_where_loc_prior[0])
    where, counts = found.where[scenes], counts[scenes]
    peak = window_at(_peak(residual[scenes], scale), scale.expand(len(scenes), 1))
    rows, more = torch.arange(len(scenes), device=counts.device), counts < air.num_steps
    next_one, last = counts.clamp(max=air.num_steps - 1), (counts - 1).clamp(min=0)

    def put(where: Tensor, t: Tensor | int, window: Tensor) -> Tensor:
        where = where.clone()
        where[rows, t] = window
        return where

    def pick(valid: Tensor, counts: Tensor, where: Tensor) -> Hypotheses:
        return Hypotheses(scenes[valid], counts[valid], where[valid])

    yield Hypotheses(scenes, counts, where)
    yield pick(more, counts + 1, where)  # one object more, where the guide would put it
    yield pick(more, counts + 1, put(where, next_one, peak))  # ... where most is missing
    for t in range(air.num_steps):
        has = t < counts
        yield pick(has, counts - 1, put(where, t, where[rows, last]))  # all but the t-th object
        yield pick(has, counts, put(where, t, peak))  # the t-th object where most is missing
        # One window split into two, along four directions.
        scale_t = positive_scale(where[:, t, :1])
        centre = -where[:, t, 1:] / scale_t
        for angle in (0.0, math.pi / 4, math.pi / 2, 3 * math.pi / 4):
            away = centre.new_tensor([math.cos(angle), math.sin(angle)]) * SPLIT / scale_t
            halves = (window_at(centre + sign * away, scale_t.clamp(min=scale)) for sign in (1, -1))
            yield pick(
                has & more, counts + 1, put(put(where, t, next(halves)), next_one, next(halves))
            )


def _peak(residual: Tensor, scale: Tensor) -> Tensor:
    """Where a window of that scale covers most of what is missing, in [-1, 1], [F, 2]."""
    missing = residual.clamp(min=0)
    if missing.dim() == 4:
        missing = missing.sum(1)
    size = missing.shape[-1]
    side = int(size / scale) // 2 * 2 + 1
    best = avg_pool2d(missing[:, None], side, 1, side // 2).flatten(1).argmax(1)
    return (2 * torch.stack((best % size, best // size), 1) + 1) / size - 1


def _fit(
    air: AIR, images: Tensor, hypotheses: Hypotheses, where_sd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fits hypotheses about the images, [K, (C,) H, H]; their ELBOs and means of z."""
    counts, where = hypotheses.counts, hypotheses.where.clone()
    per_object = images.repeat_interleave(air.num_steps, 0)
    windows = image_to_window(where.flatten(0, 1), air.window_size, air.x_size, per_object)
    what, what_sd = (code.view(*where.shape[:2], -1) for code in air.encode(windows))
    used = in_use(air, counts)

    def elbo() -> Tensor:
        q_where, q_what = Normal(where, where_sd, False), Normal(what, what_sd, False)
        canvas = paint_scenes(air, q_where.rsample(), q_what.rsample(), counts)
        p_where = Normal(air.z_where_loc_prior, air.z_where_scale_prior, False)
        p_what = Normal(torch.zeros_like(what), torch.ones_like(what), False)
        kl = kl_divergence(q_where, p_where).sum(-1) + kl_divergence(q_what, p_what).sum(-1)
        return air.likelihood.log_prob(images, canvas) - (kl * used).sum(1)

    where.requires_grad_()
    what.requires_grad_()
    optimizer = torch.optim.Adam(
        [{"params": [where], "lr": WHERE_RATE}, {"params": [what], "lr": WHAT_RATE}]
    )
    for _ in range(NUM_STEPS):
        with torch.enable_grad():  # and none of the model's own
            where.grad, what.grad = torch.autograd.grad(-elbo().sum(), (where, what))
        optimizer.step()
    elbos = torch.stack([elbo() for _ in range(SAMPLES)]).mean(0)
    return elbos.nan_to_num(-math.inf), where.detach(), what.detach()


def _with_winners(
    found: SceneLatents, hypotheses: Hypotheses, scores: Tensor, where: Tensor, what: Tensor
) -> SceneLatents:
    """What was found, with the hypothesis of the highest score about each scene in its place."""
    count_probs, size = found.count_probs.clone(), found.count_probs.shape[1]
    cells = hypotheses.scenes * size + hypotheses.counts
    of_counts = torch.full_like(count_probs, -math.inf).flatten()
    of_counts = of_counts.scatter_reduce(0, cells, scores, "amax").view_as(count_probs)
    winners = (scores == of_counts.amax(1)[hypotheses.scenes]).nonzero()[:, 0]
    scenes = hypotheses.scenes[winners]
    count_probs[scenes] = of_counts[scenes].softmax(1)
    new_where, new_what = found.where.clone(), found.what.clone()
    new_where[scenes], new_what[scenes] = where[winners], what[winners]
    return SceneLatents(count_probs, new_where, new_what, found.where_sd)
