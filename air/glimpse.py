"""Where a step of the guide looks: around the greatest difference between image and canvas.

The paper's guide sees the whole image, and learns for each place of an object where its window
belongs. Where objects are small or many, few windows meet one at first, and this takes thousands
of steps. A *glimpse* (Mnih et al. 2014, arXiv:1406.6247) needs no learning to meet an object: the
square of the difference is blurred, and the pixel with the greatest value is its centre. The guide
sees the glimpse alone, and its window lies relative to that centre. So what it learns of an object
at one place holds for every place.
"""

import torch
from torch import Tensor, nn

from air.model_settings import ModelSettings
from air.spatial_transformer import image_to_window, positive_scale

# In sides of the window of the prior's mean scale, at most that of the image.
GLIMPSE_SIDE = 1.5
BLUR = 1 / 6  # standard deviation; far less than the distance of two objects side by side
SHIFT_SD = 0.25  # from the centre, where `predict` gives one; z_where counts half sides


class Glimpse(nn.Module):
    """Cuts a square of G x G pixels out of each difference, with its own pixels.

    No gradient goes through the place of a glimpse, which is that of a pixel.

    Attributes:
        side: G, an odd number.
    """

    blur: Tensor
    sd: Tensor

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        s = settings
        window = min(1, 1 / s.scale_prior_mean) * s.x_size
        self.scale, self.x_size = s.scale_prior_mean, s.x_size
        self.side = 2 * int(GLIMPSE_SIDE * window / 2) + 1
        pixels = torch.arange(s.x_size, dtype=torch.get_default_dtype())
        distances = (pixels - pixels[:, None]) / (BLUR * window)
        blur = torch.exp(-distances.square() / 2)
        blur[distances.abs() > 6] = 0  # numbers so small that a CPU takes ten times as long
        self.register_buffer("blur", blur, persistent=False)
        sd = torch.tensor([s.scale_prior_sd, 2 * SHIFT_SD, 2 * SHIFT_SD])
        self.register_buffer("sd", sd, persistent=False)

    def forward(self, differences: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Glimpses of differences, [B, (C,) H, H].

        Returns:
            Flat glimpses, [B, C * G * G], zero outside the image; and z_where of a window at their
            centre, [B, 3], with the standard deviation of one's distance to it, [3].
        """
        centre = self.centres(differences)
        scale = torch.full_like(centre[:, :1], self.scale)
        zoom = torch.full_like(scale, self.x_size / self.side)
        around = torch.cat((zoom, -zoom * centre), 1)
        seen = image_to_window(around, self.side, self.x_size, differences)
        return seen, (torch.cat((scale, -positive_scale(scale) * centre), 1), self.sd)

    @torch.no_grad()
    def centres(self, differences: Tensor) -> Tensor:
        """The centre (x, y) of the pixel with the greatest blurred square, [B, 2], in [-1, 1]."""
        squares = differences.square()
        energy = squares if squares.dim() == 3 else squares.sum(1)
        index = (self.blur @ energy @ self.blur).flatten(1).argmax(1)
        column, row = index % self.x_size, index // self.x_size
        return (2 * torch.stack((column, row), 1) + 1).to(energy.dtype) / self.x_size - 1
