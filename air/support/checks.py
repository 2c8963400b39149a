"""Checks of the arguments of `AIR` and of its model and guide, which raise a ValueError."""

import copy
from numbers import Integral
from typing import TypeVar

import torch
from pyro.poutine.runtime import get_plates
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from air.support.handlers import closed

Module = TypeVar("Module", bound=nn.Module)


def check_whole(name: str, value: object, least: int, hint: str = "") -> None:
    """Checks that a number of things is whole, and not less than `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise ValueError(
            f"{name}: expected a whole number of at least {least}{hint}, got {value!r}"
        )


def check_call(data: Tensor, batch_size: int | None, num_images: int | None) -> None:
    """Checks the arguments of a model or guide; see `AIR.guide`."""
    if not isinstance(data, Tensor):
        raise ValueError(
            f"data: expected images as a torch.Tensor, got {type(data).__name__}; use "
            "torch.as_tensor"
        )
    if not data.dim() or not len(data):
        raise ValueError(f"data: expected one image or more, got {list(data.shape)}")
    if batch_size is not None:
        check_whole("batch_size", batch_size, 1)
    if num_images is not None:
        check_whole("num_images", num_images, len(data), ", the images in this batch")
        if batch_size is not None:
            raise ValueError(
                f"batch_size: expected None with num_images, because data is one batch of "
                f"{len(data)} images then, got {batch_size}"
            )
    refuse_outer_plates()


def refuse_outer_plates(batch: int | None = None) -> None:
    """Refuses to run within a plate that vectorises, as vectorised particles do.

    A plate along the images of size `batch` is accepted.
    """
    for frame in get_plates():
        if frame.vectorized and (frame.dim, frame.size) != (-1, batch):
            raise ValueError(
                f"vectorised particles are not supported, but a plate {frame.name} of size "
                f"{frame.size} encloses AIR; use vectorize_particles=False for an ELBO and "
                "parallel=False for Predictive, or run the model in a loop"
            )


def copied(name: str, net: Module, reason: str) -> Module:
    """A copy of a net, with an error that names it if it cannot be copied."""
    try:
        return copy.deepcopy(net)
    except Exception as error:  # of many types, by what the net holds
        text = " ".join(str(error).split())
        raise ValueError(f"{name}: cannot be copied, but {reason} ({text})") from error


def output_sizes(
    name: str, net: nn.Module, in_size: int, expected: list[int] | None = None
) -> list[int]:
    """The number of columns of each output of a net, for inputs [B, in_size].

    They must be the `expected` ones; None means one output with any number of columns.
    """
    if not isinstance(net, nn.Module):
        raise ValueError(f"{name}: expected an instance of nn.Module, got {net!r:.80}")
    try:
        parameters = (p for p in net.parameters() if not is_lazy(p) and p.is_floating_point())
        zeros = next(parameters, torch.zeros(0)).new_zeros(2, in_size)
        with closed(net):  # the net itself, since not every net can be copied
            output = net(zeros)
        outputs = [output] if isinstance(output, Tensor) else list(output)
        for output in outputs:
            if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != 2:
                got = list(output.shape) if isinstance(output, Tensor) else repr(output)
                raise ValueError(f"expected outputs [B, columns], got {got} for B = 2")
    except Exception as error:  # of many types, by what the net does
        text = " ".join(str(error).split())
        raise ValueError(f"{name}: expected a net for inputs [B, {in_size}] ({text})") from error
    sizes = [output.size(1) for output in outputs]
    if expected is None and len(sizes) != 1:
        raise ValueError(f"{name}: expected one output, [B, columns], got {len(sizes)}")
    if expected is not None and sizes != expected:
        raise ValueError(
            f"{name}: expected outputs of {expected} columns for inputs of {in_size}, got {sizes}"
        )
    return sizes
