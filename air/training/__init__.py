"""Training: the optimisation step, the loop around it, several processes."""

from air.training.trainer import Trainer
from air.training.training_settings import TrainingSettings

__all__ = ["Trainer", "TrainingSettings"]
