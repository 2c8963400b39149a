"""Refinement: better scenes than the guide infers in one pass, without labels.

Two things are done:

- *Fitting.* Now and then the guide puts one window over two close objects, though the model
  explains the scene better by two. Such a scene is explained badly, which shows without labels: in
  the relative residual, |x - canvas|^2 / |x|^2. For these scenes, hypotheses with one object more,
  one fewer or one elsewhere are fitted by gradient steps on their ELBO (Kim et al. 2018,
  arXiv:1802.02550, refine the latents of a VAE in this way).

  A hypothesis has a count n, of which it is certain, and for each object a Normal q(z_where) and
  q(z_what), whose means are fitted. Given n, its ELBO is E_q[log p(x | z)] - sum_t KL(q || p). The
  hypothesis with the highest score wins: ELBO + `TRUST` log g(n), where g(n) is the guide's q(n),
  but at least `LEAST_PROB`.

- *Merging.* Now and then a guide puts two windows on one object, half of it under each. Both
  explain the scene well, so the ELBO hardly says that one object is enough. But one code describes
  a window over both well if they hold one object, and badly if they hold two close ones. So the
  residual of the merged object, |x - canvas|^2 / |x - canvas of the other objects|^2, tells one
  object from two.

The constants were chosen on scenes of digits.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import avg_pool2d

from air.air import AIR
from air.scene import Scene, first_objects, paint
from air.spatial_transformer import (
    centre_of,
    image_to_window,
    peak_centres,
    positive_scale,
    where_at,
)

# Fitting.
BADLY_EXPLAINED = 0.2  # relative residual above which a scene is fitted
NUM_STEPS = 100  # of Adam
WHERE_RATE, WHAT_RATE = 0.05, 0.1  # learning rates of the means
SAMPLES = 8  # in the ELBO by which hypotheses are compared
# Power of the guide's q(n), which takes the place of the count's prior. The ELBO alone is no good
# judge of the count: a further object also explains what no code of one object can. Guides can be
# too certain, so no q(n) counts as less than `LEAST_PROB`.
TRUST, LEAST_PROB = 5.0, 3e-4
MAX_AT_ONCE = 256  # hypotheses, to bound the memory
SPLIT = 0.6  # from the centre of a window to those of its two halves, in half sides

# Merging.
CLOSE = 0.75  # distance of two centres, in sides of a window, below which objects may be merged
# Two objects are one if one alone leaves less than the first share unexplained, and less than the
# second more than both leave.
ONE_OBJECT, WORSE = 0.18, 0.05
# The windows that are tried: their distances from the middle of both centres, in half sides, and
# their scales, relative to the mean of both. A lower scale is a larger window.
SHIFT, ZOOM = 0.12, 0.8
NUM_ALONG = 3  # values along each axis, and of the scale
NUM_TRIES = NUM_ALONG**3


@torch.no_grad()
def refine_scene(air: AIR, images: Tensor, scene: Scene) -> Scene:
    """Fits the scenes that are explained badly, and merges close objects in every scene.

    `scene` is what the guide inferred in the images, [B, (C,) H, H], as `AIR.to_images` returns
    them. The result for an image does not depend on the other images, and draws no random numbers
    from the global generators.

    Returns:
        The scenes. For a scene that was explained badly, q(n) is proportional to exp(score) of the
        best hypothesis with n objects, and zero where no hypothesis has n. Where two objects become
        one, the probabilities of both counts change places. Neither is a posterior, so calibration
        of refined counts says little. All other scenes stay as they are.
    """
    canvas = paint(air, scene)
    residual = relative_residual(images, canvas, scene.background)
    rows = (residual > BADLY_EXPLAINED).nonzero()[:, 0]
    if len(rows):
        scene = _fit_scenes(air, images, scene, rows, images - canvas)
    close = (closest_windows(scene)[0] < CLOSE).nonzero()[:, 0]
    for k in torch.split(close, MAX_AT_ONCE // NUM_TRIES) if len(close) else ():
        scene = scene.put(k, merge(air, images[k], scene.pick(k)))
    return scene


def relative_residual(images: Tensor, canvas: Tensor, background: Tensor | float = 0) -> Tensor:
    """|x - canvas|^2 / |x - background|^2 of each image, [B, (C,) H, H] to [B]."""
    tiny = torch.finfo(images.dtype).tiny
    return _energy(images - canvas) / _energy(images - background).clamp(min=tiny)


def _energy(images: Tensor) -> Tensor:
    return images.flatten(1).square().sum(1)


# Fitting.


class Hypotheses(NamedTuple):
    """K hypotheses, each about one scene."""

    rows: Tensor  # indices of the scenes, [K]
    counts: Tensor  # [K]
    where: Tensor  # z_where at which fitting starts, [K, T, 3]
    is_new: Tensor  # windows other than those that the guide inferred, bool [K, T]


def _fit_scenes(air: AIR, images: Tensor, scene: Scene, rows: Tensor, residual: Tensor) -> Scene:
    """Fits hypotheses about the scenes with these indices; keeps the best."""
    starts = list(make_hypotheses(air, residual, scene, rows))
    hypotheses = Hypotheses._make(map(torch.cat, zip(*starts, strict=True)))
    # All hypotheses share their noise, so that the best does not win by chance, and an image has
    # the same result whatever other images there are.
    kind: Any = {"generator": torch.Generator("cpu").manual_seed(0), "device": "cpu"}
    size = NUM_STEPS + SAMPLES, air.num_steps, 3 + air.z_what_size
    noise = torch.randn(size, dtype=torch.float32, **kind).to(images)
    parts = []
    for k in torch.split(torch.arange(len(hypotheses.rows), device=images.device), MAX_AT_ONCE):
        part = Hypotheses._make(each[k] for each in hypotheses)
        parts.append(_fit(air, images[part.rows], scene.pick(part.rows), part, noise))
    elbos, where, what = map(torch.cat, zip(*parts, strict=True))
    log_g = scene.log_q[hypotheses.rows, hypotheses.counts].clamp(min=math.log(LEAST_PROB))
    return _with_winners(scene, hypotheses, elbos + TRUST * log_g, where, what)


def make_hypotheses(air: AIR, residual: Tensor, scene: Scene, rows: Tensor) -> Iterator[Hypotheses]:
    """Hypotheses about some scenes: three about each, and six more for each object in it.

    `rows`, [F], are their indices, and `residual` is images minus canvases, [B, (C,) H, H].
    """
    found, counts = scene.pick(rows), scene.counts[rows]
    where, used = found.where, found.in_use
    # The mean scale of the scene's windows; that of the prior for a scene without objects.
    scale = (where[..., 0] * used).sum(1) / counts.clamp(min=1)
    scale = positive_scale(torch.where(counts > 0, scale, air.z_where_loc_prior[0]))[:, None]
    missing = residual[rows]
    # Objects only add light, or they cover a background that may be lighter.
    missing = missing.clamp(min=0) if air.background is None else missing.abs()
    peak = where_at(_peak(missing, scale[:, 0]), scale)
    scenes, more = torch.arange(len(rows), device=rows.device), counts < air.num_steps
    next_one, last = counts.clamp(max=air.num_steps - 1), (counts - 1).clamp(min=0)
    none_new = torch.zeros_like(used)

    def pick(valid: Tensor, counts: Tensor, *windows: tuple[Tensor | int, Tensor]) -> Hypotheses:
        """Hypotheses with windows, [F, 3], in the places of those of some steps, [F]."""
        changed, is_new = where.clone(), none_new.clone()
        for t, window in windows:
            changed[scenes, t], is_new[scenes, t] = window, True
        return Hypotheses(rows[valid], counts[valid], changed[valid], is_new[valid])

    yield pick(counts >= 0, counts)
    yield pick(more, counts + 1)  # one object more, where the guide would put it
    yield pick(more, counts + 1, (next_one, peak))  # ... where most is missing
    for t in range(air.num_steps):
        has = t < counts
        yield pick(has, counts - 1, (t, where[scenes, last]))  # all but the t-th object
        yield pick(has, counts, (t, peak))  # the t-th object where most is missing
        # One window split into two, along four directions.
        centre, scale_t = centre_of(where[:, t]), positive_scale(where[:, t, :1])
        for angle in (0.0, math.pi / 4, math.pi / 2, 3 * math.pi / 4):
            away = centre.new_tensor([math.cos(angle), math.sin(angle)]) * SPLIT / scale_t
            one, other = (
                where_at(centre + sign * away, torch.maximum(scale_t, scale)) for sign in (1, -1)
            )
            yield pick(has & more, counts + 1, (t, one), (next_one, other))


def _peak(missing: Tensor, scale: Tensor) -> Tensor:
    """Where a window of each scale, [F], covers most of what is missing, in [-1, 1], [F, 2]."""
    if missing.dim() == 4:
        missing = missing.sum(1)
    sides = (missing.shape[-1] / scale).int() // 2 * 2 + 1
    best = missing.new_empty(len(missing), 2)
    for side in {*sides.tolist()}:
        k = sides == side
        best[k] = peak_centres(avg_pool2d(missing[k][:, None], side, 1, side // 2)[:, 0])
    return best


def _fit(
    air: AIR, images: Tensor, scene: Scene, hypotheses: Hypotheses, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fits hypotheses about images, [K, (C,) H, H], and the scenes in them.

    Returns:
        ELBOs, [K], and the means of z_where, [K, T, 3], and z_what, [K, T, Z].
    """
    counts, where, is_new = hypotheses.counts, hypotheses.where.clone(), hypotheses.is_new
    used = first_objects(counts, air.num_steps)
    # Objects of the guide keep their codes; the encoder describes what lies under new windows.
    others = paint(air, scene, used & ~is_new)
    left = air.look.remainder(images, scene.background, others)
    per_object = left.repeat_interleave(air.num_steps, 0)
    windows = image_to_window(where.flatten(0, 1), air.window_size, air.x_size, per_object)
    codes = (code.view(*where.shape[:2], -1) for code in air.encode(windows))
    of_guide = scene.what, scene.what_sd
    what, what_sd = (
        torch.where(is_new[..., None], new, old) for new, old in zip(codes, of_guide, strict=True)
    )
    # The standard deviations of the guide's objects in use, or of all where it uses none.
    counted = scene.in_use | (scene.counts == 0)[:, None]
    where_sd = (scene.where_sd * counted[..., None]).sum(1, True) / counted.sum(1)[:, None, None]
    q_where, q_what = Normal(where, where_sd, False), Normal(what, what_sd, False)

    def elbo(noise: Tensor) -> Tensor:
        of_where, of_what = noise[:, :3], noise[:, 3:]
        drawn = scene._replace(where=where + where_sd * of_where, what=what + what_sd * of_what)
        p_where = Normal(air.z_where_loc_prior, air.z_where_scale_prior, False)
        p_what = Normal(torch.zeros_like(what), torch.ones_like(what), False)
        kl = kl_divergence(q_where, p_where).sum(-1) + kl_divergence(q_what, p_what).sum(-1)
        log_likelihood = air.likelihood.log_prob(images, paint(air, drawn, used))
        return log_likelihood - (kl * used).sum(1)

    where.requires_grad_()
    what.requires_grad_()
    optimizer = torch.optim.Adam(
        [{"params": [where], "lr": WHERE_RATE}, {"params": [what], "lr": WHAT_RATE}]
    )
    for step in range(NUM_STEPS):
        with torch.enable_grad():  # and none of the model's own
            where.grad, what.grad = torch.autograd.grad(-elbo(noise[step]).sum(), (where, what))
        optimizer.step()
    elbos = torch.stack([elbo(each) for each in noise[NUM_STEPS:]]).mean(0)
    return elbos.nan_to_num(-math.inf), where.detach(), what.detach()


