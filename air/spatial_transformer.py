"""The geometry of z_where: windows into images, images into windows, boxes.

A spatial transformer (Jaderberg et al. 2015) restricted to scale and translation, as AIR needs it;
section 2 of ``air/tutorial`` draws it. Tensors of other shapes raise a ValueError.

Coordinates. An image and a window each span [-1, 1], x to the right and y downwards; pixel i of n
has its centre at (2i + 1) / n - 1 (torch's ``align_corners=False``). z_where = (s, x, y) maps the
image point p to the window point s * p + (x, y). Hence s = 3 shows the window at a third of the
image's side, and, against intuition, x > 0 moves it to the *left* and y > 0 *up*: its centre lies
at (-x / s, -y / s) in the image.

Because nothing rotates, bilinear sampling separates into one small matrix for the rows and one
for the columns: out = W_y @ in @ W_x^T. This equals ``affine_grid`` + ``grid_sample`` with zero
padding, is faster, and is deterministic on every device.
"""

import math

import torch
from torch import Tensor

# Below this scale (a window ten times as wide as the image), 1 / s is replaced by its tangent.
MIN_SCALE = 0.1


def positive_scale(scale: Tensor) -> Tensor:
    """Maps any scale to one above zero, with finite values and gradients.

    It is the identity for ``scale >= MIN_SCALE`` and MIN_SCALE^2 / (2 * MIN_SCALE - scale) below,
    a smooth continuation whose inverse is linear. z_where is Normal, so a scale of zero or less
    can be sampled, for which 1 / s is infinite or turns the window over.
    """
    below = scale.clamp(max=MIN_SCALE)
    return torch.where(scale > MIN_SCALE, scale, MIN_SCALE**2 / (2 * MIN_SCALE - below))


def centre_of(z_where: Tensor) -> Tensor:
    """The centre (x, y) of each window in the image, in [-1, 1]: [..., 3] to [..., 2]."""
    return -z_where[..., 1:] / positive_scale(z_where[..., :1])


def where_at(centre: Tensor, scale: Tensor) -> Tensor:
    """z_where of windows with these centres, [..., 2], and scales, [..., 1]: [..., 3].

    The inverse of `centre_of`.
    """
    return torch.cat((scale, -positive_scale(scale) * centre), -1)


def peak_centres(maps: Tensor) -> Tensor:
    """The centre (x, y) of the greatest pixel of each map, [B, H, H] to [B, 2], in [-1, 1]."""
    side = maps.shape[-1]
    index = maps.flatten(1).argmax(1)
    column_and_row = torch.stack((index % side, index // side), 1)
    return (2 * column_and_row + 1).to(maps.dtype) / side - 1


def _sampling_weights(scale: Tensor, shift: Tensor, in_size: int, out_size: int) -> Tensor:
    """Bilinear weights of the input pixels for each output pixel, along both axes.

    Args:
        scale: Output to input scale, [B, 1].
        shift: Output to input translation (x, y), [B, 2].
        in_size: Pixels along a side of the input.
        out_size: Pixels along a side of the output.

    Returns:
        Weights for x and for y, [B, 2, out_size, in_size]; rows near and past the border sum to
        less than one, as if the input were surrounded by zeros.
    """
    out_index = torch.arange(out_size, dtype=scale.dtype, device=scale.device)
    in_index = torch.arange(in_size, dtype=scale.dtype, device=scale.device)
    centres = (2 * out_index + 1) / out_size - 1
    points = scale[:, :, None] * centres + shift[:, :, None]  # [B, 2, out_size]
    pixels = ((points + 1) * in_size - 1) / 2
    distances = pixels[..., None] - in_index
    return (1 - distances.abs()).clamp(min=0)


def _resample(weights: Tensor, pictures: Tensor) -> Tensor:
    """Pictures [B, (C,) in, in] to [B, (C,) out, out]."""
    rows, columns = weights[:, 1], weights[:, 0].transpose(1, 2)
    if pictures.dim() == 4:  # the same weights for all channels
        rows, columns = rows[:, None], columns[:, None]
    return rows @ pictures @ columns


def _check_geometry(z_where: Tensor, window_size: int, image_size: int) -> int:
    """Checks the arguments that both directions share, and returns the number of images."""
    if z_where.dim() != 2 or z_where.shape[1] != 3:
        raise ValueError(f"z_where must be [B, 3], got {list(z_where.shape)}")
    if window_size < 1 or image_size < 1:
        raise ValueError(
            f"window_size and image_size must be at least 1, got {window_size} and {image_size}"
        )
    return z_where.size(0)


def window_to_image(z_where: Tensor, window_size: int, image_size: int, windows: Tensor) -> Tensor:
    """Paints each window into an otherwise black image.

    Args:
        z_where: (s, x, y), [B, 3].
        window_size: Side W of the windows, in pixels.
        image_size: Side H of the images, in pixels.
        windows: Intensities, [B, (C,) W, W] or flat, [B, C * W * W].

    Returns:
        Images, [B, H, H] for one channel, else [B, C, H, H]; zero outside the window.
    """
    n = _check_geometry(z_where, window_size, image_size)
    channels, rest = divmod(math.prod(windows.shape[1:]), window_size**2)
    if len(windows) != n or rest or not channels:
        raise ValueError(
            f"windows must be [{n}, {window_size}, {window_size}], with channels "
            f"[{n}, C, {window_size}, {window_size}], or flat, got {list(windows.shape)}"
        )
    weights = _sampling_weights(
        positive_scale(z_where[:, :1]), z_where[:, 1:], window_size, image_size
    )
    shape = [channels] if channels > 1 else []
    return _resample(weights, windows.reshape(n, *shape, window_size, window_size))


def image_to_window(z_where: Tensor, window_size: int, image_size: int, images: Tensor) -> Tensor:
    """Cuts the window at z_where out of each image: the inverse of `window_to_image`.

    Args:
        z_where: (s, x, y), [B, 3].
        window_size: Side W of the windows, in pixels.
        image_size: Side H of the images, in pixels.
        images: Intensities, [B, (C,) H, H].

    Returns:
        Windows, flat, [B, C * W * W]; zero where they reach past the image.
    """
    n = _check_geometry(z_where, window_size, image_size)
    sides = image_size, image_size
    if images.dim() not in (3, 4) or len(images) != n or images.shape[-2:] != sides:
        raise ValueError(
            f"images must be [{n}, {image_size}, {image_size}] or, with channels, "
            f"[{n}, C, {image_size}, {image_size}], got {list(images.shape)}"
        )
    inverse = 1 / positive_scale(z_where[:, :1])
    weights = _sampling_weights(inverse, -z_where[:, 1:] * inverse, image_size, window_size)
    return _resample(weights, images).reshape(n, -1)


def window_boxes(z_where: Tensor, image_size: int) -> Tensor:
    """The outlines of the windows in pixels of the image.

    Args:
        z_where: (s, x, y), [..., 3].
        image_size: Side of the images, in pixels.

    Returns:
        (x0, y0, x1, y1), [..., 4], x to the right and y downwards. The image spans 0 to
        `image_size`; a box may reach past it.
    """
    if not z_where.dim() or z_where.shape[-1] != 3:
        raise ValueError(f"z_where must be [..., 3], got {list(z_where.shape)}")
    centre, half_side = centre_of(z_where), 1 / positive_scale(z_where[..., :1])
    corners = torch.cat((centre - half_side, centre + half_side), -1)
    return (corners + 1) * (image_size / 2)
