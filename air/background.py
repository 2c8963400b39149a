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

MAX_GRID = 32  # cells along each side


class Background(nn.Module):
    """p(background | z_background) p(z_background) and q(z_background | x).

    A "constant" background has one level per channel, and a code of C dimensions. A "vae" has
    levels on a grid of at most `MAX_GRID` cells along each side, between which it is interpolated:
    enough for light, ramps and textures, too coarse to paint objects, and fast in large images.
    """

    rows: Tensor

    def __init__(self, settings: ModelSettings, non_linearity: NonLinearity) -> None:
        super().__init__()
        s = settings
        self.channels, self.x_size = s.channels, s.x_size
        is_constant = s.background_model == "constant"
        self.z_size = s.channels if is_constant else s.z_background_size
        cell = -(-s.x_size // MAX_GRID)  # side of a cell in pixels
        self.grid = 1 if is_constant else -(-s.x_size // cell)
        levels, hidden = s.channels * self.grid**2, s.background_net
        pixels = torch.arange(s.x_size, dtype=torch.get_default_dtype())
        cells = torch.arange(self.grid, dtype=pixels.dtype)
        # Linear interpolation between the centres of cells.
        place = ((pixels + 0.5) / s.x_size * self.grid - 0.5).clamp(0, self.grid - 1)
        rows = (1 - (place[:, None] - cells).abs()).clamp(min=0)
        self.register_buffer("rows", rows, persistent=False)
        self.encode = Encoder(levels, hidden, self.z_size, non_linearity)
        self.decode: nn.Module = (
            ConstantDecoder(s.channels)
            if is_constant
            else Decoder(levels, hidden[::-1], self.z_size, None, True, non_linearity)
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
        means = self.rows.T / self.rows.sum(0)[:, None]  # over the pixels around each cell
        coarse = means @ images @ means.T
        code = dist.Normal(*self.encode(coarse.flatten(1)))
        return self.paint(pyro.sample("z_background", code.to_event(1)))

    def paint(self, z_background: Tensor) -> Tensor:
        """Backgrounds from their codes, [B, z_size] to [B, (C,) H, H]."""
        shape = [self.channels] if self.channels > 1 else []
        levels = self.decode(z_background).view(len(z_background), *shape, self.grid, self.grid)
        return self.rows @ levels @ self.rows.T


class ConstantDecoder(nn.Module):
    """The same level at every pixel, for each channel: [B, C] to [B, C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = MLP(channels, [channels], nn.Identity)

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.mlp(z))
