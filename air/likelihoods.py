"""The likelihood p(x | z): from painted objects to a canvas, and from a canvas to pixels.

A likelihood defines how an object is added to a canvas, and the probability of an image given a
canvas.
"""

import math
from abc import ABC, abstractmethod
from functools import reduce

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from air.support.model_settings import Likelihood

# The probability that a pixel differs from the canvas. It bounds the cost of a pixel, to 6.9 nats,
# and the gradient where the canvas contradicts the image.
FLIP_PROB = 1e-3
MAX_HIDDEN = 0.15  # share of an object that others may hide where objects are added to images


class PixelLikelihood(nn.Module, ABC):
    """A likelihood of images, [B, (C,) H, H], given canvases of the same shape.

    Args:
        covers: Whether objects hide what is behind them. Painted objects then have C + 1 channels:
            the colours, multiplied by the opacity, and the opacity.
    """

    def __init__(self, covers: bool = False) -> None:
        super().__init__()
        self.covers = covers

    @abstractmethod
    def prepare(self, images: Tensor) -> Tensor:
        """Turns intensities in [0, 1] into the images that `log_prob` expects."""

    @abstractmethod
    def add_light(self, canvas: Tensor, painted: Tensor) -> Tensor:
        """Adds one painted object to the canvas, where objects do not cover."""

    @abstractmethod
    def distribution(self, canvas: Tensor) -> dist.TorchDistribution:
        """The distribution of images, flat, [B, C * H * H]."""

    @abstractmethod
    def log_prob(self, images: Tensor, canvas: Tensor) -> Tensor:
        """The log probability of each image, [B]; faster than the sum over `distribution`."""

    def show(self, canvas: Tensor) -> Tensor:
        """The image that a canvas stands for, [B, (C,) H, H]."""
        return canvas

    def add(self, canvas: Tensor, painted: Tensor) -> Tensor:
        """Adds one painted object, [B, (C,) H, H] or [B, C + 1, H, H], to the canvas."""
        if not self.covers:
            return self.add_light(canvas, painted)
        colours, opacity = painted[..., :-1, :, :], painted[..., -1:, :, :]
        return (canvas.view_as(colours) * (1 - opacity) + colours).view_as(canvas)

    def cut_out(self, images: Tensor, painted: Tensor, present: Tensor) -> Tensor:
        """The objects of images as one painted object, which `add` can add to another image.

        Without opacity these are the images themselves, whose background is black.

        Args:
            images: [B, (C,) H, H].
            painted: The objects in them, [T, B, (C,) H, H] or [T, B, C + 1, H, H].
            present: One for objects that are present, zero for others, [T, B].
        """
        if not self.covers:
            return images
        clear = 1 - painted[..., -1:, :, :] * present[..., None, None, None]
        opacity = 1 - clear.prod(0)
        return torch.cat((images.view(len(images), -1, *images.shape[-2:]) * opacity, opacity), 1)

    def fits(self, objects: Tensor, other: Tensor) -> Tensor:
        """Whether other objects can be added to objects and all remain visible, bool [B].

        With opacity, the objects overlap little. Without, little light is lost if intensities are
        bounded by one (with Bernoulli pixels none is above one, so objects may overlap).

        Args:
            objects: The objects of some images, as returned by `cut_out`.
            other: Other objects, of the same shape.
        """
        if self.covers:
            mine, others = objects[:, -1].flatten(1), other[:, -1].flatten(1)
            lost = mine * others
        else:
            mine, others = objects.flatten(1), other.flatten(1)
            lost = (self.add(mine, others) - 1).clamp(min=0)
        return lost.sum(1) <= MAX_HIDDEN * torch.minimum(mine.sum(1), others.sum(1))

    def compose(self, painted: Tensor, present: Tensor, canvas: Tensor | None = None) -> Tensor:
        """Adds painted objects to a canvas.

        Args:
            painted: [T, B, (C,) H, H], or with opacity [T, B, C + 1, H, H].
            present: One for objects that are added, zero for others, [T, B].
            canvas: [B, (C,) H, H]; None for black.
        """
        painted = painted * present.view(*present.shape, *[1] * (painted.dim() - 2))
        objects = painted.unbind()
        return reduce(self.add, objects) if canvas is None else reduce(self.add, objects, canvas)


class NormalLikelihood(PixelLikelihood):
    """Each pixel is Normal around the canvas; without a background, intensities add up."""

    def __init__(self, sd: float, covers: bool = False) -> None:
        super().__init__(covers)
        self.sd = sd

    def prepare(self, images: Tensor) -> Tensor:
        return images

    def add_light(self, canvas: Tensor, painted: Tensor) -> Tensor:
        return canvas + painted

    def distribution(self, canvas: Tensor) -> dist.TorchDistribution:
        sd = canvas.new_full((), self.sd)  # without a copy from the host
        return dist.Normal(canvas.flatten(1), sd).to_event(1)

    def log_prob(self, images: Tensor, canvas: Tensor) -> Tensor:
        # ``dist.Normal`` would take the logarithm of the same sd for every pixel.
        squares = (images - canvas).flatten(1).square().sum(1)
        constant = math.prod(images.shape[1:]) * (math.log(self.sd) + math.log(2 * math.pi) / 2)
        return -squares / (2 * self.sd**2) - constant


class BernoulliLikelihood(PixelLikelihood):
    """Pixels are on or off; an object's intensity is the probability that it turns a pixel on.

    A pixel is off only if no object turns it on: 1 - canvas becomes (1 - canvas)(1 - painted). So
    the canvas stays in [0, 1], and every object has a gradient where objects overlap; a clamped
    sum would have none. Each pixel is finally flipped with probability `FLIP_PROB`. Images are
    binarised at 1/2.
    """

    def prepare(self, images: Tensor) -> Tensor:
        return (images >= 0.5).to(images.dtype)

    def add_light(self, canvas: Tensor, painted: Tensor) -> Tensor:
        return canvas + painted * (1 - canvas)

    def distribution(self, canvas: Tensor) -> dist.TorchDistribution:
        return dist.Bernoulli(self._on(canvas).flatten(1)).to_event(1)

    def log_prob(self, images: Tensor, canvas: Tensor) -> Tensor:
        on = self._on(canvas)  # images are 0 or 1, so one logarithm per pixel is enough
        return torch.log(1 - on + images * (2 * on - 1)).flatten(1).sum(1)

    def _on(self, canvas: Tensor) -> Tensor:
        return FLIP_PROB + (1 - 2 * FLIP_PROB) * canvas


def make_likelihood(name: Likelihood, sd: float, covers: bool = False) -> PixelLikelihood:
    """The likelihood of that name; `sd` is the standard deviation of each Normal pixel."""
    return NormalLikelihood(sd, covers) if name == "normal" else BernoulliLikelihood(covers)
