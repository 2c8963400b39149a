"""The likelihood p(x | z): from painted objects to a canvas, and from a canvas to pixels.

A likelihood defines how an object is added to a canvas, and the probability of an image given a
canvas.
"""

import math
from abc import ABC, abstractmethod
from functools import reduce
from typing import Literal

import pyro.distributions as dist
import torch
from torch import Tensor

Likelihood = Literal["normal", "bernoulli"]

# The probability that a pixel differs from the canvas. It bounds the cost of a pixel, to 6.9 nats,
# and the gradient where the canvas contradicts the image.
FLIP_PROB = 1e-3


class PixelLikelihood(ABC):
    """A likelihood of images, [B, (C,) H, H], given canvases of the same shape."""

    @abstractmethod
    def prepare(self, images: Tensor) -> Tensor:
        """Turns intensities in [0, 1] into the images that `log_prob` expects."""

    @abstractmethod
    def add(self, canvas: Tensor, painted: Tensor) -> Tensor:
        """Adds one painted object to the canvas."""

    @abstractmethod
    def distribution(self, canvas: Tensor) -> dist.TorchDistribution:
        """The distribution of each pixel."""

    @abstractmethod
    def log_prob(self, images: Tensor, canvas: Tensor) -> Tensor:
        """The log probability of each image, [B]; faster than the sum over `distribution`."""

    def compose(self, painted: Tensor, present: Tensor) -> Tensor:
        """The canvas of painted objects, [T, B, (C,) H, H], whose `present`, [T, B], is one."""
        painted = painted * present.view(*present.shape, *[1] * (painted.dim() - 2))
        return reduce(self.add, painted.unbind())


class NormalLikelihood(PixelLikelihood):
    """Intensities add up, and each pixel is Normal around the sum, as in the paper."""

    def __init__(self, sd: float) -> None:
        self.sd = sd

    def prepare(self, images: Tensor) -> Tensor:
        return images

    def add(self, canvas: Tensor, painted: Tensor) -> Tensor:
        return canvas + painted

    def distribution(self, canvas: Tensor) -> dist.TorchDistribution:
        return dist.Normal(canvas, canvas.new_full((), self.sd))  # no copy from the host

    def log_prob(self, images: Tensor, canvas: Tensor) -> Tensor:
        # ``dist.Normal`` would take the logarithm of the same sd for every pixel.
        squares = (images - canvas).flatten(1).square().sum(1)
        constant = math.prod(images.shape[1:]) * math.log(self.sd * math.sqrt(2 * math.pi))
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

    def add(self, canvas: Tensor, painted: Tensor) -> Tensor:
        return canvas + painted * (1 - canvas)

    def distribution(self, canvas: Tensor) -> dist.TorchDistribution:
        return dist.Bernoulli(self._on(canvas))

    def log_prob(self, images: Tensor, canvas: Tensor) -> Tensor:
        on = self._on(canvas)  # images are 0 or 1, so one logarithm per pixel is enough
        return torch.log(1 - on + images * (2 * on - 1)).flatten(1).sum(1)

    def _on(self, canvas: Tensor) -> Tensor:
        return FLIP_PROB + (1 - 2 * FLIP_PROB) * canvas


def make_likelihood(name: Likelihood, sd: float, bounded: bool = True) -> PixelLikelihood:
    """Makes a likelihood by its name.

    Args:
        name: "normal" or "bernoulli".
        sd: Standard deviation of each Normal pixel.
        bounded: Whether the intensities of painted objects are in [0, 1].

    Raises:
        ValueError: If the name is unknown, the standard deviation is not above zero and finite, or
            the likelihood needs bounded intensities.
    """
    if not 0 < sd < math.inf:
        raise ValueError(f"likelihood_sd: expected a number above 0, got {sd}")
    if name == "normal":
        return NormalLikelihood(sd)
    if name != "bernoulli":
        raise ValueError(f"likelihood must be normal or bernoulli, got {name!r}")
    if not bounded:
        raise ValueError(
            "likelihood bernoulli needs decoder_output_use_sigmoid, for intensities in [0, 1]"
        )
    return BernoulliLikelihood()