def _with_winners(
    scene: Scene, hypotheses: Hypotheses, scores: Tensor, where: Tensor, what: Tensor
) -> Scene:
    """The scenes, with the hypothesis of the highest score about each in its place."""
    log_q, size = scene.log_q.clone(), scene.log_q.shape[1]
    cells = hypotheses.rows * size + hypotheses.counts
    of_counts = torch.full_like(log_q, -math.inf).flatten()
    of_counts = of_counts.scatter_reduce(0, cells, scores, "amax").view_as(log_q)
    winners = (scores == of_counts.amax(1)[hypotheses.rows]).nonzero()[:, 0]
    rows = hypotheses.rows[winners]
    log_q[rows] = of_counts[rows].log_softmax(1)
    new_where, new_what = scene.where.clone(), scene.what.clone()
    new_where[rows], new_what[rows] = where[winners], what[winners]
    return scene._replace(log_q=log_q, where=new_where, what=new_what)


# Merging.


def closest_windows(scene: Scene) -> tuple[Tensor, Tensor]:
    """The two closest windows in use of each scene.

    Returns:
        The distance of their centres in sides of a window, [B], infinite where there are fewer than
        two; and the steps of both, the earlier one first, [B, 2].
    """
    where, counts, device = scene.where, scene.counts, scene.where.device
    steps = torch.triu_indices(where.shape[1], where.shape[1], 1, device=device)
    if not steps.numel():
        return where.new_full((len(where),), torch.inf), counts.new_zeros(len(where), 2)
    centres = centre_of(where)[:, steps]  # [B, 2, pairs, 2]
    scales = positive_scale(where[..., 0])[:, steps].mean(1)
    distances = (centres[:, 0] - centres[:, 1]).norm(dim=-1) * scales / 2
    nearest = distances.masked_fill(steps[1] >= counts[:, None], torch.inf).min(1)
    return nearest.values, steps.T[nearest.indices]


