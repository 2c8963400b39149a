"""The model, the guide and the baseline, against a second computation in plain torch."""

import inspect
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from helpers import by_grid_sample, count_on, loss_and_gradients, pixels_of, small_air
from pyro import poutine
from pyro.infer import SVI, TraceGraph_ELBO
from pyro.ops.provenance import detach_provenance
from pyro.poutine.messenger import Messenger
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.distributions import Bernoulli, Normal
from torch.nn.functional import softplus

from air import AIR, latents_to_tensor
from air.background import SCALES, Background
from air.likelihoods import FLIP_PROB, BernoulliLikelihood
from air.looks import Glimpse
from air.modules import ImageLSTMCell
from air.priors import geometric_presence
from air.support.handlers import LocalParameters


class RecordedChoices(Messenger):
    """Remembers the images, the counts and the noise that a guide drew."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Any = 0
        self.noise: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        name, value = msg["name"], detach_provenance(msg["value"]).detach()
        if name == "data":
            self.index = value
        elif name.startswith("z_pres"):
            self.counts = self.counts + value[:, 0].long()
        else:
            self.noise[name] = ((value - msg["fn"].mean) / msg["fn"].variance.sqrt()).detach()


COLOURS = {"glimpse_colours": [0.7, -0.6, 0.1, 0.3]}  # for two channels


def glimpse(air: AIR, seen: Tensor, windows: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels around the greatest blurred difference, and mean and sd to which `predict` relates."""
    size, scale = air.x_size, float(air.z_where_loc_prior[0])
    window = size / scale
    parts, centres, masks = [], [], []
    grid = (torch.arange(size) + 0.5) * 2 / size - 1
    free = seen.new_ones(len(seen), size, size)
    for s, x, y in (each.detach()[:, :, None, None].unbind(1) for each in windows):
        # In half sides of the window, of which 0.9 are covered, with soft edges.
        across, down = s * grid + x, s * grid[:, None] + y
        free = free * (1 - torch.exp(-((across**4 + down**4) / 0.9**4)))
    shown = seen.reshape(len(seen), -1, size, size)
    for image, left in zip(shown.detach(), free, strict=True):
        energy = (image * left).abs().reshape(-1, size, size).sum(0)
        if (threshold := air.look.threshold) is not None:
            weighed = image.reshape(-1, size * size)
            weighed = weighed if air.look.colours is None else air.look.colours @ weighed
            above = weighed.abs().max(0).values.view(size, size)
            masks.append(((above - threshold / 2) / (threshold / 2)).clamp(0, 1))
            energy = masks[-1] * left + 0.01 * energy
        energy = energy.numpy()
        blurred = gaussian_filter(energy, window / 6, mode="constant", truncate=size)
        row, column = np.unravel_index(blurred.argmax(), blurred.shape)
        parts.append((slice(row, row + air.look.side), slice(column, column + air.look.side)))
        centres.append([(column + 0.5 - size / 2), (row + 0.5 - size / 2)])
    seen = torch.cat(
        (shown, *([torch.stack(masks)[:, None]] if masks else []), 1 - free[:, None]), 1
    )
    margin = air.look.side // 2
    padded = torch.nn.functional.pad(seen, [margin] * 4)
    around = torch.stack([image[..., *part] for image, part in zip(padded, parts, strict=True)])
    shift = -torch.tensor(centres, dtype=seen.dtype) / (window / 2)
    where = torch.cat((torch.full_like(shift[:, :1], scale), shift), 1)
    return around, where, torch.tensor([float(air.z_where_scale_prior[0]), 0.5, 0.5])


