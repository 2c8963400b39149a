"""How good a model is: ELBO, count accuracy and calibration, boxes, alarms."""

from air.evaluation.elbo import importance_weighted_bound, sample_elbo
from air.evaluation.metrics import Evaluation, HeldOut, evaluate

__all__ = ["Evaluation", "HeldOut", "evaluate", "importance_weighted_bound", "sample_elbo"]