def merge(air: AIR, images: Tensor, scene: Scene) -> Scene:
    """Puts one object in place of the two closest ones of each scene, if the two are one.

    The guide's encoder describes what lies under each of 27 windows around the middle of both; the
    one that explains the scene best is kept. Images, [B, (C,) H, H], are as `AIR.to_images` returns
    them. Nothing here waits for the device.

    Returns:
        The scenes. Where two objects are one, it is in the earlier step of both, the last object in
        the later step, and the probabilities of both counts change places.
    """
    near, pair = closest_windows(scene)
    counts, steps = scene.counts, torch.arange(air.num_steps, device=images.device)
    others = scene.in_use & (steps != pair[:, :1]) & (steps != pair[:, 1:])
    of_others = paint(air, scene, others)
    windows = _windows_around(scene.where.gather(1, pair[..., None].expand(-1, -1, 3)))
    flat, each = windows.flatten(0, 1), images.repeat_interleave(NUM_TRIES, 0)
    behind = of_others.repeat_interleave(NUM_TRIES, 0)
    background = scene.background.repeat_interleave(NUM_TRIES, 0)
    left = air.look.remainder(each, background, behind)
    codes, _ = air.encode(image_to_window(flat, air.window_size, air.x_size, left))
    canvases = air.likelihood.add(behind, air.paint([flat], [codes])[0])
    unexplained = _energy(images - of_others).clamp(min=torch.finfo(images.dtype).tiny)
    best = _energy(each - canvases).view(len(images), NUM_TRIES).min(1)
    of_one = best.values / unexplained
    of_two = _energy(images - paint(air, scene)) / unexplained
    are_one = (near < CLOSE) & (of_one < ONE_OBJECT) & (of_one < of_two + WORSE)

    chosen = torch.arange(len(images), device=images.device) * NUM_TRIES + best.indices
    last = (counts - 1).clamp(min=0)[:, None, None]

    def put(latents: Tensor, merged: Tensor) -> Tensor:
        at_last = latents.gather(1, last.expand(-1, -1, latents.shape[-1]))
        both = torch.cat((at_last, merged[chosen][:, None]), 1)
        changed = latents.scatter(1, pair.flip(1)[..., None].expand_as(both), both)
        return torch.where(are_one[:, None, None], changed, latents)

    both_counts = torch.cat((last[:, 0], counts[:, None]), 1)
    swapped = scene.log_q.scatter(1, both_counts, scene.log_q.gather(1, both_counts.flip(1)))
    log_q = torch.where(are_one[:, None], swapped, scene.log_q)
    return scene._replace(log_q=log_q, where=put(scene.where, flat), what=put(scene.what, codes))


def _windows_around(both: Tensor) -> Tensor:
    """z_where of windows around the middle of two, [B, 2, 3] to [B, 27, 3]."""
    middle = centre_of(both).mean(1, True)
    scale = positive_scale(both[..., :1]).mean(1, True)
    kind: Any = {"dtype": both.dtype, "device": both.device}
    shifts = torch.linspace(-SHIFT, SHIFT, NUM_ALONG, **kind)
    tries = torch.cartesian_prod(torch.linspace(ZOOM, 1, NUM_ALONG, **kind), shifts, shifts)
    return where_at(middle + tries[:, 1:] / scale, tries[:, :1] * scale)
