"""Arguments from Python: bad values are named at the door; nothing in, nothing out."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from helpers import pixels_of, small_air
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceGraph_ELBO
from torch import Tensor

from air import AIR, image_to_window, window_boxes, window_to_image
from air.evaluation import HeldOut, evaluate, importance_weighted_bound, sample_elbo
from air.evaluation.alarms import empty_canvas_elbo
from air.inference import infer, mean_count_probs, sample_prior
from air.marginal import MarginalAIR
from air.priors import geometric_presence
from air.support.model_settings import ModelSettings

X = torch.rand(6, 12, 12)
WHERE = torch.tensor([[3.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_steps", 0), ("num_steps", 2.5), ("num_steps", True), ("x_size", 0),
        ("window_size", -1), ("z_what_size", 0), ("rnn_hidden_size", 0), ("encoder_net", 200),
        ("encoder_net", [0]), ("decoder_net", ["9"]), ("embed_net", [-5]),
        ("non_linearity", "relu"),
        ("decoder_output_bias", float("nan")), ("use_masking", "no"), ("scale_prior_mean", -3.0),
        ("scale_prior_sd", 0), ("pos_prior_sd", -1.0), ("likelihood", "poisson"),
        ("likelihood_sd", 0), ("likelihood_sd", float("inf")), ("guide_input", "both"),
        ("channels", 0), ("baseline_scalar", "1"),
    ],
)  # fmt: skip
def test_arguments_of_air_are_checked(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
        AIR(**{name: value})  # type: ignore[arg-type]


def test_numbers_of_numpy_are_taken_and_become_plain() -> None:
    plain = small_air(embed_net=[6], likelihood_sd=0.5, scale_prior_mean=2, use_masking=True)
    air = small_air(
        num_steps=np.int8(3), x_size=np.uint8(12), window_size=np.int8(7), z_what_size=np.int64(5),
        embed_net=(np.int32(6),), likelihood_sd=np.float32(0.5), scale_prior_mean=np.float64(2),
        use_masking=np.True_, encoder_net=[np.int64(9)],
    )  # fmt: skip
    assert {n: p.shape for n, p in air.named_parameters()} == {
        n: p.shape for n, p in plain.named_parameters()
    }
    assert (type(air.num_steps), type(air.window_size)) == (int, int)
    assert air.z_where_loc_prior.dtype == torch.float32
    assert torch.equal(air.z_where_loc_prior, plain.z_where_loc_prior)
    large = small_air(window_size=np.uint8(20))  # 20 * 20 is more than uint8 holds
    assert large.encode.mlp.seq[0].in_features == 400
    air.guide(X, batch_size=np.int64(2))
    air.prior(np.int64(2))


@pytest.mark.parametrize("nothing", [None, [], ()])
def test_no_layers_of_an_embedding_can_be_said_in_several_ways(nothing: Any) -> None:  # noqa: ANN401
    assert not list(small_air(embed_net=nothing, embed_channels=nothing).embed.parameters())
    settings = ModelSettings(embed_net=nothing, embed_channels=nothing)
    assert settings == ModelSettings()


PROGRAMS: list[Callable[[AIR], Any]] = [
    lambda air: air.guide,
    lambda air: air.model,
    lambda air: MarginalAIR(air).guide,
    lambda air: MarginalAIR(air).model,
]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (X, {"batch_size": 0}, "batch_size: expected a whole number of at least 1, got 0"),
        (X, {"batch_size": -1}, "batch_size: expected a whole number of at least 1, got -1"),
        (X, {"batch_size": 2.0}, "batch_size: expected a whole number .* got 2.0"),
        (X, {"num_images": 5}, "num_images: expected .* at least 6, the images in .*, got 5"),
        (X, {"num_images": 0}, "num_images: expected a whole number of at least 6"),
        (X, {"batch_size": 4, "num_images": 100}, "batch_size: expected None with num_images"),
        (X[:0], {}, r"data: expected one image or more, got \[0, 12, 12\]"),
        (X.numpy(), {}, "data: expected images as a torch.Tensor, got ndarray"),
        (X, {"z_pres_prior_p": [0.5]}, r"z_pres_prior_p: .* got \[0.5\]; .* its __getitem__"),
        (X, {"z_pres_prior_p": 0.5}, "z_pres_prior_p: expected a function .* got 0.5"),
    ],
)
def test_arguments_of_model_and_guide_are_checked(
    program: Callable[[AIR], Any], data: object, options: dict[str, Any], message: str, air: AIR
) -> None:
    with pytest.raises(ValueError, match=message):
        program(air)(data, **options)


@pytest.mark.parametrize("call", [lambda air, p: air.prior(2, p), sample_elbo])
@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ([0.5, 0.5].__getitem__, "a probability for each of 3 steps, got none for step 2"),
        (torch.tensor([0.5]).__getitem__, "for each of 3 steps, got none for step 1"),
        ({0: 0.5}.__getitem__, "got none for step 1"),
        (lambda t: 1.5, "expected a probability for step 0, got 1.5"),
        (lambda t: None, "expected a probability for step 0, got None"),
        (lambda t: float("nan"), "expected a probability for step 0, got nan"),
    ],
)
def test_priors_are_checked(call: Callable[..., Any], prior: Any, message: str, air: AIR) -> None:  # noqa: ANN401
    arguments = (air, prior) if call is not sample_elbo else (air, X, prior)
    with pytest.raises(ValueError, match=message):
        call(*arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda air: air.prior(-1), "n: expected a whole number of at least 0, got -1"),
        (lambda air: air.prior(2.0), "n: expected a whole number"),
        (lambda air: sample_prior(air, -1, 0), "num_scenes: expected .* at least 0, got -1"),
        (lambda air: sample_prior(air, 2, 0, [1.0, 1.0]), r"count_prior: expected 4 .* got 2"),
        (lambda air: sample_prior(air, 2, 0, []), "count_prior: expected 4 numbers.* got 0"),
        (lambda air: importance_weighted_bound(air, X, 0), "samples: expected .* at least 1"),
        (lambda air: evaluate(air, HeldOut(X), batch_size=0), "batch_size: expected .* got 0"),
        (lambda air: evaluate(air, HeldOut(X), iwae_samples=-1), "iwae_samples: .* got -1"),
        (lambda air: evaluate(air, HeldOut(X), iwae_scenes=0), "iwae_scenes: .* got 0"),
        (lambda air: evaluate(air, HeldOut(X, torch.ones(5))), "counts: .* each of the 6 .* got 5"),
        (lambda air: HeldOut(X).first(-1), "num_scenes: expected .* got -1"),
        (lambda air: mean_count_probs(air, X[:0]), "expected one image or more"),
        (lambda air: empty_canvas_elbo(air, X[:0]), "there are no images"),
        (lambda air: geometric_presence(0.5, 0), "num_steps must be at least 1"),
        (lambda air: geometric_presence(0.0, 3), r"must be in \(0, 1\], got 0"),
        (lambda air: geometric_presence(-1.0, 3), r"must be in \(0, 1\], got -1"),
        (lambda air: geometric_presence(1.5, 3), r"must be in \(0, 1\], got 1.5"),
        (lambda air: geometric_presence(math.nan, 3), r"must be in \(0, 1\], got nan"),
        (
            lambda air: AIR(likelihood="bernoulli", decoder_output_use_sigmoid=False),
            "likelihood: bernoulli needs decoder_output_use_sigmoid",
        ),
        (lambda air: window_to_image(torch.rand(2, 2), 5, 9, X), r"z_where must be \[B, 3\]"),
        (lambda air: window_to_image(torch.rand(6, 3), 0, 9, X), "at least 1, got 0 and 9"),
        (lambda air: image_to_window(torch.rand(3), 5, 12, X), r"z_where must be \[B, 3\]"),
        (lambda air: window_boxes(torch.rand(2, 4), 9), r"z_where must be \[..., 3\]"),
        (
            lambda air: window_to_image(WHERE, 7, 20, torch.rand(1, 48)),
            r"windows must be \[1, 7, 7\].*got \[1, 48\]",
        ),
        (
            lambda air: image_to_window(WHERE, 7, 20, torch.rand(1, 20, 19)),
            r"images must be \[1, 20, 20\] or.*got \[1, 20, 19\]",
        ),
    ],
)
def test_other_arguments_are_checked(call: Callable[[AIR], Any], message: str, air: AIR) -> None:
    with pytest.raises(ValueError, match=message):
        call(air)


@pytest.mark.parametrize(
    "options", [{}, {"channels": 2}, {"likelihood": "bernoulli", "guide_input": "difference"}]
)
def test_nothing_in_nothing_out(options: dict[str, Any]) -> None:
    """Every result has the shape it has for some images, but for their number."""
    air = small_air(**options)
    images = torch.rand(2, *pixels_of(air))
    prior = torch.Generator()  # draws nothing
    state = prior.get_state()
    calls: list[Callable[[int], Any]] = [
        lambda n: infer(air, images[:n]),
        lambda n: sample_elbo(air, images[:n]),
        lambda n: [importance_weighted_bound(air, images[:n], 2)],
        lambda n: [*air.prior(n)[0][0], *air.prior(n)[0][1], air.prior(n)[1]],
        lambda n: sample_prior(air, n, seed=0),
    ]
    for call in calls:
        for empty, full in zip(call(0), call(2), strict=True):
            size = [2 if side == 0 else side for side in empty.shape]
            assert (size, empty.dtype) == (list(full.shape), full.dtype)
    assert torch.equal(prior.get_state(), state)


# Vectorised particles.


@pytest.mark.parametrize("marginal", [False, True])
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO])
def test_particles_run_one_after_another_and_are_not_vectorised(
    elbo: Any,  # noqa: ANN401
    marginal: bool,
    air: AIR,
) -> None:
    program = MarginalAIR(air) if marginal else air

    def step(data: Tensor = X, **options: Any) -> float:  # noqa: ANN401
        svi = SVI(program.model, program.guide, pyro.optim.Adam({"lr": 0.01}), elbo(**options))
        return float(svi.step(data, batch_size=4))

    assert np.isfinite(step(num_particles=2))
    assert np.isfinite(step(num_particles=1, vectorize_particles=True))
    with pytest.raises(ValueError, match=r"vectorised particles are not .*particles=False"):
        step(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    with pytest.raises(ValueError, match="vectorised particles are not supported"):
        step(num_particles=2, vectorize_particles=True)


@pytest.mark.parametrize("with_guide", [False, True])
def test_predictions_are_drawn_one_after_another(with_guide: bool, air: AIR) -> None:
    guide = air.guide if with_guide else None
    options: dict[str, Any] = {"guide": guide, "num_samples": 3}
    samples = Predictive(air.model, **options)(X)
    assert samples["z_where_0"].shape == (3, 6, 3)
    with pytest.raises(ValueError, match="parallel=False for Predictive"):
        Predictive(air.model, parallel=True, **options)(X)


@pytest.mark.parametrize("program", [*PROGRAMS, lambda air: lambda x: air.prior(6)])
def test_outer_plates_are_refused(program: Callable[[AIR], Any], air: AIR) -> None:
    for dim in (-2, -1):
        with (
            pytest.raises(ValueError, match="a plate particles of size 2 encloses AIR"),
            pyro.plate("particles", 2, dim=dim),
        ):
            program(air)(X)
    for _ in pyro.plate("one after another", 2):
        program(air)(X)
    with pyro.plate("images", 6):
        assert len(air.prior(6)[1]) == 6
