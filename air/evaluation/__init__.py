"""How good a model is: count accuracy, ELBO, boxes, signs of collapse."""

from air.evaluation.metrics import Evaluation, HeldOut, evaluate

__all__ = ["Evaluation", "HeldOut", "evaluate"]
