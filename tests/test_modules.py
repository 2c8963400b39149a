"""The nets: shapes, ranges, and the LSTM cell against torch's."""

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from air.modules import MLP, ConvEmbed, Decoder, Encoder, ImageLSTMCell, Predict, make_embed


@pytest.mark.parametrize("n", [1, 6])
def test_outputs_have_the_right_shapes_and_ranges(n: int) -> None:
    loc, scale = Encoder(49, [8], 5, nn.ReLU)(torch.rand(n, 49))
    assert loc.shape == scale.shape == (n, 5)
    assert (scale > 0).all()
    pres_p, where_loc, where_scale = Predict(11, [], 1, 3, nn.Tanh)(torch.randn(n, 11))
    assert pres_p.shape == (n, 1)
    assert where_loc.shape == where_scale.shape == (n, 3)
    assert ((pres_p > 0) & (pres_p < 1)).all()
    assert Decoder(49, [8], 5, -2.0, True, nn.ReLU)(torch.randn(n, 5)).shape == (n, 49)


def test_standard_deviations_stay_above_zero() -> None:
    encoder = Encoder(4, [], 2, nn.ReLU)
    nn.init.constant_(encoder.mlp.seq[0].bias, -1e4)
    _, scale = encoder(torch.zeros(1, 4))
    assert (scale > 0).all()


def test_the_decoder_adds_its_bias_before_the_sigmoid() -> None:
    plain = Decoder(4, [], 2, None, False, nn.ReLU)
    biased = Decoder(4, [], 2, -2.0, True, nn.ReLU)
    biased.load_state_dict(plain.state_dict())
    z = torch.randn(3, 2)
    torch.testing.assert_close(biased(z), torch.sigmoid(plain(z) - 2))


def test_an_mlp_has_the_requested_layers() -> None:
    kinds = [type(layer) for layer in MLP(3, [4, 5], nn.Tanh).seq]
    assert kinds == [nn.Linear, nn.Tanh, nn.Linear]
    assert isinstance(MLP(3, [4], nn.Tanh, output_non_linearity=True).seq[-1], nn.Tanh)
    x = torch.randn(2, 3)
    assert torch.equal(MLP(3, [], nn.Tanh)(x), x)


@pytest.mark.parametrize(("channels", "x_size"), [(1, 12), (3, 11), (2, 1)])
def test_convolutions_embed_as_torchs_functions_do(channels: int, x_size: int) -> None:
    net = make_embed(channels, x_size, [4, 6], [7, 5], nn.Tanh)
    image = torch.rand(3, channels, x_size, x_size)
    weights = [each.detach() for each in net.parameters()]
    x = torch.tanh(conv2d(image, weights[0], weights[1], stride=2, padding=2))
    x = torch.tanh(conv2d(x, weights[2], weights[3], stride=2, padding=1)).flatten(1)
    for i in (4, 6):
        x = torch.tanh(x @ weights[i].t() + weights[i + 1])
    torch.testing.assert_close(net(image.flatten(1)), x)
    assert len(weights) == 8


def test_without_linear_layers_the_last_convolution_is_the_embedding() -> None:
    net = ConvEmbed(1, 50, [2, 3], [], nn.ReLU)
    embedded = net(torch.rand(4, 2500))
    assert embedded.shape == (4, 3 * 13 * 13)
    assert isinstance(make_embed(1, 50, [], [4], nn.ReLU), MLP)


def test_the_image_lstm_cell_equals_torchs_with_its_gradients() -> None:
    ours = ImageLSTMCell(20, 6, 8).double()
    theirs = nn.LSTMCell(26, 8).double()
    theirs.load_state_dict(ours.state_dict())
    image = torch.rand(4, 20, dtype=torch.float64)
    latents = torch.randn(3, 4, 6, dtype=torch.float64)
    state = their_state = (torch.zeros(4, 8).double(), torch.zeros(4, 8).double())
    projection = ours.project(image)
    for z in latents:
        state = ours(projection, (z[:, :2], z[:, 2:]), state)
        their_state = theirs(torch.cat((image, z), 1), their_state)
    for a, b in zip(state, their_state, strict=True):
        torch.testing.assert_close(a, b)
    (state[0] * state[1]).sum().backward()
    (their_state[0] * their_state[1]).sum().backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
