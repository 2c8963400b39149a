"""Looks: what a step of the guide sees of an image, and about which place it predicts a window.

- `WholeImage` is the paper's: the LSTM sees the image at every step.
- `Difference` (DAIR) shows each step the difference of image and canvas, which is what the steps
  before have left unexplained.
- `Glimpse` shows each step only the surroundings of the greatest difference.

With a whole image or difference, the guide learns for each place of an object where its window
belongs. Where objects are small or many, few windows meet one at first, and this takes thousands
of steps. A glimpse (Mnih et al. 2014, arXiv:1406.6247) needs no learning to meet an object: the
square of the difference is blurred, and the pixel with the greatest value is its centre. The guide
sees the glimpse alone, and predicts its window relative to that centre. So what it learns of an
object at one place holds for every place.
"""

import torch
from torch import Tensor, nn

from air.spatial_transformer import image_to_window, peak_centres, where_at
from air.support.model_settings import ModelSettings

# The side of a glimpse, in sides of the window of mean scale, which is at most that of the image.
GLIMPSE_SIDE = 1.5
BLUR = 1 / 6  # standard deviation, in such sides; far below the distance of two objects
# Standard deviation of the distance of a window from the glimpse's centre, in sides of a window,
# where `AIR.predict` outputs a standard deviation of one.
SHIFT_SD = 0.25

Place = tuple[Tensor, Tensor]  # mean and standard deviation of z_where, [3] or [B, 3] each


class Look(nn.Module):
    """The base class of looks.

    Attributes:
        side: Side of what a step sees, in pixels.
        follows_canvas: Whether every step looks again, after the object before is on the canvas. A
            step then begins with the initial state of the LSTM, because all that it needs to know
            of the steps before is on the canvas.
    """

    follows_canvas = True

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.side = settings.x_size

    def remainder(self, images: Tensor, background: Tensor | None, canvas: Tensor | None) -> Tensor:
        """The unexplained part of images, [B, (C,) H, H], from which windows are cut.

        Args:
            images: The images, [B, (C,) H, H].
            background: The background, of the same shape; None for black.
            canvas: The background with the objects of other steps on it; None for black.
        """
        del background
        return images if canvas is None else images - canvas

    def forward(self, remainder: Tensor, prior: Place) -> tuple[Tensor, Place]:
        """The input of a step, flat, [B, C * side * side], and the place that `predict` relates to.

        Args:
            remainder: As returned by `remainder`.
            prior: Mean and standard deviation of the prior of z_where, [3] each.
        """
        return remainder.flatten(1), prior


class WholeImage(Look):
    """The image without its background, once for all steps."""

    follows_canvas = False

    def remainder(self, images: Tensor, background: Tensor | None, canvas: Tensor | None) -> Tensor:
        del canvas
        return images if background is None else images - background


class Difference(Look):
    """The difference of image and canvas."""


class Glimpse(Look):
    """A square of G x G pixels cut out of the difference of image and canvas.

    No gradient flows through the place of a glimpse, which is that of a pixel.
    """

    blur: Tensor
    sd: Tensor

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__(settings)
        s = settings
        window = min(1, 1 / s.scale_prior_mean) * s.x_size
        self.scale, self.x_size = s.scale_prior_mean, s.x_size
        self.side = 2 * int(GLIMPSE_SIDE * window / 2) + 1  # G, an odd number
        pixels = torch.arange(s.x_size, dtype=torch.get_default_dtype())
        distances = (pixels - pixels[:, None]) / (BLUR * window)
        blur = torch.exp(-distances.square() / 2)
        blur[distances.abs() > 6] = 0  # avoids denormals, which are ten times slower on a CPU
        self.register_buffer("blur", blur, persistent=False)
        # z_where counts in half sides of a window.
        sd = torch.tensor([s.scale_prior_sd, 2 * SHIFT_SD, 2 * SHIFT_SD])
        self.register_buffer("sd", sd, persistent=False)

    def forward(self, remainder: Tensor, prior: Place) -> tuple[Tensor, Place]:
        del prior
        centre = self.centres(remainder)
        scale = torch.full_like(centre[:, :1], self.scale)
        around = where_at(centre, torch.full_like(scale, self.x_size / self.side))
        seen = image_to_window(around, self.side, self.x_size, remainder)
        return seen, (where_at(centre, scale), self.sd)

    @torch.no_grad()
    def centres(self, differences: Tensor) -> Tensor:
        """The centre of the pixel with the greatest blurred square, [B, 2], in [-1, 1]."""
        squares = differences.square()
        energy = squares if squares.dim() == 3 else squares.sum(1)
        return peak_centres(self.blur @ energy @ self.blur)


def make_look(settings: ModelSettings) -> Look:
    """The look that ``settings.guide_input`` names."""
    looks = {"image": WholeImage, "difference": Difference, "glimpse": Glimpse}
    return looks[settings.guide_input](settings)
