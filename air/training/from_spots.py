"""The first phase of training: the objects are the spots that a threshold sees.

From scratch, the guide must find out by chance that windows on objects help, and may learn to use
one window for two objects, or none. A threshold finds most objects that stand alone
(`air.data.spots`). So at first z_pres and z_where are not drawn from the guide, but are those of
the spots, with a little noise. The decoder and the encoder learn what objects look like, and
q(z_pres) and q(z_where) are fitted to the spots. Some images are sums of two others, in which
objects touch (`air.training.known_objects`): a threshold finds few such objects. The objective is

    log p(x, z) - log q(z_what) + log q(z_pres) + log q(z_where)

which is also reported in place of the ELBO while the phase lasts. No label is used.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from air.air import AIR
from air.data.scenes import Array
from air.data.spots import SpotFinder
from air.priors import PresencePrior
from air.spatial_transformer import where_at
from air.support.subsampling import draw_indices
from air.training.known_objects import GivenObjects, KnownObjects, make_sums

NUM_IMAGES = 4000  # of the training images, in which spots are looked for
CHUNK = 200  # of them, in which they are looked for at once
MARGIN = 1.15  # side of a window divided by that of its spot
LEAST_SIDE = 0.6  # of a typical spot's side, below which windows are not made smaller
# Standard deviations of the noise of z_where = (s, x, y). The first part is relative. For whole
# images it changes s alone, which also moves the window. A glimpse is seen without its place, so
# the centre stays.
WHOLE_NOISE, GLIMPSE_NOISE = (0.05, 0.0, 0.0), (0.02, 0.02, 0.02)
SHIFT_NOISE = 0.06  # of x and y, in half windows


@dataclass(eq=False)
class FromSpots:
    """`model` and `guide` for SVI, which train an AIR on the objects that a threshold sees.

    They take the arguments of `AIR.model` and `AIR.guide`, but draw their batches from some of the
    images, in which spots are looked for once.
    """

    air: AIR
    find: SpotFinder
    images: Tensor  # for training, as `AIR.to_images` takes them, [N, (C,) H, H]
    pixels: Array  # the same images, in the size in which spots are looked for, [N, (C,) L, L]

    def __post_init__(self) -> None:
        self._batch: tuple[Tensor, KnownObjects, dict[str, Tensor]] | None = None

    def guide(
        self,
        data: Tensor,
        batch_size: int | None = None,
        z_pres_prior_p: PresencePrior | None = None,
        num_images: int | None = None,
    ) -> None:
        """q(z_what | x, z_pres, z_where), and the fit of q(z_pres) and q(z_where)."""
        images, known, hidden = self.known_objects
        k = draw_indices(len(images), min(batch_size or len(images), len(images)), images.device)
        images, k = self.air.to_images(images[k]), k.to(hidden.device)
        images, known = self._with_sums(images, known.pick(k), hidden[k])
        looks_again = self.air.look.looks_again
        known = with_noise(known, keep_centre=looks_again)
        given = GivenObjects(known, nearest=looks_again)
        size = num_images or len(data)
        sure: Any = known.sure  # Pyro's types name a class that no tensor has
        with poutine.mask(mask=sure), given:
            self.air.guide(images, num_images=size)
        fit = (sum(given.log_q.values()) * known.sure).sum() * (size / len(images))
        pyro.factor("spots", -fit, has_rsample=True)  # Pyro subtracts what a guide adds
        self._batch = images, known, given.values

    def model(
        self,
        data: Tensor,
        batch_size: int | None = None,
        z_pres_prior_p: PresencePrior | None = None,
        num_images: int | None = None,
    ) -> None:
        """p(x, z) of the batch that `guide` drew, with the same objects."""
        assert self._batch is not None
        images, known, values = self._batch
        sure: Any = known.sure
        with poutine.mask(mask=sure), poutine.condition(data=values):
            self.air.model(images, None, z_pres_prior_p, num_images or len(data))

    def _with_sums(
        self, images: Tensor, known: KnownObjects, hidden: Tensor
    ) -> tuple[Tensor, KnownObjects]:
        """A batch of images in which some are replaced by sums of others.

        They are fewer where scenes have many objects, of which more touch each other anyway.
        """
        likelihood = self.air.likelihood
        painted = hidden.view(1, len(images), 1, *hidden.shape[1:]).to(images)
        alone = likelihood.cut_out(images, painted, painted.new_ones(1, len(images)))
        number = max(1, len(images) // (2 * max(1, self.air.num_steps - 1)))
        sums, of_sums = make_sums(likelihood, images, alone, known, number)
        k = of_sums.sure.nonzero()[:, 0]
        images = torch.cat((images[len(k) :], sums[k]))
        parts = zip(known.pick(torch.arange(len(k), len(images))), of_sums.pick(k), strict=True)
        return images, KnownObjects._make(torch.cat(each) for each in parts)

    @cached_property
    def known_objects(self) -> tuple[Tensor, KnownObjects, Tensor]:
        """The images, the spots in them, and the pixels of the spots, bool [N, H, H].

        Spots are objects from left to right.
        """
        air, n = self.air, len(self.pixels)
        # In parts, since the original pixels of all images together take much memory as floats.
        parts = [self.pixels[k : k + CHUNK] for k in range(0, n, CHUNK)]
        spots_of_parts = [self.find(part) for part in parts]
        covers = map(self.find.cover, parts, spots_of_parts)
        hidden = torch.cat([shrink(cover, air.x_size) for cover in covers])
        found = [spots for part in spots_of_parts for spots in part]
        zoom = self.pixels.shape[-1] / air.x_size
        present = torch.zeros(n, air.num_steps)
        where = air.z_where_loc_prior.cpu().repeat(n, air.num_steps, 1)
        for i, spots in enumerate(found):
            boxes = torch.from_numpy(spots.boxes)[: air.num_steps].float() / zoom
            boxes = boxes[boxes[:, 0].argsort()]
            longest = (boxes[:, 2:] - boxes[:, :2]).amax(1)
            scale = air.x_size / (MARGIN * longest.clamp(min=LEAST_SIDE * self.find.side / zoom))
            centre = (boxes[:, :2] + boxes[:, 2:]) / air.x_size - 1
            where[i, : len(boxes)] = where_at(centre, scale[:, None])
            present[i, : len(boxes)] = 1
        sure = torch.tensor([spots.sure and len(spots) <= air.num_steps for spots in found])
        like = air.h_init
        known = KnownObjects(present.to(like), where.to(like), sure.to(like.device))
        return self.images.to(like.device), known, hidden.to(like.device)


def shrink(masks: Array, side: int) -> Tensor:
    """Masks [N, L, L] in images of `side` x `side` pixels, where a pixel of theirs was true."""
    pixels = torch.from_numpy(masks)[:, None].float()
    return adaptive_max_pool2d(pixels, side)[:, 0] > 0


def with_noise(known: KnownObjects, keep_centre: bool) -> KnownObjects:
    """Objects at slightly other places and sizes."""
    noise = torch.randn_like(known.where)
    relative = GLIMPSE_NOISE if keep_centre else WHOLE_NOISE
    factors = known.where.new_tensor(relative) * noise[..., :1]
    shifts = known.where.new_tensor([0.0, SHIFT_NOISE, SHIFT_NOISE]) * noise
    return known._replace(where=known.where * (1 + factors) + shifts)
