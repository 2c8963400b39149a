"""Training: the optimisation step, the loop around it, several processes."""

from air.training.settings import TrainingSettings
from air.training.trainer import Trainer

__all__ = ["Trainer", "TrainingSettings"]
