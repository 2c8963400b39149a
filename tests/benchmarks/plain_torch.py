"""The losses of both estimators written out in plain torch: the nets of an `AIR`, and no Pyro.

They are the floor under what a step costs on a CPU, and a second computation of the gradients.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal

from air import AIR
from air.priors import count_log_probs
from air.spatial_transformer import image_to_window


class GuidePath(NamedTuple):
    """One run of the guide and what it paints."""

    continue_probs: Tensor  # q_t, [B, T]
    present: Tensor  # z_pres_t, [B, T]
    kl: Tensor  # log q(z_t) - log p(z_t) of z_where and z_what, [B, T]
    log_likelihoods: Tensor  # of the first n objects, n = 0..T, [B, T + 1]
    baselines: Tensor  # predictions, nats, [B, T]


def run_guide(model: AIR, images: Tensor, sampled: bool) -> GuidePath:
    """Runs along sampled z_pres, or with every step active; takes its noise in our guide's order.

    Args:
        model: Brings the nets.
        images: [B, H, H].
        sampled: Whether z_pres is.
    """
    n, flat = len(images), images.flatten(1)
    prior = Normal(model.z_where_loc_prior, model.z_where_scale_prior)
    image = model.rnn.project(flat)
    bl_image = model.bl_rnn.project(flat) if sampled else None
    where, what = model.z_where_init.expand(n, -1), model.z_what_init.expand(n, -1)
    pres, state = images.new_ones(n, 1), (model.h_init.expand(n, -1), model.c_init.expand(n, -1))
    bl_state = model.bl_h_init.expand(n, -1), model.bl_c_init.expand(n, -1)
    canvas = torch.zeros_like(images)
    steps, all_where, all_what = [], [], []
    for _ in range(model.num_steps):
        latents = where, what, pres
        state = model.rnn(image, latents, state)
        q, loc, sd = model.predict(state[0])
        baseline = torch.zeros_like(pres)
        if bl_image is not None:
            bl_state = model.bl_rnn(bl_image, [z.detach() for z in latents], bl_state)
            baseline = model.bl_predict(bl_state[0]) * pres
            pres = torch.bernoulli((q * pres).detach())
        q_where = Normal(loc + model.z_where_loc_prior, sd * model.z_where_scale_prior)
        where = q_where.rsample()
        window = image_to_window(where, model.window_size, model.x_size, images)
        q_what = Normal(*model.encode(window))
        what = q_what.rsample()
        kl = (q_where.log_prob(where) - prior.log_prob(where)).sum(1, keepdim=True)
        kl = kl + (q_what.log_prob(what) - Normal(0.0, 1.0).log_prob(what)).sum(1, keepdim=True)
        steps.append((q, pres, kl, baseline))
        all_where.append(where)
        all_what.append(what)
    log_likelihoods = [Normal(canvas, model.likelihood.sd).log_prob(images).sum((1, 2))]
    for painted, (_, pres, _, _) in zip(model.paint(all_where, all_what), steps, strict=True):
        canvas = canvas + painted * pres[:, :, None]
        log_likelihoods.append(Normal(canvas, model.likelihood.sd).log_prob(images).sum((1, 2)))
    q, present, kl, baselines = (torch.cat(column, 1) for column in zip(*steps, strict=True))
    return GuidePath(q, present, kl, torch.stack(log_likelihoods, 1), baselines)


def marginal_loss(model: AIR, images: Tensor, presence: Tensor) -> Tensor:
    """Minus the ELBO per image with the count summed out; `presence` is the prior of z_pres_t."""
    path = run_guide(model, images, sampled=False)
    log_p, log_q = count_log_probs(presence), count_log_probs(path.continue_probs)
    inner = (log_q.exp() * (path.log_likelihoods + log_p - log_q)).sum(1)
    return ((path.kl * path.continue_probs.cumprod(1)).sum(1) - inner).mean()


def score_loss(model: AIR, images: Tensor, presence: Tensor) -> Tensor:
    """A loss with the gradients of minus the ELBO per image and of the baseline's regression."""
    path = run_guide(model, images, sampled=True)
    reached = torch.cat((torch.ones_like(path.present[:, :1]), path.present[:, :-1]), 1)
    score = Bernoulli(path.continue_probs).log_prob(path.present) * reached
    # Detached, for on average the gradient of a log-probability is zero.
    kl_pres = score.detach() - Bernoulli(presence).log_prob(path.present) * reached
    cost = kl_pres + path.kl * path.present
    likelihood = path.log_likelihoods[:, -1:]
    after = (cost.flip(1).cumsum(1).flip(1) - likelihood).detach()  # the cost of z_pres_t and on
    ahead = after + path.baselines  # which predict the ELBO from here on, not the cost
    loss = cost.sum(1) - likelihood[:, 0] + (score * ahead.detach()).sum(1)
    return (loss + ahead.square().sum(1)).mean()


LOSSES: dict[str, Callable[[AIR, Tensor, Tensor], Tensor]] = {
    "marginal": marginal_loss,
    "score": score_loss,
}
