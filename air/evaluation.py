"""How good a model is on held-out scenes: count accuracy, confusion, ELBO."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from air.air import AIR
from air.priors import PresencePrior
from air.spatial_transformer import window_boxes


@contextmanager
def forked_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's generators for the block, and puts them back as they were after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class _MeanPath(Messenger):
    """Runs the guide with every step active and z_where and z_what at their means.

    The guide depends on z_pres only through stopping, so this one path gives every q(n).
    """

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"].startswith("z_"):
            mean = msg["fn"].mean
            msg["value"] = torch.ones_like(mean) if msg["name"].startswith("z_pres") else mean
            msg["done"] = True


class Inference(NamedTuple):
    """What the guide finds in a batch of images, without sampling."""

    count_probs: Tensor  # q(n) for n = 0..T, [B, T + 1]
    counts: Tensor  # its mode, [B]
    z_where: Tensor  # means, [B, T, 3]; those of steps >= count are not in use
    boxes: Tensor  # (x0, y0, x1, y1) of the windows in pixels, [B, T, 4]
    reconstructions: Tensor  # the canvas painted from the first `counts` objects, [B, H, H]


@torch.no_grad()
def infer(air: AIR, images: Tensor) -> Inference:
    """Infers counts, windows and reconstructions for images, [B, H, H].

    q(n) = (1 - q_{n+1}) * q_1 * ... * q_n, where q_t = q(z_pres_t = 1 | z_pres_{t-1} = 1, x)
    along the path on which z_where and z_what are at their means.
    """
    trace: Any = poutine.trace(_MeanPath()(air.guide)).get_trace(images)
    steps = range(air.num_steps)
    going_on = torch.cat([trace.nodes[f"z_pres_{t}"]["fn"].mean for t in steps], 1)  # [B, T]
    none = torch.zeros_like(going_on[:, :1])
    reached = torch.cat((1 - none, going_on.cumprod(1)), 1)  # q(n >= t)
    count_probs = reached * torch.cat((1 - going_on, 1 - none), 1)
    counts = count_probs.argmax(1)

    choices = {name: s["value"] for name, s in trace.nodes.items() if name.startswith("z_")}
    choices |= {f"z_pres_{t}": (counts > t).to(going_on)[:, None] for t in steps}
    _, canvas = poutine.condition(air.prior, data=choices)(len(images))
    z_where = torch.stack([choices[f"z_where_{t}"] for t in steps], 1)
    return Inference(count_probs, counts, z_where, window_boxes(z_where, air.x_size), canvas)


class ElboTerms(NamedTuple):
    """One sample of each image's ELBO in nats, term by term, [B] each."""

    log_likelihood: Tensor
    kl_pres: Tensor  # log q(z_pres) - log p(z_pres), and so on
    kl_where: Tensor
    kl_what: Tensor
    counts: Tensor  # of the same sample

    @property
    def elbo(self) -> Tensor:
        """Their sum, which is also the log of an importance weight of p(x)."""
        return self.log_likelihood - self.kl_pres - self.kl_where - self.kl_what


@torch.no_grad()
def sample_elbo(air: AIR, images: Tensor, z_pres_prior_p: PresencePrior | None = None) -> ElboTerms:
    """Draws z from the guide once for each image, [B, H, H]."""
    arguments: Any = {"data": images, "z_pres_prior_p": z_pres_prior_p}
    guide: Any = poutine.trace(air.guide).get_trace(**arguments)
    model: Any = poutine.trace(poutine.replay(air.model, trace=guide)).get_trace(**arguments)
    guide.compute_log_prob()
    model.compute_log_prob()
    steps = range(air.num_steps)

    def kl(kind: str) -> Tensor:
        names = [f"{kind}_{t}" for t in steps]
        return sum(guide.nodes[n]["log_prob"] - model.nodes[n]["log_prob"] for n in names)

    counts = sum(guide.nodes[f"z_pres_{t}"]["value"][:, 0] for t in steps).long()
    likelihood = model.nodes["obs"]["log_prob"]
    return ElboTerms(likelihood, kl("z_pres"), kl("z_where"), kl("z_what"), counts)


