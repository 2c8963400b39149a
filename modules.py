"""The neural nets of AIR, in plain torch.

Each docstring says which conditional distribution the net parameterizes. The parameters have the
names of Pyro's AIR example, so that weights trained there load here.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

NonLinearity = Callable[[], nn.Module]

# Keeps every standard deviation above zero where softplus underflows.
MIN_SD = 1e-6


class MLP(nn.Module):
    """Linear layers with a non-linearity between them, and optionally after the last layer.

    Without layers it is the identity.
    """

    def __init__(
        self,
        in_size: int,
        out_sizes: Sequence[int],
        non_linearity: NonLinearity,
        output_non_linearity: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, o in zip([in_size, *out_sizes], out_sizes, strict=False):
            layers += [nn.Linear(i, o), non_linearity()]
        self.seq = nn.Sequential(*(layers if output_non_linearity else layers[:-1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x)


class ConvEmbed(nn.Module):
    """Image embedding for the LSTMs: convolutions followed by linear layers.

    Each convolution halves the sides. One linear layer cannot see the edges and corners by which
    two touching digits differ from one.

    Inputs are [B, C * H * H], outputs [B, the last of `sizes`], or without `sizes` the pixels of
    all channels of the last convolution.
    """

    def __init__(
        self,
        image_channels: int,
        x_size: int,
        channels: Sequence[int],
        sizes: Sequence[int],
        non_linearity: NonLinearity,
    ) -> None:
        super().__init__()
        self.shape = [image_channels, x_size, x_size]
        layers: list[nn.Module] = []
        side, kernel = x_size, 5
        for i, o in pairwise([image_channels, *channels]):
            layers += [nn.Conv2d(i, o, kernel, stride=2, padding=kernel // 2), non_linearity()]
            side, kernel = (side + 1) // 2, 3
        self.conv = nn.Sequential(*layers)
        self.mlp = MLP(channels[-1] * side**2, sizes, non_linearity, output_non_linearity=True)

    def forward(self, image: Tensor) -> Tensor:
        return self.mlp(self.conv(image.reshape(-1, *self.shape)).flatten(1))


def make_embed(
    image_channels: int,
    x_size: int,
    conv_channels: Sequence[int],
    sizes: Sequence[int],
    non_linearity: NonLinearity,
) -> nn.Module:
    """The net between the image, [B, C * H * H], and the LSTMs; without layers the identity."""
    if conv_channels:
        return ConvEmbed(image_channels, x_size, conv_channels, sizes, non_linearity)
    pixels = image_channels * x_size**2
    return MLP(pixels, sizes, non_linearity, output_non_linearity=True)


class Encoder(nn.Module):
    """Parameterizes q(z_what | window): [B, C * W * W] to mean and standard deviation, [B, Z]."""

    def __init__(
        self, window_pixels: int, hidden: Sequence[int], z_size: int, non_linearity: NonLinearity
    ) -> None:
        super().__init__()
        self.mlp = MLP(window_pixels, [*hidden, 2 * z_size], non_linearity)

    def forward(self, window: Tensor) -> tuple[Tensor, Tensor]:
        loc, raw_scale = self.mlp(window).chunk(2, 1)
        return loc, softplus(raw_scale) + MIN_SD


class Decoder(nn.Module):
    """The mean of p(window | z_what): [B, Z] to pixel intensities, [B, C * W * W].

    A negative `bias` before the sigmoid makes windows nearly black at the start of training.
    Without the bias every early window worsens the likelihood, and the guide learns to use none.

    With `opacity_pixels`, W * W, objects cover what is behind them. The outputs are then the
    colours multiplied by the opacity, and the opacity, [B, (C + 1) * W * W]; the bias is that of
    the opacity.
    """

    def __init__(
        self,
        window_pixels: int,
        hidden: Sequence[int],
        z_size: int,
        bias: float | None,
        use_sigmoid: bool,
        non_linearity: NonLinearity,
        opacity_pixels: int = 0,
    ) -> None:
        super().__init__()
        self.bias = bias
        self.use_sigmoid = use_sigmoid
        self.sizes = [window_pixels, opacity_pixels]
        self.mlp = MLP(z_size, [*hidden, sum(self.sizes)], non_linearity)

    def forward(self, z_what: Tensor) -> Tensor:
        if not self.sizes[1]:
            return self._intensities(self.mlp(z_what), self.bias)
        colours, opacity = self.mlp(z_what).split(self.sizes, 1)
        opacity = torch.sigmoid(opacity + (self.bias or 0))
        channels = self.sizes[0] // self.sizes[1]
        colours = self._intensities(colours, None) * opacity.repeat(1, channels)
        return torch.cat((colours, opacity), 1)

    def _intensities(self, outputs: Tensor, bias: float | None) -> Tensor:
        if bias is not None:
            outputs = outputs + bias
        return torch.sigmoid(outputs) if self.use_sigmoid else outputs


class Predict(nn.Module):
    """Parameterizes q(z_pres_t, z_where_t | h_t), [B, hidden size].

    Returns the probability of z_pres, [B, 1], and the mean and standard deviation of z_where,
    [B, 3], relative to those of its prior, or to a glimpse.
    """

    def __init__(
        self,
        input_size: int,
        hidden: Sequence[int],
        z_pres_size: int,
        z_where_size: int,
        non_linearity: NonLinearity,
        z_pres_bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.sizes = [z_pres_size, z_where_size, z_where_size]
        self.mlp = MLP(input_size, [*hidden, sum(self.sizes)], non_linearity)
        with torch.no_grad():
            last = self.mlp.seq[-1]
            assert isinstance(last, nn.Linear)
            last.bias[:z_pres_size] += z_pres_bias

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logit, loc, raw_scale = self.mlp(h).split(self.sizes, 1)
        return torch.sigmoid(logit), loc, softplus(raw_scale) + MIN_SD


class Projection(NamedTuple):
    """The inputs of an `ImageLSTMCell` that are the same at every step of a batch."""

    gates: Tensor  # contribution of the image and the biases to the gates, [B, 4 * hidden]
    weight: Tensor  # weights of the latents and the hidden state, [4 * hidden, latents + hidden]


class ImageLSTMCell(nn.RNNCellBase):
    """An ``nn.LSTMCell`` on the input (image, latents), for an image that is the same at all steps.

    The image makes up 2,500 of some 2,550 inputs, so `project` multiplies it by its weights once
    per batch. The parameters are those of an ``nn.LSTMCell`` on the concatenated input.
    """

    def __init__(self, image_size: int, latent_size: int, hidden_size: int) -> None:
        super().__init__(image_size + latent_size, hidden_size, bias=True, num_chunks=4)
        self.split_sizes = [image_size, latent_size]

    def project(self, image: Tensor) -> Projection:
        """Multiplies flat or embedded images, [B, pixels], by their weights, once for all steps."""
        # One split, so that the gradient of weight_ih is one concatenation. The weight is the left
        # factor, so that the rows of its gradient are contiguous; they concatenate ten times as
        # fast as the contiguous columns that `linear` would give.
        image_weight, latent_weight = torch.split(self.weight_ih, self.split_sizes, 1)
        gates = (image_weight @ image.t()).t() + (self.bias_ih + self.bias_hh)
        return Projection(gates, torch.cat((latent_weight, self.weight_hh), 1))

    def forward(
        self, projection: Projection, latents: Sequence[Tensor], state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """One step: latents, [B, ...] each, and state (h, c), [B, hidden], to the next state."""
        h, c = state
        inputs = torch.cat((*latents, h), 1)
        gates = torch.addmm(projection.gates, inputs, projection.weight.t())
        write, keep, candidate, read = gates.chunk(4, 1)  # torch's order: i, f, g, o
        c = torch.sigmoid(keep) * c + torch.sigmoid(write) * torch.tanh(candidate)
        return torch.sigmoid(read) * torch.tanh(c), c
