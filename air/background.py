"""The background of a scene: one latent for each image, z_background, painted under all objects.

AIR as published paints on black. A background that is not black then costs an object: one window
covers as much of it as it can. So the background has a latent of its own, as in SPACE (Lin et al.
2020, arXiv:2001.02407), here with a linear decoder: probabilistic principal component analysis
(Tipping and Bishop 1999, doi:10.1111/1467-9868.00196). Its mean and components are fitted before
training, to the training images without what looks like an object: in each round, hidden cells take
the values that the last principal components give them. They do not change afterwards, so that a
background cannot learn to paint objects.

The guide finds z_background of an image by robust regression: pixels far from the background, such
as those of objects, count little. It has no parameters to train.

Objects cover what is behind them. So a step paints colours and an opacity, see
`likelihoods.PixelLikelihood`, and an object can be darker than the background.
"""

import copy

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from air.support.model_settings import ModelSettings

MAX_GRID = 16  # cells along each side
LEAST_SHARE = 0.002  # of the variance; weaker components could also paint parts of objects
FITS = 10  # rounds of the fit
# Scales of the robust regression's iterations, in intensities, from coarse to fine.
SCALES = tuple(0.3 * 0.1 ** (k / 47) for k in range(48))


class Background(nn.Module):
    """p(background | z_background) p(z_background) and q(z_background | x).

    The background has levels on a grid of at most `MAX_GRID` cells along each side, between which
    it is interpolated: enough for light, ramps and coarse textures.

    Until `fit`, its components are planes: a level and two slopes for each channel. `Trainer` fits
    it; a training loop of your own can.
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
        images, hidden = images.cpu(), hidden.cpu()  # the same result on every device
        on_cpu = copy.deepcopy(self).cpu()
        levels = on_cpu._levels(images).flatten(1)
        seen = on_cpu._levels(hidden.to(levels)).flatten(1).repeat(1, self.channels) == 0
        filled = torch.where(seen, levels, on_cpu._explain(on_cpu._posterior(images)[0]))
        for _ in range(FITS):
            mean = filled.mean(0)
            _, sizes, axes = torch.linalg.svd(filled - mean, full_matrices=False)
            variances = sizes.square() / len(filled)
            least = (LEAST_SHARE * variances.sum()).clamp(min=self.sd**2)
            k = int((variances > least).sum().clamp(max=self.z_size))
            axes = axes[:k]
            explained = mean + (filled - mean) @ axes.T @ axes
            filled = torch.where(seen, levels, explained)
        self.mean.copy_(mean)
        self.components.zero_()
        self.components[:k].copy_(axes * variances[:k, None].sqrt())
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
        code = dist.Normal(*self._posterior(images))
        return self.paint(pyro.sample("z_background", code.to_event(1)))

    def infer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The background without objects, by the means of q(z_background).

        Returns:
            The backgrounds, [B, (C,) H, H]; and by how many nats the ELBO is below the log
            likelihood of them, [B]. With sd^2 = 1 / r, the KL divergence is the half of the sum of
            loc^2 + 1 / r - 1 + log r, and to paint samples costs the half of that of 1 - 1 / r.
        """
        loc, sd = self._posterior(images)
        return self.paint(loc), (loc.square() - 2 * sd.log()).sum(1) / 2

    def paint(self, z_background: Tensor) -> Tensor:
        """Backgrounds from their codes, [B, z_size] to [B, (C,) H, H]."""
        shape = [self.channels] if self.channels > 1 else []
        levels = self._explain(z_background).clamp(0, 1)
        levels = levels.view(len(levels), *shape, self.grid, self.grid)
        return self.rows @ levels @ self.rows.T

    def _explain(self, z_background: Tensor) -> Tensor:
        """Levels from codes, [B, z_size] to [B, levels]."""
        return self.mean + z_background @ self.components

    def _posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(z_background | images), [B, z_size] each.

        Each iteration moves cells that are far from the present background towards it, and then
        projects all cells on the components. It begins from the mean of all backgrounds and from
        the image itself, of which the one that leaves fewer cells far away is taken: images can be
        far from the mean, and objects can cover much of them.
        """
        sizes = self.components.square().sum(1)  # they are orthogonal
        projection = self.components / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)[:, None]
        n, off = len(images), (self._levels(images).flatten(1) - self.mean).repeat(2, 1)
        loc = off.new_zeros(len(off), self.z_size)
        explained = torch.cat((torch.zeros_like(off[:n]), off[n:]))
        for scale in SCALES:
            near = (1 + ((off - explained) / scale).square()).reciprocal()
            loc = torch.lerp(explained, off, near.square()) @ projection.T
            explained = loc @ self.components
        near = (1 + ((off - explained) / SCALES[-1]).square()).reciprocal().sum(1)
        loc = torch.where((near[n:] > near[:n])[:, None], loc[n:], loc[:n])
        precision = 1 + sizes / self.sd**2
        return loc * (1 - 1 / precision), precision.rsqrt().expand_as(loc)

    def _levels(self, images: Tensor) -> Tensor:
        """The means over the pixels around each cell, [..., H, H] to [..., grid, grid]."""
        means = self.rows.T / self.rows.sum(0)[:, None]
        return means @ images @ means.T
