"""Where a step of the guide looks: the same at every place of an object."""

from collections.abc import Sequence

import pyro
import pytest
import torch
from helpers import small_air
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch.utils.flop_counter import FlopCounterMode

from air.looks import Glimpse, Place
from air.marginal import MarginalAIR
from air.spatial_transformer import centre_of
from air.support.model_settings import ModelSettings

SIDE = 40


def glimpse(**settings: object) -> Glimpse:
    return Glimpse(ModelSettings(x_size=SIDE, scale_prior_mean=4.0, **settings))  # type: ignore[arg-type]


def see(
    look: Glimpse, images: torch.Tensor, windows: Sequence[torch.Tensor] = ()
) -> tuple[torch.Tensor, Place]:
    """What is seen of images, [B, channels, G, G], and the place."""
    seen, place = look(images, windows, (torch.zeros(3), torch.ones(3)))
    return seen.view(len(images), -1, look.side, look.side), place


def image_of(spot: torch.Tensor, x: int, y: int) -> torch.Tensor:
    image = torch.zeros(*spot.shape[:-2], SIDE, SIDE)
    image[..., y : y + spot.shape[-2], x : x + spot.shape[-1]] = spot
    return image


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_glimpse_is_the_same_wherever_the_object_is(channels: tuple[int, ...], sign: int) -> None:
    spot = sign * torch.rand(*channels, 7, 5)
    places = [(0, 0), (12, 20), (35, 33), (3, 31)]
    seen, (where, sd) = see(glimpse(), torch.stack([image_of(spot, *place) for place in places]))

    torch.testing.assert_close(seen, seen[:1].expand_as(seen))
    x, y = -where[:, 1:].t() / where[:, :1].t() * SIDE / 2  # pixels from the middle
    of_first = torch.tensor(places[0]) - torch.stack((x, y), 1)[0]
    torch.testing.assert_close(torch.stack((x, y), 1) + of_first, torch.tensor(places).float())
    assert (where[:, 0] == 4).all()
    assert (sd > 0).all()


def test_it_looks_at_the_largest_of_several_objects_and_not_between_two() -> None:
    strong, weak = torch.ones(8, 8), torch.ones(8, 8) / 2
    images = torch.stack([
        image_of(strong, 3, 4) + image_of(weak, 24, 28),
        image_of(weak, 3, 4) + image_of(strong, 24, 28),
        image_of(strong, 10, 10) + 0.99 * image_of(strong, 19, 10),  # a pixel apart
    ])  # fmt: skip
    pixels = (glimpse().centres(images) + 1) * SIDE / 2
    expected = torch.tensor([[7.0, 8.0], [28.0, 32.0], [14.0, 14.0]])
    assert ((pixels - expected).abs() <= 1).all()


def test_an_image_without_differences_gives_a_finite_glimpse() -> None:
    look = glimpse()
    seen, (where, _) = see(look, torch.zeros(2, SIDE, SIDE))
    assert seen.shape == (2, 2, look.side, look.side)
    assert (where[:, 1:].abs() <= where[:, :1]).all()  # its centre is in the image


def test_a_user_defined_net_embeds_glimpses_and_the_baseline_whole_images() -> None:
    settings = ModelSettings(x_size=12, scale_prior_mean=3.0, guide_input="glimpse")
    pixels = 2 * Glimpse(settings).side ** 2
    air = small_air(guide_input="glimpse", embed=torch.nn.Linear(pixels, 4))
    air.guide(torch.rand(3, 12, 12))
    assert air.bl_rnn.weight_ih.shape[1] > 12**2
    with pytest.raises(ValueError, match=rf"embed: expected a net for inputs \[B, {pixels}\]"):
        small_air(guide_input="glimpse", embed=torch.nn.Linear(144, 4))


def test_windows_larger_than_the_image_have_a_glimpse() -> None:
    look = Glimpse(ModelSettings(x_size=9, scale_prior_mean=0.05))
    assert look.side <= 2 * 9 + 1
    assert see(look, torch.rand(2, 9, 9))[0].shape == (2, 2, look.side, look.side)


def test_what_the_guide_finds_moves_with_the_object() -> None:
    air = small_air(guide_input="glimpse", x_size=24, scale_prior_mean=3.0)
    spot = torch.rand(5, 6)
    images = torch.zeros(2, 24, 24)
    images[0, 4:9, 6:12] = images[1, 11:16, 9:15] = spot  # 7 pixels lower, 3 to the right
    trace = poutine.trace(air.guide).get_trace(images)
    pres, where = trace.nodes["z_pres_0"]["fn"], trace.nodes["z_where_0"]["fn"]
    torch.testing.assert_close(pres.mean[0], pres.mean[1])
    torch.testing.assert_close(where.variance[0], where.variance[1])
    assert where.mean[0, 0] != 3.0, "the window is not of the glimpse's scale"
    centres = centre_of(where.mean) * 12  # in pixels
    torch.testing.assert_close(centres[1] - centres[0], torch.tensor([3.0, 7.0]))


@pytest.mark.parametrize("guide_input", ["image", "difference", "glimpse"])
def test_the_cost_of_a_step_of_training_grows_linearly_with_the_number_of_objects(
    guide_input: str,
) -> None:
    def flops(num_steps: int) -> int:
        air = small_air(num_steps=num_steps, guide_input=guide_input, use_baselines=False)
        exact = MarginalAIR(air)
        pyro.clear_param_store()
        with FlopCounterMode(display=False) as counted:
            Trace_ELBO().loss_and_grads(exact.model, exact.guide, torch.rand(5, 12, 12))
        return int(counted.get_total_flops())

    two, three, four = map(flops, (2, 3, 4))
    assert three - two > 0
    assert four - three == three - two
    if guide_input == "image":  # is multiplied by its weights once, and their gradient is one
        assert two > four - two
