"""The nets: their layers, and convolutions against torch's functions."""

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from air.modules import MLP, ConvEmbed, Decoder, make_embed


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
