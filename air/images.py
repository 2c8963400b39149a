"""Images as users bring them: which types and values are taken, and their way to floats."""

import numpy as np
import torch
from pyro.distributions import is_validation_enabled
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

TOLERANCE = 0.01  # of intensities beyond [0, 1], as resampling a picture leaves them


def to_tensor(images: object) -> Tensor:
    """A tensor, or a NumPy array or what becomes one, as a tensor.

    Raises:
        ValueError: If it holds no numbers.
    """
    if isinstance(images, Tensor):
        return images
    try:
        array = np.ascontiguousarray(images)
        return torch.tensor(array.astype(array.dtype.newbyteorder("="), copy=False))
    except (TypeError, ValueError, RuntimeError) as error:
        kind = getattr(images, "dtype", type(images).__name__)
        raise ValueError(
            f"images: expected a tensor or an array of numbers, got {kind} ({error})"
        ) from error


def as_batch(images: Tensor, channels: int, x_size: int) -> Tensor:
    """Images, [B, (C,) H, H] or [B, 1, H, H], without an axis for a single channel.

    Raises:
        ValueError: If the images have another shape, or a type that `check_type` refuses.
    """
    check_type(images)
    shape = [channels, x_size, x_size] if channels > 1 else [x_size, x_size]
    if list(images.shape[1:]) == [1, *shape]:
        images = images[:, 0]
    if list(images.shape[1:]) != shape:
        hint = "; make a batch of a single image by image[None]" * (list(images.shape) == shape)
        raise ValueError(f"images must be {['B', *shape]}, got {list(images.shape)}{hint}")
    return images


def to_intensities(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Images of any type that `check_type` accepts as floats in [0, 1].

    The range of floats is checked while Pyro's validation is enabled. The check waits for the
    device, and a program that is being traced or captured has no values to check.

    Raises:
        ValueError: If floats are outside [0, 1].
    """
    intensities = images.to(dtype)
    if images.dtype == torch.uint8:
        return intensities / 255
    if is_validation_enabled() and not _is_traced(images):
        check_range(images)
    return intensities


def _is_traced(images: Tensor) -> bool:
    """Whether the program is being captured, or traced, or runs without values."""
    by_jit: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return by_jit or get_proxy_mode() is not None or images.is_meta


def check_type(images: Tensor) -> None:
    """Checks that images are bool, uint8 or floats.

    Raises:
        ValueError: If they are not.
    """
    if not isinstance(images, Tensor):
        raise ValueError(
            f"images: expected a torch.Tensor, got {type(images).__name__}; use torch.as_tensor"
        )
    if images.is_floating_point() or images.dtype in (torch.bool, torch.uint8):
        return
    kind = str(images.dtype).removeprefix("torch.")
    greatest = {torch.uint16: " by dividing by 65535", torch.int16: " by dividing by 32767"}
    raise ValueError(
        f"images: expected uint8 in [0, 255], floats in [0, 1] or bool, got {kind}; convert to "
        f"uint8, or to floats in [0, 1]{greatest.get(images.dtype, '')}"
    )


def check_range(images: Tensor) -> None:
    """Checks that images of floats are in [0, 1], up to a tolerance; reads from the device.

    Raises:
        ValueError: If they are not.
    """
    if not images.is_floating_point() or not images.numel():
        return
    values = images.detach()
    if values.dtype.itemsize == 1:  # has no minimum
        values = values.float()
    least, greatest = torch.stack((values.min(), values.max())).tolist()
    if least >= -TOLERANCE and greatest <= 1 + TOLERANCE:
        return
    strange = int((~values.isfinite()).sum())
    if strange:
        remedy = f"{strange} values are NaN or infinite; replace them"
    elif -1 - TOLERANCE <= least <= -0.5 and greatest <= 1 + TOLERANCE:
        remedy = "for values in [-1, 1], use (x + 1) / 2"
    elif least >= -TOLERANCE and 2 < greatest < 65536:
        most = 255 if greatest < 256 else 65535
        remedy = f"for values in [0, {most}], divide by {most}"
    else:
        remedy = "subtract the least value and divide by the range, or clamp what lies beyond"
    raise ValueError(
        f"images: expected floats in [0, 1], got values from {least:.4g} to {greatest:.4g}; "
        f"{remedy}"
    )
