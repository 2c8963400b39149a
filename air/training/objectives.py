"""Objectives of training and estimators of their gradients, as functions of the guide's paths.

A path is one run of the guide with every step active (`air.marginal.sample_paths`). For path k of
an image and n objects, let w_kn = p(x, n, z_1..n) / q(z_1..n | x) and f_kn = log w_kn - log q(n).
All functions below share the passes through the nets, and differ in nothing else. z_where and
z_what are reparameterised, but for reweighted wake-sleep. The gradient of q(n) is what differs:

| objective, estimator | value, the mean over paths | gradient of q(n) |
|---|---|---|
| elbo, marginal | sum_n q(n) f_n | exact; unbiased |
| elbo, rloo | f_n, n drawn from q | score function, less the mean of other draws; unbiased |
| elbo, mvd | f_n, n drawn from q | f(go on) - f(stop) at every step; unbiased |
| iwae, marginal | L_K = log 1/K sum_kn w_kn | that of the ELBO, for q(n) cancels in L_K |
| iwae, vimco | log 1/K sum_k exp f_kn | score function, less the bound without k; unbiased |
| rws, marginal | L_K | q(n) and q(z) are fitted to the weighted paths; biased for finite K |

L_K is the importance-weighted bound (Burda et al. 2016, arXiv:1509.00519) with the count summed
out: exp f_kn is an unbiased estimate of p(x), and the sum of w_kn over n is its expectation. So
ELBO <= L_1 <= L_2 <= ... <= log p(x). Sources: Kool et al. 2019, "Buy 4 REINFORCE samples, get a
baseline for free" (rloo); Mohamed et al. 2020, arXiv:1906.10652 (mvd); Mnih and Rezende 2016,
arXiv:1602.06725 (vimco); Bornschein and Bengio 2015, arXiv:1406.2751, and Le et al. 2019,
arXiv:1805.10469 (rws). The paper's estimator, the score function with a learnt baseline, is `AIR`
itself with Pyro's TraceGraph_ELBO. While training, the value is shown in place of the ELBO;
evaluations have the ELBO itself.

Left out are REBAR, RELAX and ARM, since the exact sum costs less than what they would improve upon,
and tail-adaptive weights, for which every latent must be reparameterised. Pyro's enumeration of
z_pres has the expectation of `marginal`, and paints 2^T canvases instead of T + 1.
"""

import math

import torch
from torch import Tensor

from air.marginal import Objective, Paths, detached, marginal

DRAWS = 4  # counts that `rloo` draws from each path


def rloo(paths: Paths) -> tuple[Tensor, Tensor]:
    """The ELBO, by the score function with leave-one-out baselines over counts of the same path."""
    n = _draw(paths.log_q, DRAWS)
    log_q, f = paths.log_q.gather(2, n), (paths.log_weights - paths.log_q).gather(2, n)
    of_others = (f.sum(2, keepdim=True) - f) / (DRAWS - 1)
    return f.mean((1, 2)), ((f - of_others).detach() * log_q + f).mean((1, 2))


def mvd(paths: Paths) -> tuple[Tensor, Tensor]:
    """The ELBO, by measure-valued derivatives of each step's Bernoulli.

    The derivative by the probability of step t, where it is reached, is f(go on) - f(stop). The
    count that was drawn is one of both; the other one is n = t - 1, or a second draw among n >= t.
    """
    log_q, f = paths.log_q, paths.log_weights - paths.log_q
    last = log_q.shape[2] - 1
    n, steps = _draw(log_q, 1), torch.arange(1, last + 1, device=f.device)
    counts = torch.arange(last + 1, device=f.device)
    later = log_q.masked_fill((counts <= n) & (n < last), -math.inf)
    f_n, f_later = f.gather(2, n), f.gather(2, _draw(later, 1))
    go_on, stop = torch.where(steps <= n, f_n, f_later), f[..., :-1]
    at_least = log_q.flip(2).logcumsumexp(2).flip(2)  # log q(n >= t), t = 0..T
    presence = (at_least[..., 1:] - at_least[..., :-1]).exp()
    derivative = ((go_on - stop) * (steps <= n + 1)).detach()
    surrogate = f_n[..., 0] + (derivative * presence).sum(2)
    return f_n.mean((1, 2)), surrogate.mean(1)


def iwae(paths: Paths) -> tuple[Tensor, Tensor]:
    """The importance-weighted bound, with the count summed out."""
    bound, _ = _bound_and_posterior(paths)
    constant = {"log_p": paths.log_p.detach(), "log_q_z": paths.log_q_z.detach()}
    return bound, bound + marginal(paths._replace(**constant))[0]


def vimco(paths: Paths) -> tuple[Tensor, Tensor]:
    """The importance-weighted bound with one count drawn for each path, K >= 2."""
    n, number = _draw(paths.log_q, 1), paths.log_q.shape[1]
    if number < 2:
        raise ValueError("num_paths: expected 2 or more with vimco, got 1")
    log_q, f = (
        paths.log_q.gather(2, n)[..., 0],
        (paths.log_weights - paths.log_q).gather(2, n)[..., 0],
    )
    bound = f.logsumexp(1) - math.log(number)
    own = torch.eye(number, dtype=torch.bool, device=f.device)
    of_others = ((f.sum(1, keepdim=True) - f) / (number - 1))[:, :, None]  # log of geometric means
    without = torch.where(own, of_others, f[:, None]).logsumexp(2) - math.log(number)
    return bound, bound + ((bound[:, None] - without).detach() * log_q).sum(1)


@detached
def rws(paths: Paths) -> tuple[Tensor, Tensor]:
    """Reweighted wake-sleep, both parts awake, for paths through which no gradient flows.

    The model follows the gradient of the bound; the guide is fitted to the same weighted paths and
    counts. Weights are those of each image alone.
    """
    bound, posterior = _bound_and_posterior(paths)
    return bound, (posterior * (paths.log_p + paths.log_q_z + paths.log_q)).sum((1, 2))


OBJECTIVES: dict[tuple[str, str], Objective] = {
    ("elbo", "marginal"): marginal,
    ("elbo", "rloo"): rloo,
    ("elbo", "mvd"): mvd,
    ("iwae", "marginal"): iwae,
    ("iwae", "vimco"): vimco,
    ("rws", "marginal"): rws,
}


def _draw(log_probs: Tensor, number: int) -> Tensor:
    """Counts, [B, K, number], drawn from log probabilities, [B, K, T + 1], up to a constant."""
    probs = log_probs.detach().softmax(2)
    drawn = torch.multinomial(probs.flatten(0, 1), number, replacement=True)
    return drawn.view(*probs.shape[:2], number)


def _bound_and_posterior(paths: Paths) -> tuple[Tensor, Tensor]:
    """L_K, [B], and the normalised weights of all paths and counts, [B, K, T + 1]."""
    log_weights = paths.log_weights
    bound = log_weights.logsumexp((1, 2)) - math.log(log_weights.shape[1])
    posterior = log_weights.flatten(1).softmax(1).detach()
    return bound, posterior.view_as(log_weights)