def lstm(
    cell: ImageLSTMCell, inputs: Tensor, state: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    weights = (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
    return torch.lstm_cell(inputs, state, *weights)


def posterior_of_background(background: Background, levels: Tensor) -> Normal:
    """By linear systems, where cells are pixels; those far from the background count little."""
    components, off = background.components, levels - background.mean
    precision = components @ components.T / 0.3**2 + torch.eye(len(components)).to(off)
    found = []
    for explained in (torch.zeros_like(off), off):
        for scale in SCALES:
            weights = (1 + ((off - explained) / scale) ** 2) ** -2
            likely = weights * off + (1 - weights) * explained
            explained = (torch.linalg.pinv(components.T) @ likely.T).T @ components
        near = 1 / (1 + ((off - explained) / SCALES[-1]) ** 2)
        found.append((near.sum(1), torch.linalg.solve(precision, components @ likely.T / 0.3**2).T))
    (near, z), (other_near, other) = found
    z = torch.where((other_near > near)[:, None], other, z)
    return Normal(z, precision.inverse().diagonal().sqrt().expand_as(z))


def by_hand(
    air: AIR, x: Tensor, counts: Tensor, noise: dict[str, Tensor], prior: list[float], scale: float
) -> tuple[Tensor, Tensor]:
    """ELBO and loss of a batch as the paper's equations give them, costs multiplied by `scale`."""
    n, size, window, masking = len(x), air.x_size, air.window_size, air.use_masking
    z_pres = x.new_ones(n, 1)
    z_where, z_what = air.z_where_init.expand(n, -1), air.z_what_init.expand(n, -1)
    state = (air.h_init.expand(n, -1), air.c_init.expand(n, -1))
    bl_state = (air.bl_h_init.expand(n, -1), air.bl_c_init.expand(n, -1))
    where_prior = Normal(air.z_where_loc_prior, air.z_where_scale_prior)
    canvas, pathwise, behind = torch.zeros_like(x), x.new_zeros(n), 0.0
    if air.background is not None:
        q_behind = posterior_of_background(air.background, x.flatten(1))
        z = q_behind.loc + q_behind.scale * noise["z_background"]
        behind = (air.background.mean + z @ air.background.components).clamp(0, 1).view_as(x)
        canvas = canvas + behind
        pathwise = pathwise + (Normal(0, 1).log_prob(z) - q_behind.log_prob(z)).sum(1)
    cost_of_background = pathwise
    chosen, sampled, scores, baselines, windows = [], [], [], [], []
    unset = z_where, z_what, state, bl_state
    for t in range(air.num_steps):
        seen = x - behind
        if air.look.looks_again:
            z_where, z_what, state, bl_state = unset
        if air.look.follows_canvas:
            seen = x - canvas
        around, loc, sd = seen, air.z_where_loc_prior, air.z_where_scale_prior
        if isinstance(air.look, Glimpse):
            around, loc, sd = glimpse(air, seen, windows)
        latents = torch.cat((z_where, z_what, z_pres), 1)
        state = lstm(air.rnn, torch.cat((air.embed(around.flatten(1)), latents), 1), state)
        out = air.predict.mlp(state[0])
        bl_inputs = air.bl_embed(seen.detach().flatten(1)), latents.detach()
        bl_state = lstm(air.bl_rnn, torch.cat(bl_inputs, 1), bl_state)
        baselines.append(air.bl_predict(bl_state[0])[:, 0])
        if masking:
            baselines[-1] = baselines[-1] * z_pres[:, 0]
        q_pres = Bernoulli(out[:, 0].sigmoid() * z_pres[:, 0])
        p_pres = Bernoulli(prior[t] * z_pres[:, 0])
        before, z_pres = z_pres, (counts > t).double()[:, None]
        if isinstance(air.look, Glimpse):  # its centre stays the middle at every scale
            loc = loc * (loc[:, :1] + out[:, 1:2]) / loc[:, :1]
            loc[:, :1] -= out[:, 1:2]
        q_where = Normal(out[:, 1:4] + loc, (softplus(out[:, 4:]) + 1e-6) * sd)
        z_where = q_where.loc + q_where.scale * noise[f"z_where_{t}"]
        windows.append(z_where)
        seen = by_grid_sample(seen, 1 / z_where[:, :1], -z_where[:, 1:] / z_where[:, :1], window)
        loc, raw = air.encode.mlp(seen.flatten(1)).chunk(2, 1)
        q_what = Normal(loc, softplus(raw) + 1e-6)
        z_what = q_what.loc + q_what.scale * noise[f"z_what_{t}"]
        present = z_pres.view(n, *[1] * (x.dim() - 1))
        colours = air.decode.mlp(z_what)[:, : window**2 * air.channels]
        opacity = air.decode.mlp(z_what)[:, window**2 * air.channels :]
        if opacity.numel():
            opacity = (opacity - 2).sigmoid().view(n, *[1] * (x.dim() - 3), window, window)
            colours = colours.sigmoid().view(*x.shape[:-2], window, window) * opacity
            opacity = (
                by_grid_sample(opacity.expand_as(colours), z_where[:, :1], z_where[:, 1:], size)
                * present
            )
        else:
            colours = (colours - 2).sigmoid().view(*x.shape[:-2], window, window)
        painted = by_grid_sample(colours, z_where[:, :1], z_where[:, 1:], size) * present
        if air.background is not None:
            canvas = canvas - canvas * opacity + painted
        elif isinstance(air.likelihood, BernoulliLikelihood):
            canvas = 1 - (1 - canvas) * (1 - painted)
        else:
            canvas = canvas + painted
        here, reached = (z_pres[:, 0], before[:, 0]) if masking else (1.0, 1.0)
        log_q = q_pres.log_prob(z_pres[:, 0]) * reached
        log_p = p_pres.log_prob(z_pres[:, 0]) * reached
        rest = (where_prior.log_prob(z_where) - q_where.log_prob(z_where)).sum(1) * here
        rest += (Normal(0, 1).log_prob(z_what) - q_what.log_prob(z_what)).sum(1) * here
        pathwise = pathwise + log_p + rest
        # without a mask, what step t's window holds does not depend on z_pres_t
        chosen.append(log_p - log_q + (rest if masking else 0))
        sampled.append(log_p - log_q + rest)
        scores.append(log_q)
    pixels: Any = Normal(canvas, 0.3)
    if isinstance(air.likelihood, BernoulliLikelihood):
        pixels = Bernoulli(canvas * (1 - FLIP_PROB) + (1 - canvas) * FLIP_PROB)
    likelihood = pixels.log_prob(x).flatten(1).sum(1)
    elbo = likelihood + cost_of_background + sum(sampled)
    surrogate, regression = scale * (likelihood + pathwise).sum(), x.new_zeros(())
    for t, (score, baseline) in enumerate(zip(scores, baselines, strict=True)):
        cost = scale * (likelihood + chosen[t] + sum(sampled[t + 1 :])).detach()
        value = scale * baseline if air.use_baselines else torch.zeros_like(baseline)
        surrogate = surrogate + (score * (cost - value).detach()).sum()
        if air.use_baselines:
            regression = regression + ((cost - value) ** 2).sum()
    return scale * elbo.sum(), regression - surrogate


@pytest.mark.parametrize(
    ("num_steps", "options"),
    [
        (1, {}),
        (3, {}),
        (3, {"use_baselines": False}),
        (3, {"use_masking": False}),
        (3, {"embed_net": None, "x_size": 9}),
        (3, {"embed_channels": [3, 2], "embed_net": [7, 5]}),
        (3, {"guide_input": "difference"}),
        (3, {"guide_input": "difference", "use_masking": False}),
        (3, {"channels": 3, "guide_input": "difference"}),
        (3, {"channels": 3, "guide_input": "difference", "embed_channels": [4]}),
        (1, {"guide_input": "glimpse"}),
        (3, {"guide_input": "glimpse"}),
        (3, {"channels": 3, "guide_input": "glimpse", "embed_net": [5], "use_masking": False}),
        (3, {"background_model": "pca", "guide_input": "glimpse", "embed_channels": [4]}),
        (3, {"guide_input": "glimpse", "glimpse_threshold": 0.4}),
        (3, {"channels": 2, "guide_input": "glimpse", "glimpse_threshold": 0.5} | COLOURS),
        (3, {"likelihood": "bernoulli"}),
        (3, {"likelihood": "bernoulli", "channels": 2, "guide_input": "difference"}),
        (3, {"background_model": "pca", "z_background_size": 2}),
        (3, {"background_model": "pca", "likelihood": "bernoulli"}),
        (3, {"background_model": "pca", "channels": 3, "guide_input": "difference"}),
        (3, {"background_model": "pca", "use_masking": False}),
    ],
    ids=str,
)
def test_elbo_and_every_gradient_equal_a_second_computation(
    num_steps: int, options: dict[str, Any]
) -> None:
    air = small_air(num_steps=num_steps, **options).double()
    if air.look.looks_again:  # where h is always that of the start, zero
        torch.nn.init.normal_(air.h_init)
        torch.nn.init.normal_(air.bl_h_init)
    images = air.likelihood.prepare(torch.rand(100, *pixels_of(air), dtype=torch.float64))
    if air.background is not None:
        air.background.rows.round_()  # its cells are pixels, but only up to single precision
        air.background.fit(images, torch.zeros(100, 12, 12, dtype=torch.bool))
    prior = geometric_presence(0.3, num_steps)
    drawn = RecordedChoices()
    arguments: dict[str, Any] = {"batch_size": 40, "z_pres_prior_p": prior.__getitem__}
    vars(air)["guide"] = drawn(air.guide)
    loss, ours = loss_and_gradients(air, images, **arguments)
    elbo, theirs = by_hand(air, images[drawn.index], drawn.counts, drawn.noise, prior, 100 / 40)
    theirs.backward()

    assert set(drawn.counts.tolist()) == set(range(num_steps + 1)), "not every pattern was drawn"

    assert -loss == pytest.approx(elbo.item(), rel=1e-9)
    for name, parameter in air.named_parameters():
        if num_steps == 3 and air.use_baselines:  # each parameter is of use
            assert ours[name].abs().sum() > 0, name
        if parameter.grad is None:
            assert name not in ours
        else:
            torch.testing.assert_close(ours[name], parameter.grad, msg=name, rtol=1e-6, atol=1e-6)


def test_a_step_on_the_difference_is_a_first_step_on_what_is_left() -> None:
    """So it can be told to find more objects than it was trained on."""
    with LocalParameters():
        _compare_steps()


def _compare_steps() -> None:
    air, images = small_air(guide_input="difference").double(), torch.rand(9, 12, 12).double()
    trace: Any = poutine.trace(air.guide).get_trace(images)
    where, what, _ = (
        [trace.nodes[f"{kind}_{t}"]["value"] for t in range(3)]
        for kind in ("z_where", "z_what", "z_pres")
    )
    count_on(air, 2, 1.0)
    first = small_air(num_steps=1).double()
    first.load_state_dict(air.state_dict())
    longer = small_air(num_steps=8, guide_input="difference").double()
    longer.load_state_dict(air.state_dict())
    trace = poutine.trace(poutine.condition(air.guide, _all_on(trace))).get_trace(images)
    left = images  # leaves [0, 1], which is refused while validation is enabled
    for t in range(3):
        known = {"z_pres_0": torch.ones(9, 1).double(), "z_where_0": where[t], "z_what_0": what[t]}
        with pyro.validation_enabled(False):
            step: Any = poutine.trace(poutine.condition(first.guide, known)).get_trace(left)
        for kind in ("z_pres", "z_where", "z_what"):
            mine, its = trace.nodes[f"{kind}_{t}"]["fn"], step.nodes[f"{kind}_0"]["fn"]
            torch.testing.assert_close(mine.mean, its.mean)
            torch.testing.assert_close(mine.variance, its.variance)
        left = left - air.paint(where[t : t + 1], what[t : t + 1])[0]
    assert len(longer.guide(images)[0]) == 8


def _all_on(trace: Any) -> dict[str, Tensor]:  # noqa: ANN401
    sites = {name: site["value"] for name, site in trace.nodes.items() if name.startswith("z_")}
    return {n: torch.ones_like(v) if n.startswith("z_pres") else v for n, v in sites.items()}


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("options", [{}, {"use_masking": False}, {"guide_input": "glimpse"}])
def test_a_batch_of_one_image_trains(size: int, options: dict[str, Any]) -> None:
    air = small_air(**options)
    arguments = {"batch_size": 1} if size > 1 else {}
    TraceGraph_ELBO().loss_and_grads(air.model, air.guide, torch.rand(size, 12, 12), **arguments)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in air.parameters())


def test_the_contract_of_pyros_example() -> None:
    air = AIR(
        num_steps=3, x_size=50, window_size=28, z_what_size=50, rnn_hidden_size=256,
        encoder_net=[200], decoder_net=[200], use_masking=True, use_baselines=True,
        likelihood_sd=0.3,
    )  # fmt: skip
    X = torch.rand(70, 50, 50)
    adam = pyro.optim.Adam({"lr": 1e-4})
    svi = SVI(air.model, air.guide, adam, loss=TraceGraph_ELBO())
    assert isinstance(svi.step(X, batch_size=64), float)
    z, x = air.prior(5)
    assert x.shape == (5, 50, 50)
    assert latents_to_tensor(z).shape == (5, 3, 4)
    z_where, z_pres = air.guide(X[:10], batch_size=64)
    assert [t.shape for t in z_where] == [(10, 3)] * 3
    assert [t.shape for t in z_pres] == [(10, 1)] * 3
    torch.testing.assert_close(latents_to_tensor((z_where, z_pres))[:, 1, 3:], z_pres[1])


def test_help_shows_every_argument() -> None:
    arguments = inspect.signature(AIR).parameters
    assert [*arguments][:3] == ["num_steps", "x_size", "window_size"]
    assert (arguments["num_steps"].default, arguments["embed"].default) == (3, None)
    with pytest.raises(TypeError, match="no_such_argument"):
        AIR(no_such_argument=1)


def test_weights_keep_the_names_of_pyros_example() -> None:
    air = AIR(embed_net=[100], bl_predict_net=[20])
    lstm_shapes = {"weight_ih": (1024, 154), "weight_hh": (1024, 256)}
    lstm_shapes |= {"bias_ih": (1024,), "bias_hh": (1024,)}
    expected = {f"{p}rnn.{k}": v for p in ("", "bl_") for k, v in lstm_shapes.items()}
    layers = {
        "encode.mlp": [784, 200, 100], "decode.mlp": [50, 200, 784], "predict.mlp": [256, 200, 7],
        "bl_predict": [256, 20, 1], "embed": [2500, 100], "bl_embed": [2500, 100],
    }  # fmt: skip
    for net, sizes in layers.items():
        for i, (a, b) in enumerate(pairwise(sizes)):
            expected |= {f"{net}.seq.{2 * i}.weight": (b, a), f"{net}.seq.{2 * i}.bias": (b,)}
    for prefix in ("", "bl_"):
        expected |= {f"{prefix}h_init": (1, 256), f"{prefix}c_init": (1, 256)}
    expected |= {"z_where_init": (1, 3), "z_what_init": (1, 50)}
    expected |= {"z_where_loc_prior": (3,), "z_where_scale_prior": (3,)}
    assert {name: tuple(t.shape) for name, t in air.state_dict().items()} == expected


def test_the_prior_paints_what_it_draws(air: AIR) -> None:
    (_, z_pres), x = air.prior(40, lambda t: 0.5)
    assert (torch.cat(z_pres, 1).diff(dim=1) <= 0).all()  # no object after the last
    present = torch.cat(z_pres, 1).sum(1)
    assert (x[present == 0] == 0).all()
    assert (x[present > 0].sum((1, 2)) > 0).all()
    assert set(present.tolist()) == {0, 1, 2, 3}


def test_the_default_prior_is_geometric(air: AIR) -> None:
    trace: Any = poutine.trace(air.prior).get_trace(5)
    probs = [trace.nodes[f"z_pres_{t}"]["fn"].mean for t in range(3)]
    expected = geometric_presence(1e-4, 3)
    torch.testing.assert_close(probs[0], torch.full((5, 1), expected[0]))
    assert air.presence(None) == expected


def test_a_far_off_guide_stays_finite(air: AIR, images: Tensor) -> None:
    with torch.no_grad():
        air.predict.mlp.seq[-1].bias[1] = -3.0  # s around zero
        air.predict.mlp.seq[-1].bias[4] = 3.0
    for _ in range(2):
        many = images.repeat(10, 1, 1)
        assert math.isfinite(TraceGraph_ELBO().loss_and_grads(air.model, air.guide, many))
    for name, parameter in air.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
