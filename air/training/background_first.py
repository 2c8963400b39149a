"""The background before the objects: the first steps of training know no object.

Otherwise an object can learn to paint the background before the background does: a window as large
as the image, half transparent, that darkens or lightens all of it. Then it covers no digit.
"""

import pyro
from pyro.infer import TraceGraph_ELBO
from torch import Tensor

from air.air import AIR
from air.arguments import check_call
from air.priors import PresencePrior
from air.settings import SettingError
from air.subsampling import subsample_indices
from air.support_handlers import register_parameters
from air.training.settings import TrainingSettings
from air.training.svi import SVI


class BackgroundAlone:
    """`model` and `guide` of scenes without objects; the arguments are those of `AIR.guide`.

    Args:
        air: Its background and likelihood are trained, and nothing else.

    Raises:
        ValueError: If the AIR has no model of the background.
    """

    def __init__(self, air: AIR) -> None:
        if air.background is None:
            raise ValueError("background_model: expected constant or vae, got none")
        self.air, self.background = air, air.background

    def guide(
        self,
        data: Tensor,
        batch_size: int | None = None,
        z_pres_prior_p: PresencePrior | None = None,
        num_images: int | None = None,
    ) -> None:
        """q(z_background | x).

        Raises:
            ValueError: As `AIR.guide`.
        """
        check_call(data, batch_size, z_pres_prior_p, num_images)
        register_parameters(self.air)
        size, indices = num_images or len(data), subsample_indices(data, batch_size, num_images)
        with pyro.plate("data", size, subsample=indices, device=str(data.device)) as ix:
            self.background.guide(self.air.to_images(data[ix]))

    def model(
        self,
        data: Tensor,
        batch_size: int | None = None,
        z_pres_prior_p: PresencePrior | None = None,
        num_images: int | None = None,
    ) -> None:
        """p(x, z_background), where no object is on the canvas.

        Raises:
            ValueError: As `AIR.guide`.
        """
        check_call(data, batch_size, z_pres_prior_p, num_images)
        register_parameters(self.air)
        with pyro.plate("data", num_images or len(data), device=str(data.device)) as ix:
            images = self.air.to_images(data[ix])
            canvas = self.background.model(images, len(images))
            pixels = self.air.likelihood.distribution(canvas.flatten(1))
            pyro.sample("obs", pixels.to_event(1), obs=images.flatten(1))


def background_svi(air: AIR, svi: SVI, settings: TrainingSettings) -> SVI:
    """What takes the first steps: SVI of the background alone, if there is one to train.

    Args:
        air: The model.
        svi: Takes the other steps; the optimiser and the sums of steps are shared with it.
        settings: Of training.

    Raises:
        SettingError: If no step would be left for the objects.
    """
    if air.background is None or not any(p.requires_grad for p in air.background.parameters()):
        return svi
    if (given := settings.background_steps) >= settings.num_steps > 0:
        fewer = f"expected fewer than the {settings.num_steps} steps of training, got {given}"
        raise SettingError("background_steps", fewer)
    alone = BackgroundAlone(air)
    first = SVI(alone.model, alone.guide, svi.optim, TraceGraph_ELBO())
    first.stats = svi.stats
    return first
