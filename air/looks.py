"""Looks: what a step of the guide sees of an image, and about which place it predicts a window.

- `WholeImage` is the paper's: the LSTM sees the image at every step.
- `Difference` (DAIR) shows each step the difference of image and canvas, which is what the steps
  before have left unexplained.
- `Glimpse` shows each step only the surroundings of the place that differs most from the background
  and that no window covers yet.

With a whole image or difference, the guide learns for each place of an object where its window
belongs. Where objects are small or many, few windows meet one at first, and this takes thousands
of steps. A glimpse (Mnih et al. 2014, arXiv:1406.6247) needs no learning to meet an object: how far
each pixel is from the background is blurred, and the pixel with the greatest value is its centre.
The guide sees the glimpse alone, and predicts its window relative to that centre. So what it learns
of an object at one place holds for every place.

If a threshold for this distance is given, a glimpse is drawn by the pixels above it, and shows them
as a mask too. A faint object then counts as much as a bright one, and one of a kind that was never
seen looks like any other.

Windows of the steps before are covered, which models of visual attention call inhibition of return
(Itti et al. 1998, doi:10.1109/34.730558). The guide sees the cover too. So whether an object is
left does not depend on how well the decoder paints the others, which is badly at first.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from air.spatial_transformer import (
    centre_of,
    image_to_window,
    peak_centres,
    positive_scale,
    where_at,
)
from air.support.fields import SettingError
from air.support.model_settings import ModelSettings

# The side of a glimpse, in sides of the window of mean scale, which is at most that of the image.
GLIMPSE_SIDE = 2.0
BLUR = 1 / 6  # standard deviation, in such sides; far below the distance of two objects
# Standard deviation of the distance of a window from the glimpse's centre, in sides of a window,
# where `AIR.predict` outputs a standard deviation of one.
SHIFT_SD = 0.25
COVERED = 0.9  # half side of what a window covers, in half sides of the window
# By this factor, differences below the threshold draw a glimpse where none is above it.
FAINT = 0.01

Place = tuple[Tensor, Tensor]  # mean and standard deviation of z_where, [3] or [B, 3] each


class Look(nn.Module):
    """The base class of looks.

    Attributes:
        channels: Channels of what a step sees.
        side: Side of what a step sees, in pixels.
        looks_again: Whether every step looks again. It then begins with the initial state of the
            LSTM, because what it sees shows all that it needs to know of the steps before.
        follows_canvas: Whether a step sees the canvas with the objects of the steps before.
    """

    looks_again = True
    follows_canvas = False

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.channels, self.side = settings.channels, settings.x_size

    def remainder(self, images: Tensor, background: Tensor | None, canvas: Tensor | None) -> Tensor:
        """The unexplained part of images, [B, (C,) H, H], from which windows are cut.

        Args:
            images: The images, [B, (C,) H, H].
            background: The background, of the same shape; None for black.
            canvas: The background with the objects of other steps on it; None for black.
        """
        return images if background is None else images - background

    def forward(
        self, remainder: Tensor, windows: Sequence[Tensor], prior: Place
    ) -> tuple[Tensor, Place]:
        """The input of a step, [B, channels * side * side], and what `predict` relates to.

        Args:
            remainder: As returned by `remainder`.
            windows: Places of the windows of the steps before, [B, 3] each; see `AIR.window`.
            prior: Mean and standard deviation of the prior of z_where, [3] each.
        """
        return remainder.flatten(1), prior

    def mean_where(self, place: Tensor, loc: Tensor) -> Tensor:
        """The mean of q(z_where), [B, 3], from the mean in `Place` and the output of `predict`."""
        return place + loc


class WholeImage(Look):
    """The image without its background, once for all steps."""

    looks_again = False


class Difference(Look):
    """The difference of image and canvas."""

    follows_canvas = True

    def remainder(self, images: Tensor, background: Tensor | None, canvas: Tensor | None) -> Tensor:
        return images if canvas is None else images - canvas


class Glimpse(Look):
    """A square of G x G pixels of the image without its background, and what windows cover of it.

    The cover is the last channel; with `glimpse_threshold`, the mask comes before it. No gradient
    flows through these, nor through the place of a glimpse, which is that of a pixel.
    """

    blur: Tensor
    sd: Tensor
    pixels: Tensor
    colours: Tensor | None

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__(settings)
        s = settings
        window = min(1, 1 / s.scale_prior_mean) * s.x_size
        self.scale, self.x_size = s.scale_prior_mean, s.x_size
        self.threshold = s.glimpse_threshold
        self.channels = s.channels + (1 if self.threshold is None else 2)
        self.side = 2 * int(GLIMPSE_SIDE * window / 2) + 1  # G, an odd number
        pixels = torch.arange(s.x_size, dtype=torch.get_default_dtype())
        distances = (pixels - pixels[:, None]) / (BLUR * window)
        blur = torch.exp(-distances.square() / 2)
        blur[distances.abs() > 6] = 0  # avoids denormals, which are ten times slower on a CPU
        self.register_buffer("blur", blur, persistent=False)
        # z_where counts in half sides of a window.
        sd = torch.tensor([s.scale_prior_sd, 2 * SHIFT_SD, 2 * SHIFT_SD])
        self.register_buffer("sd", sd, persistent=False)
        self.register_buffer("pixels", (2 * pixels + 1) / s.x_size - 1, persistent=False)
        colours = None
        if s.glimpse_colours is not None:
            if len(s.glimpse_colours) != s.channels**2:
                raise SettingError("glimpse_colours", f"expected {s.channels**2} numbers")
            colours = torch.tensor(s.glimpse_colours).view(s.channels, s.channels)
        self.register_buffer("colours", colours, persistent=False)

    def forward(
        self, remainder: Tensor, windows: Sequence[Tensor], prior: Place
    ) -> tuple[Tensor, Place]:
        cover, mask = self.cover(remainder, windows), self.mask(remainder)
        free = 1 - (cover if remainder.dim() == 3 else cover[:, None])
        left = None if mask is None else mask * (1 - cover)
        centre = self.centres(remainder * free, left)
        scale = torch.full_like(centre[:, :1], self.scale)
        around = where_at(centre, torch.full_like(scale, self.x_size / self.side))
        shown = (remainder, cover) if mask is None else (remainder, mask, cover)
        seen = [image_to_window(around, self.side, self.x_size, x) for x in shown]
        return torch.cat(seen, 1), (where_at(centre, scale), self.sd)

    def mean_where(self, place: Tensor, loc: Tensor) -> Tensor:
        """Keeps the centre of the glimpse in the middle, whatever the scale, and then shifts."""
        scale = place[:, :1] + loc[:, :1]
        return where_at(centre_of(place), scale) + nn.functional.pad(loc[:, 1:], (1, 0))

    @torch.no_grad()
    def cover(self, images: Tensor, windows: Sequence[Tensor]) -> Tensor:
        """How much windows cover of each pixel, from 0 to 1, [B, H, H]: squares with soft edges."""
        free = images.new_ones(len(images), self.x_size, self.x_size)
        for z_where in windows:
            half = COVERED / positive_scale(z_where[:, :1, None])
            distances = (self.pixels - centre_of(z_where)[..., None]) / half  # [B, 2, H]
            columns, rows = torch.exp(-(distances**4)).unbind(1)
            free = free * (1 - rows[:, :, None] * columns[:, None])
        return 1 - free

    @torch.no_grad()
    def mask(self, remainder: Tensor) -> Tensor | None:
        """Whether each pixel is above the threshold, [B, H, H]: from 0, at the half of it, to 1."""
        if self.threshold is None:
            return None
        images = remainder if remainder.dim() == 4 else remainder[:, None]
        if self.colours is not None:
            images = torch.einsum("cd,bdhw->bchw", self.colours, images)
        return (2 * images.abs().amax(1) / self.threshold - 1).clamp(0, 1)

    @torch.no_grad()
    def centres(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """The centre of the pixel with the greatest blurred difference or mask, [B, 2]."""
        sizes = images.abs()  # squared, the rim of a bright object would outweigh a faint one
        sizes = sizes if sizes.dim() == 3 else sizes.sum(1)
        if mask is not None:
            sizes = mask + FAINT * sizes
        return peak_centres(self.blur @ sizes @ self.blur)


def make_look(settings: ModelSettings) -> Look:
    """The look that ``settings.guide_input`` names."""
    looks = {"image": WholeImage, "difference": Difference, "glimpse": Glimpse}
    return looks[settings.guide_input](settings)
