"""Images given to a model: which types and values are accepted, and their conversion to floats.

Others raise a ValueError, which says what to convert them to.
"""

import warnings

import numpy as np
import torch
from pyro.distributions import is_validation_enabled
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from air.support.intensities import range_problem


def to_tensor(images: object) -> Tensor:
    """A tensor, or an array or a nested list of numbers, as a tensor.

    The tensor shares the memory of an array where torch can. So an array that is memory-mapped
    stays in its file, and the tensor must not be written to.
    """
    if isinstance(images, Tensor):
        return images
    try:
        array = np.ascontiguousarray(images)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except (TypeError, ValueError, RuntimeError) as error:
        kind = getattr(images, "dtype", type(images).__name__)
        raise ValueError(
            f"images: expected a tensor or an array of numbers, got {kind} ({error})"
        ) from error


def as_batch(images: Tensor, channels: int, x_size: int) -> Tensor:
    """Images, [B, (C,) H, H] or [B, 1, H, H], without an axis for a single channel."""
    if not isinstance(images, Tensor):
        raise ValueError(
            f"images: expected a torch.Tensor, got {type(images).__name__}; use torch.as_tensor"
        )
    if not images.is_floating_point() and images.dtype not in (torch.bool, torch.uint8):
        kind = str(images.dtype).removeprefix("torch.")
        raise ValueError(
            f"images: expected uint8 in [0, 255], floats in [0, 1] or bool, got {kind}; convert "
            "them to one of these"
        )
    shape = [channels, x_size, x_size] if channels > 1 else [x_size, x_size]
    if list(images.shape[1:]) == [1, *shape]:
        images = images[:, 0]
    if list(images.shape[1:]) != shape:
        hint = "; make a batch of a single image by image[None]" * (list(images.shape) == shape)
        raise ValueError(f"images must be {['B', *shape]}, got {list(images.shape)}{hint}")
    return images


def to_intensities(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Images of any type that `as_batch` accepts as floats in [0, 1].

    The range of floats is checked while Pyro's validation is enabled. The check waits for the
    device, and a program that is being captured has no values to check.
    """
    intensities = images.to(dtype)
    if images.dtype == torch.uint8:
        return intensities / 255
    if is_validation_enabled() and get_proxy_mode() is None and not images.is_meta:
        check_range(images)
    return intensities


def to_bytes(images: Tensor) -> Tensor:
    """Images of any type that `as_batch` accepts as uint8 in [0, 255]."""
    if images.dtype == torch.uint8:
        return images
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8)


def check_range(images: Tensor) -> None:
    """Checks that images of floats are in [0, 1], up to a tolerance; reads from the device."""
    if not images.is_floating_point() or not images.numel():
        return
    values = images.detach()
    if values.dtype.itemsize == 1:  # has no minimum
        values = values.float()
    problem = range_problem(*torch.stack((values.min(), values.max())).tolist())
    if problem:
        raise ValueError(f"images: {problem}")
