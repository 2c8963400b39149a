"""The background of a scene: one latent for each image, z_background, painted under all objects.

AIR as published paints on black. A background that is not black then costs an object: one window
covers as much of it as it can. So the background has a latent of its own, as in SPACE (Lin et al.
2020, arXiv:2001.02407), here with a linear decoder: probabilistic principal component analysis
(Tipping and Bishop 1999, doi:10.1111/1467-9868.00196). Its mean and components are fitted in closed
form before training, to the training images without what looks like an object. They do not change
afterwards, so that a background cannot learn to paint objects.

The guide finds z_background of an image by robust regression: pixels far from the background, such
as those of objects, count little. It has no parameters to train.

Objects cover what is behind them. So a step paints colours and an opacity, see
`likelihoods.PixelLikelihood`, and an object can be darker than the background.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from air.support.model_settings import ModelSettings

MAX_GRID = 16  # cells along each side
# Share of the variance that a component must explain. What explains less is also found in objects.
LEAST_SHARE = 0.002
FITS = 10  # of the components, each with hidden cells as the last one explains them
# Scales of the robust regression's iterations, in intensities, from coarse to fine.
SCALES = tuple(0.3 * 0.1 ** (k / 47) for k in range(48))


class Background(nn.Module):
    """p(background | z_background) p(z_background) and q(z_background | x).

    The background has levels on a grid of at most `MAX_GRID` cells along each side, between which
    it is interpolated: enough for light, ramps and coarse textures.

    Until `fit`, its components are planes: a level and two slopes for each channel.
    """

    rows: Tensor
    mean: Tensor
    components: Tensor
    fitted: Tensor

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        s = settings
        self.channels, self.x_size, self.z_size = s.channels, s.x_size, s.z_background_size
        cell = -(-s.x_size // MAX_GRID)  # side of a cell in pixels
        self.grid = -(-s.x_size // cell)
        # Standard deviation of a cell's mean, by the likelihood.
        self.sd = s.likelihood_sd / cell
        pixels = torch.arange(s.x_size, dtype=torch.get_default_dtype())
        cells = torch.arange(self.grid, dtype=pixels.dtype)
        # Linear interpolation between the centres of cells.
        place = ((pixels + 0.5) / s.x_size * self.grid - 0.5).clamp(0, self.grid - 1)
        rows = (1 - (place[:, None] - cells).abs()).clamp(min=0)
        self.register_buffer("rows", rows, persistent=False)
        slope = (2 * cells + 1) / self.grid - 1
        plane = torch.stack(
            (torch.ones_like(slope.outer(slope)), *torch.meshgrid(slope, slope, indexing="ij"))
        )
        planes = torch.kron(torch.eye(s.channels), plane.flatten(1))[: self.z_size]
        components = planes.new_zeros(self.z_size, planes.shape[1])
        components[: len(planes)] = planes / 4
        self.register_buffer("mean", torch.full_like(components[0], 0.5))
        self.register_buffer("components", components)  # orthogonal, [z_size, levels]
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def fit(self, images: Tensor, hidden: Tensor) -> None:
        """Fits the mean and the components, by principal component analysis with missing data.

        Args:
            images: As `AIR.to_images` returns them, [N, (C,) H, H].
            hidden: Pixels that objects may hide, bool [N, H, H].
        """
        levels = self._levels(images).flatten(1)
        seen = self._levels(hidden.to(levels)).flatten(1).repeat(1, self.channels) == 0
        filled = torch.where(seen, levels, self._explain(self._posterior(levels)[0]))
        for _ in range(FITS):
            mean = filled.mean(0)
            _, sizes, axes = torch.linalg.svd(filled - mean, full_matrices=False)
            variances = sizes.square() / len(filled)
            k = int((variances > LEAST_SHARE * variances.sum()).sum().clamp(max=self.z_size))
            axes = axes[:k]
            explained = mean + (filled - mean) @ axes.T @ axes
            filled = torch.where(seen, levels, explained)
        self.mean.copy_(mean)
        self.components.zero_()
        self.components[:k] = axes * variances[:k, None].sqrt()
        self.fitted.fill_(True)

    def model(self, like: Tensor, n: int) -> Tensor:
        """Samples z_background, and paints the backgrounds of n images, [n, (C,) H, H].

        They have the type and the device of `like`.
        """
        zeros = like.new_zeros(n, self.z_size)
        code = dist.Normal(zeros, zeros.new_ones(()))
        return self.paint(pyro.sample("z_background", code.to_event(1)))

    @torch.no_grad()
    def guide(self, images: Tensor) -> Tensor:
        """Samples z_background given images, [B, (C,) H, H], and paints the backgrounds."""
        code = dist.Normal(*self._posterior(self._levels(images).flatten(1)))
        return self.paint(pyro.sample("z_background", code.to_event(1)))

    def infer(self, images: Tensor) -> Tensor:
        """Backgrounds of images, by the means of q(z_background), [B, (C,) H, H]."""
        return self.paint(self._posterior(self._levels(images).flatten(1))[0])

    def paint(self, z_background: Tensor) -> Tensor:
        """Backgrounds from their codes, [B, z_size] to [B, (C,) H, H]."""
        shape = [self.channels] if self.channels > 1 else []
        levels = self._explain(z_background).clamp(0, 1)
        levels = levels.view(len(levels), *shape, self.grid, self.grid)
        return self.rows @ levels @ self.rows.T

    def _explain(self, z_background: Tensor) -> Tensor:
        """Levels from codes, [B, z_size] to [B, levels]."""
        return self.mean + z_background @ self.components

    def _posterior(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(z_background | levels), [B, z_size] each.

        The levels are replaced, the more the farther they are from the last background, by what it
        explains, and projected on the components again. The posterior is that of the last ones.
        """
        sizes = self.components.square().sum(1)  # they are orthogonal
        projection = self.components / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)[:, None]
        off = levels - self.mean
        loc, explained = off.new_zeros(len(off), self.z_size), torch.zeros_like(off)
        for scale in SCALES:
            weights = (1 + ((off - explained) / scale).square()).reciprocal().square()
            loc = torch.lerp(explained, off, weights) @ projection.T
            explained = loc @ self.components
        precision = 1 + sizes / self.sd**2
        return loc * (1 - 1 / precision), precision.rsqrt().expand_as(loc)

    def _levels(self, images: Tensor) -> Tensor:
        """The means over the pixels around each cell, [..., H, H] to [..., grid, grid]."""
        means = self.rows.T / self.rows.sum(0)[:, None]
        return means @ images @ means.T
