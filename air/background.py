"""The background of a scene: one latent for each image, z_background, painted under all objects.

AIR as published paints on black. A background that is not black then costs an object: one window
covers as much of it as it can. With z_background ~ N(0, 1) and a small decoder, the background has
a place of its own, as in SPACE (Lin et al. 2020, arXiv:2001.02407).

Objects cover what is behind them. So a step paints colours and an opacity, see
`likelihoods.PixelLikelihood`, and an object can be darker than the background.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from air.support.model_settings import ModelSettings
from modules import MLP, Decoder, Encoder, NonLinearity


class Background(nn.Module):
    """p(background | z_background) p(z_background) and q(z_background | x).

    A "constant" background has one level per channel, and a code of C dimensions. A "vae" has a
    level for each pixel.
    """

    def __init__(self, settings: ModelSettings, non_linearity: NonLinearity) -> None:
        super().__init__()
        s, area = settings, settings.x_size**2
        self.shape = [s.channels, s.x_size, s.x_size] if s.channels > 1 else [s.x_size, s.x_size]
        is_constant = s.background_model == "constant"
        self.z_size = s.channels if is_constant else s.z_background_size
        pixels, hidden = s.channels * area, s.background_net
        self.encode = Encoder(pixels, hidden, self.z_size, non_linearity)
        self.decode: nn.Module = (
            ConstantDecoder(s.channels, area)
            if is_constant
            else Decoder(pixels, hidden[::-1], self.z_size, None, True, non_linearity)
        )

    def model(self, like: Tensor, n: int) -> Tensor:
        """Samples z_background, and paints the backgrounds of n images, [n, (C,) H, H].

        They have the type and the device of `like`.
        """
        zeros = like.new_zeros(n, self.z_size)
        code = dist.Normal(zeros, zeros.new_ones(()))
        return self.paint(pyro.sample("z_background", code.to_event(1)))

    def guide(self, images: Tensor) -> Tensor:
        """Samples z_background given images, [B, (C,) H, H], and paints the backgrounds."""
        code = dist.Normal(*self.encode(images.flatten(1)))
        return self.paint(pyro.sample("z_background", code.to_event(1)))

    def paint(self, z_background: Tensor) -> Tensor:
        """Backgrounds from their codes, [B, z_size] to [B, (C,) H, H]."""
        return self.decode(z_background).view(len(z_background), *self.shape)


class ConstantDecoder(nn.Module):
    """The same level at every pixel, for each channel: [B, C] to [B, C * pixels]."""

    def __init__(self, channels: int, pixels: int) -> None:
        super().__init__()
        self.pixels = pixels
        self.mlp = MLP(channels, [channels], nn.Identity)

    def forward(self, z: Tensor) -> Tensor:
        levels = torch.sigmoid(self.mlp(z))
        return levels[:, :, None].expand(-1, -1, self.pixels).flatten(1)
