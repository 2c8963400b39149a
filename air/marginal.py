"""The exact expectation over the count: AIR with z_pres summed out.

The guide depends on z_pres only through stopping. So one run of the guide with every step active, a
path, is enough, and with q(n) = (1 - q_{n+1}) q_1 ... q_n its ELBO is

    sum_n q(n) [log p(x | z_1..n) + log p(z_1..n) + log p(n) - log q(z_1..n) - log q(n)]

where z_t is (z_where_t, z_what_t). Its expectation is AIR's own ELBO. No z_pres is sampled, so no
score-function gradient and no baseline are needed. The sum costs T + 1 sums over pixels and no
further pass through a net. Section 11 of ``air/tutorial`` derives it.

`sample_paths` returns the terms, for several paths of each image. `marginal` is the ELBO; other
objectives and estimators are in `air.training.objectives`, and the bound of `air.evaluation` is a
function of the same terms.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import pyro
import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from air.air import AIR
from air.priors import PresencePrior, count_log_probs
from air.support.checks import check_whole
from air.support.handlers import LocalParameters

CountTerm = Callable[[Tensor, Tensor, int], None]  # of images, log q(n), and the size of the data

NEEDS_MASKING = (
    "the exact expectation over the count needs masking, because finished steps must cost nothing; "
    "without masking, use the score function (--estimator score)"
)


class AllStepsActive(Messenger):
    """Runs AIR's guide with every step active, and records q(z_pres_t = 1 | z_pres_{t-1} = 1).

    The sites of z_pres are hidden from outer handlers.

    Args:
        use_means: Whether z_where and z_what are their means instead of samples.
        detach: Whether no gradient flows through their samples.
    """

    def __init__(self, use_means: bool = False, detach: bool = False) -> None:
        super().__init__()
        self.use_means, self.detach = use_means, detach
        self.presence: list[Tensor] = []  # q_t, T times [B, 1]

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"].startswith("z_pres"):
            q = msg["fn"].mean
            self.presence.append(q)
            msg["value"], msg["done"], msg["stop"] = torch.ones_like(q), True, True
        elif msg["name"].startswith("z_"):
            if self.use_means:
                msg["value"], msg["done"] = msg["fn"].mean, True
            elif self.detach:
                msg["value"], msg["done"] = msg["fn"].sample().detach(), True


class Paths(NamedTuple):
    """K runs of the guide for each of B images, with every step active; for each, all counts n.

    Each part is [B, K, T + 1], n = 0..T. The background counts as part of z_1..n.
    """

    log_p: Tensor  # log p(x | z_1..n) + log p(z_1..n) + log p(n)
    log_q_z: Tensor  # log q(z_1..n | x)
    log_q: Tensor  # log q(n | x, z_1..n)

    @property
    def log_weights(self) -> Tensor:
        """The logarithm of p(x, n, z_1..n) / q(z_1..n | x); summed over n, it estimates p(x)."""
        return self.log_p - self.log_q_z


def sample_paths(
    air: AIR,
    images: Tensor,
    z_pres_prior_p: PresencePrior | None = None,
    num_paths: int = 1,
    detach: bool = False,
) -> Paths:
    """Runs the guide `num_paths` times for each image, in one batch.

    Args:
        air: The model.
        images: As `AIR.to_images` returns them, [B, (C,) H, H].
        z_pres_prior_p: As for `AIR.guide`.
        num_paths: The number of runs K.
        detach: Whether no gradient flows through the samples of z.

    Raises:
        ValueError: If the AIR does not use masking.
    """
    if not air.use_masking:
        raise ValueError(NEEDS_MASKING)
    repeated, steps = images.repeat_interleave(num_paths, 0), AllStepsActive(detach=detach)
    n, times = len(repeated), range(air.num_steps)

    def objects() -> None:
        if air.background is not None:
            air.background.model(images, n)
        for t in times:
            air.sample_object(t, images.new_ones(n, 1))

    with poutine.block(), LocalParameters():
        guide: Any = poutine.trace(steps(air.guide)).get_trace(repeated)
        model: Any = poutine.trace(poutine.replay(objects, guide)).get_trace()

    def log_probs(trace: Any) -> Tensor:  # noqa: ANN401
        """Of the first n objects, [B * K, T + 1]; a subclass of AIR may have further latents."""
        sums = [torch.zeros_like(steps.presence[0][:, 0])] * (air.num_steps + 1)
        for name, node in trace.nodes.items():
            if node["type"] == "sample" and name.startswith("z_"):
                t = name.rpartition("_")[2]
                n = int(t) + 1 if t.isdecimal() else 0  # without a step, that of the background
                sums[n] = sums[n] + node["fn"].log_prob(node["value"])
        return torch.stack(sums, 1).cumsum(1)

    values = {name: node.get("value") for name, node in guide.nodes.items()}
    painted = air.paint(*([values[f"{z}_{t}"] for t in times] for z in ("z_where", "z_what")))
    canvas = torch.zeros_like(repeated)
    if air.background is not None:
        canvas = air.background.paint(values["z_background"])
    presence = torch.stack([images.new_ones(()) * p for p in air.presence(z_pres_prior_p)])
    log_likelihoods = _log_likelihoods(air, repeated, painted, canvas)
    log_p = log_likelihoods + log_probs(model) + count_log_probs(presence)
    log_q = count_log_probs(torch.cat(steps.presence, 1))
    parts = (log_p, log_probs(guide), log_q)
    return Paths._make(part.view(len(images), num_paths, -1) for part in parts)


# From paths to the value for each image, and to a tensor whose gradient trains AIR, [B] each.
Objective = Callable[[Paths], tuple[Tensor, Tensor]]


def marginal(paths: Paths) -> tuple[Tensor, Tensor]:
    """The ELBO, with the exact expectation over the count."""
    elbo = (paths.log_q.exp() * (paths.log_weights - paths.log_q)).sum(2).mean(1)
    return elbo, elbo


def detached(objective: Objective) -> Objective:
    """Marks an objective of paths through whose z no gradient flows.

    A function that wraps such an objective must be marked itself.
    """
    objective.detached = True  # type: ignore[attr-defined]
    return objective


@dataclass(eq=False)
class MarginalAIR:
    """`model` and `guide` for SVI, which train an AIR by an objective of the guide's paths.

    They take the arguments of `AIR.model` and `AIR.guide`. The sites of AIR are hidden, and the
    loss is the objective, for the whole data set: ``TraceGraph_ELBO()`` and ``Trace_ELBO()`` give
    the same loss and gradient. ``RenyiELBO(num_particles=K)`` is valid for all images at once, as
    for `AIR`, but looser than the bound of `air.training.objectives`: each weight is the
    exponential of a path's ELBO. The baseline is never used, so an AIR with
    ``use_baselines=False`` is faster.

    Args:
        air: The model.
        objective: `marginal`, a function of `air.training.objectives`, or your own.
        num_paths: Runs of the guide for each image, K.
        count_term: Adds a term to the loss; see `air.training.teacher.Teacher`.

    Raises:
        ValueError: If the AIR does not use masking, there is no path, or the objective returns
            other than two tensors of [B].
    """

    air: AIR
    objective: Objective = marginal
    num_paths: int = 1
    count_term: CountTerm | None = None

    def __post_init__(self) -> None:
        if not self.air.use_masking:
            raise ValueError(NEEDS_MASKING)
        check_whole("num_paths", self.num_paths, 1)

    def guide(
        self,
        data: Tensor,
        batch_size: int | None = None,
        z_pres_prior_p: PresencePrior | None = None,
        num_images: int | None = None,
    ) -> None:
        """Draws the batch."""
        with self.air.images_of(data, batch_size, z_pres_prior_p, num_images, draw=True):
            pass

    def model(
        self,
        data: Tensor,
        batch_size: int | None = None,
        z_pres_prior_p: PresencePrior | None = None,
        num_images: int | None = None,
    ) -> None:
        """Adds the objective of the batch, whose gradient is that of the estimator."""
        with self.air.images_of(data, batch_size, z_pres_prior_p, num_images) as images:
            pass  # the paths have plates of their own
        detach = getattr(self.objective, "detached", False)
        paths = sample_paths(self.air, images, z_pres_prior_p, self.num_paths, detach)
        found = self.objective(paths)
        shapes = [list(part.shape) for part in found] if isinstance(found, tuple) else []
        if shapes != [[len(images)]] * 2:
            expected = f"expected a tuple of two tensors, [{len(images)}] each"
            raise ValueError(f"objective: {expected}, got {shapes or type(found).__name__}")
        (value, surrogate), size = found, num_images or len(data)
        plate = pyro.plate("paths", len(images), device=str(images.device))
        with plate, poutine.scale(scale=size / len(images)):
            pyro.factor("obs", surrogate + (value - surrogate).detach())
        if self.count_term is not None:
            self.count_term(images, paths.log_q[:, 0], size)


def _log_likelihoods(air: AIR, images: Tensor, painted: Tensor, background: Tensor) -> Tensor:
    """For n = 0..T, log p(x | z_1..n), [B, T + 1], of painted objects [T, B, (C,) H, H]."""
    canvases = accumulate(painted.unbind(), air.likelihood.add, initial=background)
    return torch.stack([air.likelihood.log_prob(images, canvas) for canvas in canvases], 1)