@torch.no_grad()
def importance_weighted_bound(
    air: AIR, images: Tensor, samples: int, z_pres_prior_p: PresencePrior | None = None
) -> Tensor:
    """A lower bound of each image's log p(x) in nats, [B]: log of the mean of K weights p / q.

    One sample is drawn at a time, so that memory does not grow with their number. With more of
    them the bound rises from the ELBO to log p(x) (Burda et al. 2016, arXiv:1509.00519); with
    none it is minus infinity.
    """
    log_sum = torch.full((len(images),), -math.inf, device=images.device)
    for _ in range(samples):
        log_weights = sample_elbo(air, images, z_pres_prior_p).elbo
        log_sum = torch.logaddexp(log_sum.to(log_weights), log_weights)
    return log_sum - math.log(max(samples, 1))


class Evaluation(NamedTuple):
    """Measures of one model on one set of scenes, in nats per image where nothing else is said."""

    elbo: float
    elbo_se: float  # standard error over images
    log_likelihood: float  # the ELBO's terms: log_likelihood - kl_pres - kl_where - kl_what
    kl_pres: float
    kl_where: float
    kl_what: float
    bound: float | None  # importance-weighted bound of log p(x); None where it was not asked for
    bound_se: float | None
    count_histogram: list[int]  # images by inferred count (mode), 0..T
    accuracy_mode: float | None  # share of images whose count is the mode of q(n); from here on
    accuracy_sample: float | None  # None without true counts. The same for a sample's count
    confusion: list[list[int]] | None  # images by true count (rows) and inferred count (mode)


def confusion_matrix(true: Tensor, inferred: Tensor, num_steps: int) -> Tensor:
    """Images by true count, 0 to the largest, and inferred count, 0..num_steps."""
    rows = int(true.max()) + 1 if len(true) else 1
    cells = true * (num_steps + 1) + inferred
    return torch.bincount(cells, minlength=rows * (num_steps + 1)).reshape(rows, -1)


def evaluate(
    air: AIR,
    images: Tensor,
    true_counts: Tensor | None,
    z_pres_prior_p: PresencePrior | None = None,
    batch_size: int = 500,
    seed: int = 0,
    iwae_samples: int = 0,
) -> Evaluation:
    """Evaluates a model on held-out scenes, in batches of which the last may be short.

    Args:
        air: The model.
        images: [N, H, H], uint8 in [0, 255] or floats in [0, 1], on any device.
        true_counts: [N], or None where they are not known.
        z_pres_prior_p: The prior the ELBO is taken under, as for `AIR.model`.
        batch_size: Images at a time.
        seed: Of the samples. The global generators are left as they were, so that training goes
            on the same whether and whenever it is evaluated.
        iwae_samples: Samples in the importance-weighted bound; 0 for no bound.

    Raises:
        ValueError: If there are no images.
    """
    if not len(images):
        raise ValueError("there are no scenes to evaluate on")
    with forked_rng(seed, air.h_init.device):
        parts = [
            _measure(air, batch.to(air.h_init.device), z_pres_prior_p, iwae_samples)
            for batch in torch.split(images, batch_size)
        ]
    modes, terms, bounds = zip(*parts, strict=True)
    joined = ElboTerms(*map(torch.cat, zip(*terms, strict=True)))
    mode, true = torch.cat(modes), None if true_counts is None else true_counts.cpu().long()
    elbo, elbo_se = mean_and_se(joined.elbo)
    bound, bound_se = mean_and_se(torch.cat(bounds)) if iwae_samples else (None, None)
    return Evaluation(
        elbo,
        elbo_se,
        float(joined.log_likelihood.mean()),
        float(joined.kl_pres.mean()),
        float(joined.kl_where.mean()),
        float(joined.kl_what.mean()),
        bound,
        bound_se,
        torch.bincount(mode, minlength=air.num_steps + 1).tolist(),
        None if true is None else float((mode == true).double().mean()),
        None if true is None else float((joined.counts == true).double().mean()),
        None if true is None else confusion_matrix(true, mode, air.num_steps).tolist(),
    )


def _measure(
    air: AIR, images: Tensor, z_pres_prior_p: PresencePrior | None, iwae_samples: int
) -> tuple[Tensor, ElboTerms, Tensor]:
    """The modes of q(n), a sample of the ELBO and the bounds of one batch, on the CPU."""
    modes, terms = infer(air, images).counts, sample_elbo(air, images, z_pres_prior_p)
    bounds = importance_weighted_bound(air, images, iwae_samples, z_pres_prior_p)
    return modes.cpu(), ElboTerms(*(term.cpu() for term in terms)), bounds.cpu()


def mean_and_se(values: Tensor) -> tuple[float, float]:
    """The mean of [N] values and its standard error, NaN for a single one."""
    values = values.double()
    se = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), se
