"""From objects to a canvas, and from a canvas to pixels: p(x | z) given what each object paints.

A likelihood says how an object joins those painted before it, how far its canvas can go, and how
probable an image is under a canvas.
"""

import math
from abc import ABC, abstractmethod
from functools import reduce
from typing import Literal

import pyro.distributions as dist
import torch
from torch import Tensor

Likelihood = Literal["normal", "bernoulli"]

# The probability that a pixel is not what the canvas says. It bounds what one pixel can cost, at
# 6.9 nats, and the gradient where objects and image contradict each other.
FLIP_PROB = 1e-3


class PixelLikelihood(ABC):
    """A likelihood of images, [B, (C,) H, H], under canvases of the same shape."""

    @abstractmethod
    def prepare(self, images: Tensor) -> Tensor:
        """Images as the likelihood takes them, from intensities in [0, 1]."""

    @abstractmethod
    def add(self, canvas: Tensor, painted: Tensor) -> Tensor:
        """The canvas with one more object."""

    @abstractmethod
    def distribution(self, canvas: Tensor) -> dist.TorchDistribution:
        """Of each pixel."""

    @abstractmethod
    def log_prob(self, images: Tensor, canvas: Tensor) -> Tensor:
        """That of whole images, [B]: the sum over `distribution`, but faster."""

    def compose(self, painted: Tensor, present: Tensor) -> Tensor:
        """The canvas of objects [T, B, (C,) H, H], of which those are there whose [T, B] is one."""
        painted = painted * present.view(*present.shape, *[1] * (painted.dim() - 2))
        return reduce(self.add, painted.unbind())


class NormalLikelihood(PixelLikelihood):
    """Intensities add up, and pixels are Normal around them, as in the paper."""

    def __init__(self, sd: float) -> None:
        self.sd = sd

    def prepare(self, images: Tensor) -> Tensor:
        return images

    def add(self, canvas: Tensor, painted: Tensor) -> Tensor:
        return canvas + painted

    def distribution(self, canvas: Tensor) -> dist.TorchDistribution:
        return dist.Normal(canvas, self.sd)

    def log_prob(self, images: Tensor, canvas: Tensor) -> Tensor:
        # Of ``dist.Normal``, which takes the logarithm of the same sd for every pixel.
        squares = (images - canvas).flatten(1).square().sum(1)
        constant = images[0].numel() * math.log(self.sd * math.sqrt(2 * math.pi))
        return -squares / (2 * self.sd**2) - constant


class BernoulliLikelihood(PixelLikelihood):
    """Pixels are on or off; an object turns them on with its intensities as probabilities.

    A pixel stays off only if no object turns it on: 1 - c becomes (1 - c)(1 - o). So the canvas
    never leaves [0, 1], and unlike with a clamped sum every object keeps its gradient where they
    overlap. Each pixel is finally flipped with probability `FLIP_PROB`. Images are binarised
    at 1/2.
    """

    def prepare(self, images: Tensor) -> Tensor:
        return (images >= 0.5).to(images.dtype)

    def add(self, canvas: Tensor, painted: Tensor) -> Tensor:
        return canvas + painted * (1 - canvas)

    def distribution(self, canvas: Tensor) -> dist.TorchDistribution:
        return dist.Bernoulli(self._on(canvas))

    def log_prob(self, images: Tensor, canvas: Tensor) -> Tensor:
        on = self._on(canvas)  # one logarithm a pixel, since they are all on or off
        return torch.log(1 - on + images * (2 * on - 1)).flatten(1).sum(1)

    def _on(self, canvas: Tensor) -> Tensor:
        return FLIP_PROB + (1 - 2 * FLIP_PROB) * canvas


def make_likelihood(likelihood: Likelihood, sd: float, bounded: bool = True) -> PixelLikelihood:
    """The likelihood of that name.

    Args:
        likelihood: Its name.
        sd: Of the Normal one.
        bounded: Whether objects are painted with intensities in [0, 1].

    Raises:
        ValueError: If there is none of that name, or it needs other intensities.
    """
    if likelihood == "normal":
        return NormalLikelihood(sd)
    if likelihood != "bernoulli":
        raise ValueError(f"likelihood must be normal or bernoulli, got {likelihood!r}")
    if not bounded:
        raise ValueError("likelihood bernoulli needs decoder_output_use_sigmoid, for intensities")
    return BernoulliLikelihood()


def to_intensities(batch: Tensor, channels: int, side: int, like: Tensor) -> Tensor:
    """Bytes to floats in [0, 1], floats to the precision of `like`; [B, 1, H, H] to [B, H, H].

    Raises:
        ValueError: If the images are not [B, (C,) H, H].
    """
    form = [side, side] if channels == 1 else [channels, side, side]
    if list(batch.shape[1:]) == [1, *form]:
        batch = batch[:, 0]
    if list(batch.shape[1:]) != form:
        raise ValueError(f"images must be {['B', *form]}, got {list(batch.shape)}")
    images = batch.to(like.dtype)
    return images if batch.is_floating_point() else images / 255
