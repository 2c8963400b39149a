"""The phases of training: which objective until which step, and with how many objects.

1. With a trainable model of the background, a first phase has no objects. Otherwise a step of the
   model can learn to paint the background: a half-transparent window as large as the image, which
   darkens or lightens all of it and is then lost for objects.
2. The ELBO, by the estimator of the settings.
3. With `added_scenes`, the ELBO and the teacher of the count; the guide should count well by then.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from air.air import AIR
from air.data.scenes import sample_indices
from air.data.spots import FIT_SAMPLE, fit_finder
from air.marginal import MarginalAIR
from air.support.fields import SettingError
from air.support.images import to_bytes
from air.training.from_spots import FromSpots
from air.training.svi import SVI
from air.training.teacher import Teacher
from air.training.training_settings import TrainingSettings

MakeSVI = Callable[..., SVI]  # of a model, a guide, and whether the step may be compiled


class Phase(NamedTuple):
    """An entry of the list of phases."""

    begin: int  # its first optimisation step, counted from zero; it ends where the next one begins
    svi: SVI
    num_objects: int  # T, or 0 for none
    teacher: Teacher | None = None

    def take_step(self, step: int, air: AIR, data: Tensor, **kwargs: Any) -> None:  # noqa: ANN401
        """Takes an optimisation step, counted from zero, as `SVI.step_async` does."""
        if self.teacher and step == self.begin:
            self.teacher.follow(decay=0)
        num_steps, air.num_steps = air.num_steps, self.num_objects
        try:
            self.svi.step_async(data, **kwargs)
        finally:
            air.num_steps = num_steps
        if self.teacher:
            self.teacher.follow()


def make_phases(
    air: AIR, settings: TrainingSettings, images: Tensor, make_svi: MakeSVI
) -> list[Phase]:
    """The phases of a training, in their order.

    Raises:
        SettingError: If the settings do not fit the model, or no step is left for the objects.
    """
    phases = []
    begin = 0
    background = air.background is not None and any(
        p.requires_grad for p in air.background.parameters()
    )
    if background and settings.background_steps:
        begin = settings.background_steps
        if begin >= settings.num_steps > 0:
            fewer = f"expected fewer than the {settings.num_steps} steps of training, got {begin}"
            raise SettingError("background_steps", fewer)
        # Not compiled: the phase is too short for that.
        phases.append(Phase(0, make_svi(air.model, air.guide, compile=False), 0))
    if settings.spot_steps:
        sample = images[torch.from_numpy(sample_indices(len(images), FIT_SAMPLE))]
        spots = FromSpots(air, fit_finder(to_bytes(sample).cpu().numpy()))
        svi = make_svi(spots.model, spots.guide, compile=False)  # too short a phase as well
        phases.append(Phase(begin, svi, air.num_steps))
        begin += settings.spot_steps
    program = MarginalAIR(air) if settings.estimator == "marginal" else air
    phases.append(Phase(begin, make_svi(program.model, program.guide), air.num_steps))
    if settings.added_scenes:
        teacher = Teacher(air, settings.added_scenes)
        taught = MarginalAIR(air, teacher)
        svi = make_svi(taught.model, taught.guide)
        begin = max(settings.added_scenes_from, begin)
        phases.append(Phase(begin, svi, air.num_steps, teacher))
    return phases


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """The phase of an optimisation step, counted from zero."""
    return [phase for phase in phases if phase.begin <= step][-1]
