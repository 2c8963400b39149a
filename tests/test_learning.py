"""Real training on real digits: the default recipe learns to count, the paper's learns to see."""

import math
from collections.abc import Iterator
from pathlib import Path

import pyro
import pytest
import torch

from air import AIR
from air.evaluation import Evaluation
from air.training import Evaluated, Trainer, TrainingSettings
from multi_mnist import SceneSettings, load_scenes


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def _fast() -> Iterator[None]:
    with pyro.validation_enabled(False):
        yield


def train(settings: TrainingSettings, cache: Path) -> tuple[Evaluation, float]:
    """Trains; returns the last evaluation and the ELBO of leaving every canvas empty."""
    scenes = load_scenes(SceneSettings(num_scenes=20_000, num_test_scenes=2_000), cache_dir=cache)
    held_out, counts = torch.from_numpy(scenes.test.x), torch.from_numpy(scenes.test.counts)
    air = AIR(use_baselines=settings.estimator == "score")
    trainer = Trainer(air, torch.from_numpy(scenes.train.x), held_out, counts, settings)
    *_, last = (event for event in trainer.train() if isinstance(event, Evaluated))
    pixels = held_out.double() / 255
    constant = held_out[0].numel() * (math.log(0.3) + 0.5 * math.log(2 * math.pi))
    return last.result, -constant - (pixels**2).sum((1, 2)).mean().item() / (2 * 0.3**2)


@pytest.mark.slow
@pytest.mark.usefixtures("_fast")
def test_the_default_recipe_learns_to_count(cache: Path) -> None:
    result, empty = train(TrainingSettings(num_steps=1_000, eval_every=0), cache)
    assert result.accuracy_mode is not None
    assert result.accuracy_mode >= 0.9
    assert result.elbo > empty + 100


@pytest.mark.slow
@pytest.mark.usefixtures("_fast")
def test_the_score_function_learns_to_see(cache: Path) -> None:
    settings = TrainingSettings(num_steps=400, eval_every=0, estimator="score")
    result, empty = train(settings, cache)
    assert result.elbo > empty + 40
