"""AIR whose decoder is a given renderer: solids on a ground plane (section 3.3 of the paper).

The model, the guide and their losses are AIR's own. What differs is the meaning of the latents, and
what follows from it. z_where = (size, x, y) is the place of a solid on the ground; z_what is its
kind and the angle by which it is turned. A window is cut out where the camera sees that place.

The kind is summed out. A solid is painted as all three kinds, and what stands for log p(x | z) is
the expectation of log p(x | kinds, z) under p(kinds | z), which is never more. For Normal pixels it
needs only the mean and the mean square of each pixel. These follow from those of each solid, from
the farthest to the nearest: with colours f, multiplied by the opacity a, a pixel c becomes
f + (1 - a) c. So the sum over 3^n combinations of kinds takes the time of 3 n pictures.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from air.air import AIR
from air.likelihoods import NormalLikelihood
from air.looks import Glimpse, Place
from air.solids.renderer import Renderer
from air.solids.world import KINDS, SYMMETRY
from air.spatial_transformer import centre_of, where_at
from air.support.fields import SettingError
from air.support.model_settings import ModelSettings

# z_what has a score for each kind, and a vector for each kind that can be turned. The softmax of
# the scores, times a factor, is p(kind | z_what). The direction of the vector is the angle, so that
# it is uniform under the prior (a projected Normal). A von Mises would need samples by rejection,
# which have no exact gradient. Where a solid looks the same after 1 / n of a turn, the direction is
# n times the angle.
TURNED = tuple(kind for kind in KINDS if SYMMETRY[kind])
Z_WHAT_SIZE = len(KINDS) + 2 * len(TURNED)
SHARPNESS = 4.0
CHANNELS = 12  # of a painted solid; see `SolidsLikelihood`
# Solids stand on a square, and under the prior anywhere on it with the same probability.
GROUND_SIDE = 1.8
MIN_SIZE = 0.1
# Settings that must keep their defaults: of a decoder that is learnt, and of the place.
WITHOUT_EFFECT = (
    "background_model", "likelihood", "decoder_net", "decoder_output_bias",
    "decoder_output_use_sigmoid", "pos_prior_mean", "pos_prior_sd",
)  # fmt: skip
WINDOW = 1.15  # side of the window, in sides of the square around a solid
# Standard deviation of (x, y) around what a glimpse shows, and how far from the middle that may be,
# in half sides of the square.
SHIFT_SD, BORDER = 0.2, 0.99


class Solids(NamedTuple):
    """What latents say of solids."""

    log_probs: Tensor  # log p(kind), [..., 3], in the order of `world.KINDS`
    size: Tensor  # [...]
    place: Tensor  # (x, y) on the ground, [..., 2]
    angles: Tensor  # in radians, one for each kind of `TURNED`, [..., 2]


class SolidsLikelihood(NormalLikelihood):
    """Pixels are Normal around the picture of the solids, with the kinds summed out.

    A painted solid has 12 channels: the expectations over its kind of f (3 colours), f^2, f a, a
    and a^2, and its depth. A canvas is a stack of them, [B, n, 12, H, H]; an image, [B, 3, H, H],
    stands for the ground alone, whatever it shows.

    Args:
        sd: Standard deviation of every pixel.
        renderer: Draws the ground.
    """

    renderer: Renderer

    def __init__(self, sd: float, renderer: Renderer) -> None:
        super().__init__(sd, covers=True)
        vars(self)["renderer"] = renderer  # no module of this one: it is `SolidsAIR.decode`

    def add(self, canvas: Tensor, painted: Tensor) -> Tensor:
        """Adds one solid, [B, 12, H, H]."""
        return torch.cat((self._stack(canvas), painted[:, None]), 1)

    def cut_out(self, images: Tensor, painted: Tensor, present: Tensor) -> Tensor:
        raise ValueError("added scenes and spots: expected windows that a decoder paints")

    def show(self, canvas: Tensor) -> Tensor:
        return self._moments(canvas)[0]

    def distribution(self, canvas: Tensor) -> dist.TorchDistribution:
        mean, variance = (part.flatten(1) for part in self._moments(canvas))
        return dist.Independent(_ExpectedNormal(mean, variance, self.sd), 1)

    def log_prob(self, images: Tensor, canvas: Tensor) -> Tensor:
        mean, variance = self._moments(canvas)
        return super().log_prob(images, mean) - variance.flatten(1).sum(1) / (2 * self.sd**2)

    def _stack(self, canvas: Tensor) -> Tensor:
        """A canvas as a stack, [B, n, 12, H, H]; of an image, n = 0, and of a single solid, 1."""
        if canvas.dim() == 5:
            return canvas
        solids = canvas[:, :0] if canvas.shape[1] == 3 else canvas
        return solids.view(len(canvas), -1, CHANNELS, *canvas.shape[2:])

    def _moments(self, canvas: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance over the kinds of each pixel, [B, 3, H, H] each."""
        stack, mean = self._stack(canvas), self.renderer.ground.expand(len(canvas), -1, -1, -1)
        square, order = mean.square(), stack[:, :, -1].amax((2, 3)).argsort(1, descending=True)
        rows = torch.arange(len(stack), device=stack.device)[:, None]
        for solid in stack[rows, order].unbind(1):  # the farthest one first
            f, ff, fa, a, aa, _ = torch.split(solid, [3, 3, 3, 1, 1, 1], 1)
            square = ff + 2 * (f - fa) * mean + (1 - 2 * a + aa) * square
            mean = f + (1 - a) * mean
        return mean, square - mean.square()


