"""Tasks of the paper's section 4 on two-digit scenes, learnt from the latents and few labels.

    python tests/benchmarks/downstream.py --load runs/RUN/checkpoint.pt

The tasks are the sum of both digits, whether they ascend from left to right, and which digit a
single object is. Classifiers on the latents that AIR infers are compared with a small convolutional
net on the pixels. The labels are those of scenes made here; the test scenes have other digits.
"""

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, this is not a package
from air import AIR
from air.detect import load_air
from air.inference import infer
from air.multi_mnist import Scenes, SceneSettings, load_scenes
from air.priors import at_least_probs
from air.storage.checkpoint import read_weights

Array = NDArray[Any]


class Task(NamedTuple):
    """Scenes, their latents and the targets of the tasks."""

    x: Array  # uint8 [N, H, H]
    latents: Array  # [N, features]
    targets: dict[str, Array]  # by name, [N] each


def read(air: AIR, x: Array, objects: int) -> Array:
    """Of the first objects from left to right: place, code and the probability to be there."""
    parts = []
    for batch in torch.split(torch.from_numpy(x), 500):
        found = infer(air, batch.to(air.h_init.device))
        there = at_least_probs(found.count_probs)[..., None]
        steps = torch.cat((there, found.z_where, found.z_what), 2)[:, :objects]
        left = (found.boxes[:, :objects, 0] + found.boxes[:, :objects, 2]).argsort(1)
        steps = steps.take_along_dim(left[..., None], 1)
        parts.append(steps.flatten(1).cpu().numpy())
    return np.concatenate(parts)


def make_task(air: AIR, scenes: Scenes) -> Task:
    """The targets, from the digits in their order from left to right."""
    labels, boxes = np.asarray(scenes.labels), np.asarray(scenes.boxes)
    order = (boxes[:, :, 0] + boxes[:, :, 2]).argsort(1)
    labels = np.take_along_axis(labels, order, 1)
    if labels.shape[1] == 1:
        targets = {"digit": labels[:, 0]}
    else:
        ascends = (labels[:, 1] > labels[:, 0]).astype(int)
        targets = {"sum": labels.sum(1), "ascending": ascends}
    return Task(scenes.x, read(air, scenes.x, labels.shape[1]), targets)


def make_net(classes: int) -> nn.Module:
    """A small convolutional net for pictures [N, 1, H, H]."""
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.LazyLinear(128), nn.ReLU(), nn.LazyLinear(classes)
    )


def score_net(train: Task, test: Task, name: str, number: int, updates: int) -> float:
    """Test accuracy of the convolutional net, trained on the first labels."""
    torch.manual_seed(0)
    x, y = torch.from_numpy(train.x[:number]), torch.from_numpy(train.targets[name][:number])
    net = make_net(int(train.targets[name].max()) + 1)
    net(x[:2, None] / 255)  # tells lazy layers their sizes
    adam = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(updates):
        chosen = torch.randint(number, (min(64, number),))
        loss = nn.functional.cross_entropy(net(x[chosen, None] / 255), y[chosen])
        adam.zero_grad()
        loss.backward()
        adam.step()
    with torch.no_grad():
        parts = torch.split(torch.from_numpy(test.x), 500)
        guesses = torch.cat([net(part[:, None] / 255).argmax(1) for part in parts])
    return float(np.mean(guesses.numpy() == test.targets[name]))


def score_latents(model: Any, train: Task, test: Task, name: str, number: int) -> float:  # noqa: ANN401
    """Test accuracy of a classifier on the latents, trained on the first labels.

    They are taken as they are: to scale each to the same variance would raise those that the model
    does not use.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of a number of passes that is fixed
        model.fit(train.latents[:number], train.targets[name][:number])
    return float(model.score(test.latents, test.targets[name]))


def scenes_of(path: Path) -> dict[str, Any]:
    """The settings of the scenes that a model was trained on, as far as they are kept here."""
    _, config = read_weights(path)
    names = {field.name for field in fields(SceneSettings)}
    kept = names - {"counts", "num_scenes", "num_test_scenes", "seed", "min_gap"}
    return {name: config[name] for name in kept & config.keys()}


def table(
    air: AIR, scenes: dict[str, Any], labels: Sequence[int], test_scenes: int, updates: int
) -> Iterator[list[str]]:
    """Rows of the table: task, labels, and the accuracy of each classifier."""
    for count, names in ((2, ("sum", "ascending")), (1, ("digit",))):
        numbers = {"num_scenes": max(labels), "num_test_scenes": test_scenes}
        settings = SceneSettings(**scenes | {"counts": (count,), "seed": 1, **numbers})
        splits = load_scenes(settings)
        train, test = (make_task(air, part) for part in (splits.train, splits.test))
        for name in names:
            for number in labels:
                linear = LogisticRegression(max_iter=2000)
                scores = [score_latents(linear, train, test, name, number)]
                net = MLPClassifier((500,), alpha=1.0, max_iter=100, random_state=0)
                scores.append(score_latents(net, train, test, name, number))
                scores.append(score_net(train, test, name, number, updates))
                yield [name, f"{number:,}", *(f"{score:.1%}" for score in scores)]


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Learns tasks from what AIR infers.")
    parser.add_argument("--load", type=Path, required=True, metavar="FILE", help="a checkpoint.pt")
    parser.add_argument("--labels", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--test-scenes", type=int, default=5000)
    parser.add_argument("--updates", type=int, default=3000, help="of the convolutional net")
    given = parser.parse_args()
    torch.set_num_threads(1)
    air, scenes = load_air(given.load), scenes_of(given.load)
    if air.channels > 1:
        parser.error("expected a model of digits, got one of coloured images")
    print("| task | labels | latents, linear | latents, one hidden layer | pixels, convolutional |")
    print("|---|---|---|---|---|")
    for row in table(air, scenes, given.labels, given.test_scenes, given.updates):
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
