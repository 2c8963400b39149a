"""The phases of training: which objective until which step.

1. With `spot_steps`, the objects are those that a threshold sees.
2. The objective of the settings, by their estimator.
3. With `added_scenes`, the same and the teacher of the count; the guide should count well by then.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from air.air import AIR
from air.data.scenes import Array, sample_indices
from air.data.spots import fit_finder
from air.marginal import CountTerm, MarginalAIR
from air.support.images import to_bytes, to_tensor
from air.training.from_spots import NUM_IMAGES, FromSpots, shrink
from air.training.objectives import OBJECTIVES
from air.training.ranks import shard
from air.training.svi import SVI
from air.training.teacher import Teacher
from air.training.training_settings import TrainingSettings

MakeSVI = Callable[..., SVI]  # of a model, a guide, and whether the step may be compiled

SAMPLE = 500  # training images to which a finder of spots and a background are fitted
MIN_SAMPLE = 10  # images, below which planes are better backgrounds than components


class Phase(NamedTuple):
    """An entry of the list of phases."""

    begin: int  # its first optimisation step, counted from zero; it ends where the next one begins
    svi: SVI
    teacher: Teacher | None = None

    def take_step(self, step: int, data: Tensor, **kwargs: Any) -> None:  # noqa: ANN401
        """Takes an optimisation step, counted from zero, as `SVI.step_async` does."""
        if self.teacher and step == self.begin:
            self.teacher.follow(decay=0)
        self.svi.step_async(data, **kwargs)
        if self.teacher:
            self.teacher.follow()


def make_phases(
    air: AIR,
    settings: TrainingSettings,
    images: Tensor,
    make_svi: MakeSVI,
    spot_images: tuple[Array, Array] | None = None,
) -> list[Phase]:
    """The phases of a training, in their order; first fits the model of the background."""
    phases = []
    begin = 0
    seen, rows = spot_images or (images, np.arange(len(images)))

    def pick(most: int) -> tuple[Tensor, Array]:
        """Some images at random, and the pixels in which their spots are looked for."""
        k = sample_indices(len(rows), most)
        return images[torch.from_numpy(rows[k])], to_bytes(to_tensor(seen[k])).cpu().numpy()

    sample, pixels = pick(SAMPLE)
    finder = cache(lambda: fit_finder(pixels))  # takes a second, and not every training needs it
    background = air.background
    if background and not background.fitted and len(images) >= MIN_SAMPLE:
        hidden = shrink(finder().hide(pixels, finder()(pixels)), air.x_size)
        background.fit(air.to_images(sample), hidden)
    if settings.spot_steps and len(images):
        spots = FromSpots(air, finder(), *map(shard, pick(NUM_IMAGES)))
        svi = make_svi(spots.model, spots.guide, compile=False)  # too short a phase for that
        phases.append(Phase(begin, svi))
        begin += settings.spot_steps
    program = make_program(air, settings)
    phases.append(Phase(begin, make_svi(program.model, program.guide)))
    if settings.added_scenes:
        teacher = Teacher(air, settings.added_scenes)
        taught = make_program(air, settings, teacher)
        svi = make_svi(taught.model, taught.guide)
        begin = max(settings.added_scenes_from, begin)
        phases.append(Phase(begin, svi, teacher))
    return phases


def make_program(
    air: AIR, settings: TrainingSettings, count_term: CountTerm | None = None
) -> AIR | MarginalAIR:
    """The model and guide whose ELBO, as Pyro computes it, is the objective of the settings."""
    if settings.estimator == "score":
        return air
    objective = OBJECTIVES[settings.objective, settings.estimator]
    return MarginalAIR(air, objective, settings.particles, count_term)
