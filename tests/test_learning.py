"""Real training: the default recipe, the paper's estimator and DAIR learn to count."""

from collections.abc import Iterator
from pathlib import Path

import pyro
import pytest
import torch

from air import AIR
from air.evaluation.alarms import empty_canvas_elbo
from air.evaluation.metrics import Evaluation, HeldOut
from air.training.events import Evaluated
from air.training.settings import TrainingSettings
from air.training.trainer import Trainer
from multi_mnist import SceneSettings, load_scenes


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def _fast() -> Iterator[None]:
    with pyro.validation_enabled(False):
        yield


def train(settings: TrainingSettings, steps: int, cache: Path) -> tuple[Evaluation, float]:
    """Trains; returns the last evaluation and the ELBO if every canvas were empty."""
    scenes = load_scenes(SceneSettings(num_scenes=20_000, num_test_scenes=2_000), cache_dir=cache)
    x, counts = map(torch.from_numpy, scenes.test[:2])
    air = AIR(num_steps=steps, use_baselines=settings.estimator == "score")
    trainer = Trainer(air, torch.from_numpy(scenes.train.x), HeldOut(x, counts), settings)
    *_, last = (event for event in trainer.train() if isinstance(event, Evaluated))
    return last.result, empty_canvas_elbo(air, x)


@pytest.mark.slow
@pytest.mark.usefixtures("_fast")
def test_the_default_recipe_learns_to_count(cache: Path) -> None:
    result, empty = train(TrainingSettings(num_steps=400, eval_every=0), 3, cache)
    assert result.counts is not None
    assert result.counts.accuracy_mode >= 0.85
    assert result.elbo > empty + 100


@pytest.mark.slow
@pytest.mark.usefixtures("_fast")
def test_the_papers_estimator_learns_to_count_digits_that_do_not_overlap(cache: Path) -> None:
    settings = SceneSettings(
        x_size=32, sides=(12, 16), min_gap=0.0, num_scenes=5000, num_test_scenes=1000
    )
    scenes = load_scenes(settings, cache_dir=cache)
    x, counts = map(torch.from_numpy, scenes.test[:2])
    air = AIR(
        num_steps=2, x_size=32, window_size=16, z_what_size=10, rnn_hidden_size=64,
        encoder_net=[64], decoder_net=[64], predict_net=[64], bl_predict_net=[64],
        scale_prior_mean=2.2,
    )  # fmt: skip
    recipe = TrainingSettings(
        num_steps=550, eval_every=0, estimator="score", learning_rate=3e-3, z_pres_prior=0.05
    )
    trainer = Trainer(air, torch.from_numpy(scenes.train.x), HeldOut(x, counts), recipe)
    *_, last = (event for event in trainer.train() if isinstance(event, Evaluated))
    assert last.result.counts is not None
    assert last.result.counts.accuracy_mode >= 0.8


@pytest.mark.slow
@pytest.mark.usefixtures("_fast")
def test_the_difference_guide_learns_to_count_sprites(cache: Path) -> None:
    settings = SceneSettings(
        recipe="dsprites", x_size=32, sides=(9, 14), rotation=180.0, num_scenes=5000,
        num_test_scenes=500,
    )  # fmt: skip
    scenes = load_scenes(settings, cache_dir=cache)
    x, counts = map(torch.from_numpy, scenes.test[:2])
    air = AIR(
        num_steps=2, x_size=32, channels=3, window_size=14, z_what_size=10, scale_prior_mean=2.0,
        scale_prior_sd=0.5, decoder_output_bias=-3.0, guide_input="difference", likelihood_sd=0.5,
        use_baselines=False,
    )  # fmt: skip
    recipe = TrainingSettings(
        num_steps=150, eval_every=0, batch_size=32, learning_rate=2e-3, clip_grad_norm=100.0,
        z_pres_prior=0.99, z_pres_prior_raw=True, anneal_prior="exp", anneal_prior_to=1e-4,
        anneal_prior_duration=200,
    )  # fmt: skip
    trainer = Trainer(air, torch.from_numpy(scenes.train.x), HeldOut(x, counts), recipe)
    *_, last = (event for event in trainer.train() if isinstance(event, Evaluated))
    assert last.result.counts is not None
    assert last.result.counts.accuracy_mode >= 0.8
    assert last.result.elbo > empty_canvas_elbo(air, x) + 80


@pytest.mark.slow
@pytest.mark.usefixtures("_fast")
def test_dark_digits_on_gradients_are_learnt(cache: Path) -> None:
    settings = SceneSettings(
        x_size=32, sides=(12, 16), counts=(0, 1), background="gradient",
        background_levels=(160, 255), object_levels=(0, 0), num_scenes=5000, num_test_scenes=1000,
    )  # fmt: skip
    scenes = load_scenes(settings, cache_dir=cache)
    x, counts = map(torch.from_numpy, scenes.test[:2])
    recipe = TrainingSettings(
        num_steps=400, eval_every=0, learning_rate=4e-3, z_pres_prior=0.99, z_pres_prior_raw=True,
        anneal_prior="exp", anneal_prior_to=1e-4, anneal_prior_duration=150, background_steps=20,
    )  # fmt: skip
    torch.manual_seed(0)
    air = AIR(
        num_steps=2, x_size=32, window_size=16, z_what_size=10, rnn_hidden_size=64,
        encoder_net=[64], decoder_net=[64], predict_net=[64], use_baselines=False,
        scale_prior_mean=2.2, background_model="vae", background_net=[64],
    )  # fmt: skip
    trainer = Trainer(air, torch.from_numpy(scenes.train.x), HeldOut(x, counts), recipe)
    *_, last = (event for event in trainer.train() if isinstance(event, Evaluated))
    assert last.result.counts is not None
    assert last.result.counts.accuracy_mode >= 0.7


@pytest.mark.slow
@pytest.mark.usefixtures("_fast")
def test_glimpses_find_up_to_four_sprites(cache: Path) -> None:
    settings = SceneSettings(
        recipe="dsprites", x_size=36, sides=(8, 9), counts=(0, 1, 2, 3, 4), min_gap=1.0,
        num_scenes=2000, num_test_scenes=300,
    )  # fmt: skip
    scenes = load_scenes(settings, cache_dir=cache)
    x, counts = map(torch.from_numpy, scenes.test[:2])
    air = AIR(
        num_steps=5, x_size=36, channels=3, window_size=10, z_what_size=10, rnn_hidden_size=64,
        encoder_net=[64], decoder_net=[64], predict_net=[64], scale_prior_mean=3.2,
        scale_prior_sd=0.5, guide_input="glimpse", likelihood_sd=0.5, use_baselines=False,
    )  # fmt: skip
    recipe = TrainingSettings(
        num_steps=80, eval_every=0, batch_size=32, learning_rate=3e-3, clip_grad_norm=100.0,
        z_pres_prior=0.99, z_pres_prior_raw=True, anneal_prior="exp", anneal_prior_to=1e-4,
        anneal_prior_duration=50,
    )  # fmt: skip
    trainer = Trainer(air, torch.from_numpy(scenes.train.x), HeldOut(x, counts), recipe)
    *_, last = (event for event in trainer.train() if isinstance(event, Evaluated))
    assert last.result.counts is not None
    assert last.result.counts.accuracy_mode >= 0.9