class _ExpectedNormal(dist.Normal):
    """The expectation of the log probability of a Normal, over a mean that is uncertain."""

    def __init__(self, mean: Tensor, variance: Tensor, sd: float) -> None:
        super().__init__(mean, mean.new_full((), sd), validate_args=False)
        self.of_mean, self.sd = variance, sd

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_ExpectedNormal":  # noqa: ANN401
        mean, variance = self.loc.expand(batch_shape), self.of_mean.expand(batch_shape)
        return _ExpectedNormal(mean, variance, self.sd)

    def log_prob(self, value: Tensor) -> Tensor:
        log_prob: Tensor = super().log_prob(value)  # type: ignore[no-untyped-call]
        return log_prob - self.of_mean / (2 * self.sd**2)


class SolidsGlimpse(Glimpse):
    """A glimpse of what is not ground, and the place on the ground that the camera sees there."""

    renderer: Renderer

    def __init__(self, settings: ModelSettings, renderer: Renderer) -> None:
        _, half = renderer.outlines(torch.ones(1), torch.zeros(1, 2))
        super().__init__(replace(settings, scale_prior_mean=1 / (WINDOW * float(half))))
        vars(self)["renderer"] = renderer  # as that of `SolidsLikelihood`
        self.sd = torch.tensor([settings.scale_prior_sd, SHIFT_SD, SHIFT_SD])

    def remainder(self, images: Tensor, background: Tensor | None, canvas: Tensor | None) -> Tensor:
        return images - self.renderer.ground

    def forward(
        self, remainder: Tensor, windows: Sequence[Tensor], prior: Place
    ) -> tuple[Tensor, Place]:
        seen, (where, _) = super().forward(remainder, windows, prior)
        shift = from_ground(self.renderer.places_at(centre_of(where)))
        return seen, (torch.cat((prior[0][:1].expand(len(shift), 1), shift), 1), self.sd)

    def mean_where(self, place: Tensor, loc: Tensor) -> Tensor:
        return place + loc


def to_ground(z: Tensor) -> Tensor:
    """Places on the ground, uniform on the square if z is standard Normal: [..., 2]."""
    return GROUND_SIDE / 2 * torch.erf(z / math.sqrt(2))


def from_ground(place: Tensor) -> Tensor:
    """The inverse of `to_ground`, for the nearest place that is well within the square."""
    return math.sqrt(2) * torch.erfinv((2 / GROUND_SIDE * place).clamp(-BORDER, BORDER))


