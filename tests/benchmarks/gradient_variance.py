"""The noise of the gradients of all estimators, for each part of the model.

    python tests/benchmarks/gradient_variance.py                        untrained weights
    python tests/benchmarks/gradient_variance.py --load RUN/checkpoint.pt

Draws the gradient of one batch of held-out scenes many times, at the same weights, by every
estimator of the ELBO and for the other objectives. Prints a Markdown table, in nats per image: the
length of the mean gradient of the ELBO, and by how much a single draw is off (the root of the
variances' sum). A baseline helps when it is trained: load a run made with ``--estimator score``.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from pyro.infer import TraceGraph_ELBO
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, this is not a package

import main as program
from air import AIR
from air.cli.config import resolve_config
from air.cli.device import pick_device
from air.cli.flags import build_parser
from air.marginal import MarginalAIR
from air.storage.checkpoint import load_weights_strict, read_weights
from air.training.objectives import OBJECTIVES


class Moments:
    """The mean of vectors and the sum of their variances, by Welford's updates."""

    def __init__(self) -> None:
        self.number = 0
        self.mean = torch.zeros(1, dtype=torch.float64)
        self.squares = 0.0

    def add(self, vector: Tensor) -> None:
        ahead = vector.double() - self.mean
        self.number += 1
        self.mean = self.mean + ahead / self.number
        self.squares += float((ahead * (vector - self.mean)).sum())

    def sd(self) -> float:
        return math.sqrt(self.squares / (self.number - 1))


def parts(air: AIR) -> dict[str, list[Tensor]]:
    """Parameters of model and guide by the net they belong to, and all initial states together."""
    found: dict[str, list[Tensor]] = {}
    for name, parameter in air.named_parameters():
        if not name.startswith("bl_"):
            part = name.split(".")[0] if "." in name else "initial states"
            found.setdefault(part, []).append(parameter)
    return found


def measure(air: AIR, estimator: Any, images: Tensor, draws: int) -> dict[str, Moments]:  # noqa: ANN401
    """Moments of the gradient per image by the estimator's model and guide, for each part."""
    moments = {part: Moments() for part in parts(air)}
    torch.manual_seed(0)
    for _ in range(draws):
        air.zero_grad()
        TraceGraph_ELBO().loss_and_grads(estimator.model, estimator.guide, images)
        for part, parameters in parts(air).items():
            gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
            moments[part].add(gradient / len(images))
    return moments


def main() -> None:
    """Measures all three and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--load", help="a checkpoint.pt, or weights; default: untrained")
    parser.add_argument("--draws", type=int, default=100, help="gradients of each estimator")
    parser.add_argument("--batch-size", type=int, default=64, help="scenes")
    parser.add_argument("--particles", type=int, default=5, help="K of the other objectives")
    parser.add_argument("flags", nargs="*", help="behind --: flags of main.py for data and nets")
    args = parser.parse_args()
    cli_args = vars(build_parser().parse_args(args.flags))
    weights, saved = read_weights(Path(args.load)) if args.load else ({}, {})
    config = resolve_config({**cli_args, "estimator": "score"}, saved)
    scenes = program.load_scenes(config)
    config = config.with_image_size(scenes.x_size, scenes.channels)
    trainer = program.build_trainer(config, scenes, pick_device(config.program.device))
    if weights:
        load_weights_strict(trainer.air, weights, Path(args.load))
    air, images = trainer.air, trainer.held_out.images[: args.batch_size]

    measured = {"score and baseline": measure(air, air, images, args.draws)}
    air.use_baselines = False
    measured["score"] = measure(air, air, images, args.draws)
    for (objective, estimator), function in OBJECTIVES.items():
        number = 1 if objective == "elbo" else args.particles
        name = estimator if objective == "elbo" else f"{objective}, {estimator}, K = {number}"
        paths = MarginalAIR(air, function, number)
        measured[name] = measure(air, paths, images, args.draws)

    print("| part | mean | " + " | ".join(measured) + " |")
    print("|---" * (2 + len(measured)) + "|")
    for part, exact in measured["marginal"].items():
        off = " | ".join(f"{moments[part].sd():.1f}" for moments in measured.values())
        print(f"| {part} | {float(exact.mean.norm()):.1f} | {off} |")


if __name__ == "__main__":
    main()