class SolidsAIR(AIR):
    """AIR for scenes of solids. `decode` is the renderer, which has no parameters.

    The canvases of `prior` are stacks of solids, of which ``likelihood.show`` makes images.

    Args:
        *args: As `AIR`. The images have three channels, z_what has the size `Z_WHAT_SIZE`, and the
            guide sees glimpses: with the whole image it does not learn, since no decoder bridges
            the distance of a solid from the first guess of its place.
        **kwargs: As `AIR`.

    Raises:
        ValueError: As `AIR`, or if a setting does not suit solids.
    """

    renderer = "solids"
    decode: Renderer
    symmetry: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        if kwargs.get("decode") is not None:
            raise ValueError("decode: expected none, since a renderer paints")
        super().__init__(*args, **kwargs)

    def make_painter(self, s: ModelSettings) -> None:
        wanted = {
            "channels": 3,
            "z_what_size": Z_WHAT_SIZE,
            "guide_input": "glimpse",
        }
        defaults = ModelSettings()
        for name in WITHOUT_EFFECT:
            wanted[name] = getattr(defaults, name)
        for name, value in wanted.items():
            got = getattr(s, name)
            if (tuple(got) if isinstance(got, list) else got) != value:
                raise SettingError(name, f"expected {value} for solids, got {got}")
        self.decode = Renderer(s.x_size)
        self.likelihood = SolidsLikelihood(s.likelihood_sd, self.decode)
        self.look = SolidsGlimpse(s, self.decode)
        symmetry = [float(SYMMETRY[kind] or 1) for kind in TURNED]
        self.register_buffer("symmetry", torch.tensor(symmetry), persistent=False)

    def solids(self, z_where: Tensor, z_what: Tensor) -> Solids:
        """What latents, [..., 3] and [..., Z], say of solids."""
        scores, vectors = z_what[..., : len(KINDS)], z_what[..., len(KINDS) :]
        place = to_ground(z_where[..., 1:])
        directions = torch.atan2(vectors[..., 1::2], vectors[..., ::2])
        # Relative to the camera's ray, since this is how a window shows a solid.
        angles = self.decode.azimuth(place)[..., None] + directions / self.symmetry
        log_probs = (SHARPNESS * scores).log_softmax(-1)
        return Solids(log_probs, z_where[..., 0].clamp(min=MIN_SIZE), place, angles)

    def describe(self, z_where: Tensor, z_what: Tensor) -> dict[str, Any]:
        """Kind, with its probability, size, place and angle in degrees, which a sphere lacks."""
        solid = self.solids(z_where, z_what)
        best = int(solid.log_probs.argmax())
        found = {
            "kind": KINDS[best],
            "probability": float(solid.log_probs[best].exp()),
            "size": float(solid.size),
            "place": solid.place.tolist(),
        }
        if symmetry := SYMMETRY[KINDS[best]]:
            angle = math.degrees(float(solid.angles[TURNED.index(KINDS[best])]))
            found["angle"] = angle % (360 / symmetry)
        return found

    def paint(self, z_where: Sequence[Tensor], z_what: Sequence[Tensor]) -> Tensor:
        """Each solid, as `SolidsLikelihood` expects it, [T, B, 12, H, H]."""
        solids = self.solids(torch.cat(tuple(z_where)), torch.cat(tuple(z_what)))
        turns = torch.stack((solids.angles.cos(), solids.angles.sin()), -1)
        patches, pixels = self.decode(solids.size, solids.place, turns)
        f, a = patches[:, :, :3], patches[:, :, 3:]
        each = torch.cat((f, f * f, f * a, a, a * a), 2)
        expected = (solids.log_probs.exp()[..., None, None] * each).sum(1)
        depth = self.decode.depth(solids.place)[:, None, None].expand_as(expected[:, :1])
        painted = self.decode.put(torch.cat((expected, depth), 1), pixels)
        return painted.view(len(z_where), len(z_where[0]), *painted.shape[1:])

    def window(self, z_where: Tensor) -> Tensor:
        place = to_ground(z_where[..., 1:])
        centre, half = self.decode.outlines(z_where[..., 0].clamp(min=MIN_SIZE), place)
        return where_at(centre, 1 / (WINDOW * half))
