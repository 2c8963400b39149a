"""The model of the background: what covers what, what is learnt, what is shown."""

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import count_on, small_air
from PIL import Image
from pyro import poutine
from torch import Tensor
from torch.nn.functional import interpolate

from air.background import Background
from air.detect import detect, draw
from air.evaluation.metrics import HeldOut
from air.inference import infer, sample_prior
from air.support.model_settings import ModelSettings
from air.training import Trainer, TrainingSettings
from air.visualization.dashboard import draw_page
from air.visualization.drawing import enlarge, sheets
from air.visualization.snapshots import as_bytes, load_snapshot, save_snapshot, take_snapshot


def scenes(number: int, channels: int) -> Tensor:
    return torch.rand(number, channels, 12, 12).squeeze(1)


def ramps(number: int, channels: int, side: int = 48) -> Tensor:
    """Images with a random level and random slopes, [N, (C,) side, side], in [0.1, 0.9]."""
    place = (torch.arange(side) + 0.5) / side - 0.5
    level, down, across = torch.rand(3, number, channels, 1, 1)
    slopes = (down - 0.5) * place[:, None] + (across - 0.5) * place
    return (0.3 + 0.4 * level + 0.4 * slopes).squeeze(1)


def squares(number: int, side: int = 48) -> Tensor:
    """Pixels of one square in each image, which covers at most a quarter, bool [N, side, side]."""
    sizes = torch.randint(5, side // 2 + 1, (number, 1, 1))
    first = (torch.rand(2, number, 1, 1) * (side - sizes + 1)).long()
    rows, columns = torch.arange(side)[:, None] - first[0], torch.arange(side) - first[1]
    return (rows >= 0) & (rows < sizes) & (columns >= 0) & (columns < sizes)


def posterior(background: Background, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of q(z_background | image)."""
    trace: Any = poutine.trace(background.guide).get_trace(images)
    code = trace.nodes["z_background"]["fn"]
    return code.mean, code.variance.sqrt()


def make_background(**settings: Any) -> Background:  # noqa: ANN401
    return Background(ModelSettings(background_model="pca", **settings))


@pytest.mark.parametrize("side", [20, 50, 64])
def test_levels_are_interpolated_as_pytorch_does(side: int) -> None:
    background = make_background(x_size=side, channels=3)
    assert background.grid <= 16
    levels = torch.rand(2, 3, background.grid, background.grid)
    background.mean.zero_()
    background.components = torch.eye(levels[0].numel())
    painted = background.paint(levels.flatten(1))
    expected = interpolate(levels, (side, side), mode="bilinear", align_corners=False)
    torch.testing.assert_close(painted, expected)


@pytest.mark.parametrize(("channels", "most"), [(1, 32), (3, 2)])
def test_components_are_those_of_numpys_svd(channels: int, most: int) -> None:
    """Of pixels, since so small an image has as many cells."""
    background = make_background(x_size=12, channels=channels, z_background_size=most)
    codes, axes = torch.randn(60, 3), torch.randn(3, channels * 12 * 12)
    x = (0.5 + 0.1 * codes @ axes + 0.001 * torch.randn(60, channels * 12 * 12)).numpy()
    images = torch.from_numpy(x).view(60, channels, 12, 12).squeeze(1)
    background.fit(images, torch.zeros(60, 12, 12, dtype=torch.bool))
    _, sizes, found = np.linalg.svd(x - x.mean(0), full_matrices=False)
    k = min(most, 3)
    variances = np.pad(sizes[:k] ** 2 / 60, (0, most - k))
    np.testing.assert_allclose(background.mean, x.mean(0), atol=1e-5)
    w = background.components.numpy()
    assert not w[k:].any(), "the noise has a component"
    np.testing.assert_allclose(w @ w.T, np.diag(variances), atol=1e-4)
    np.testing.assert_allclose(w.T @ w, found[:k].T * variances[:k] @ found[:k], atol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_background_is_found_behind_what_covers_it(channels: int) -> None:
    background = make_background(x_size=48, channels=channels, likelihood_sd=0.1)
    covered, truth = squares(500), ramps(500, channels)
    images = truth * ~(covered if channels == 1 else covered[:, None])
    background.fit(images[:200], covered[:200])
    painted = background.paint(posterior(background, images[200:])[0])
    farthest = (painted - truth[200:]).abs().flatten(1).amax(1)
    assert farthest.quantile(0.95) < 0.02


def test_rare_backgrounds_far_from_the_mean_are_found() -> None:
    background = make_background(x_size=48)
    covered, truth = squares(300), torch.full((300, 48, 48), 0.1)
    truth[::20] = 0.9
    images = truth * ~covered
    background.fit(images, covered)
    painted = background.paint(posterior(background, images)[0])
    assert (painted - truth).abs().flatten(1).amax(1).quantile(0.95) < 0.05


@pytest.mark.parametrize(("side", "channels", "atol"), [(12, 1, 0.002), (24, 3, 0.05)])
def test_without_outliers_the_guide_is_the_exact_posterior(
    side: int, channels: int, atol: float
) -> None:
    """Given all pixels. The guide's, given cells of 2 x 2 pixels, is that up to their edges."""
    background = make_background(x_size=side, channels=channels, likelihood_sd=0.05).double()
    images = ramps(100, channels, side).double()
    background.fit(images, torch.zeros(100, side, side, dtype=torch.bool))
    origin, *axes = background.paint(torch.eye(33).double()[:, 1:] / 10).flatten(1)
    w = 10 * (torch.stack(axes) - origin)
    off = (images + 0.001 * torch.randn_like(images)).flatten(1) - origin
    covariance = torch.linalg.inv(w @ w.T / 0.05**2 + torch.eye(32))
    loc, sd = posterior(background, (off + origin).view_as(images))
    torch.testing.assert_close(loc, off @ w.T / 0.05**2 @ covariance, atol=atol, rtol=0)
    torch.testing.assert_close(sd[0], covariance.diagonal().sqrt(), atol=0, rtol=0.01)


@pytest.mark.parametrize("channels", [1, 3])
def test_backgrounds_are_planes_until_they_are_fitted(channels: int) -> None:
    air, images = small_air(background_model="pca", channels=channels), ramps(9, channels, 12)
    found = infer(air, images).backgrounds
    torch.testing.assert_close(found, images, atol=0.03, rtol=0)
    painted = air.background.paint(9 * torch.randn(6, air.background.z_size))
    assert 0 <= painted.min() < painted.max() <= 1


def test_a_trainer_fits_a_background_once() -> None:
    """To what is not an object; a background that was loaded is fitted already."""
    images = torch.where(squares(60, 24), 1.0, 0.3)
    air, loaded = (small_air(background_model="pca", x_size=24) for _ in range(2))
    trained = Trainer(air, images, HeldOut(images), TrainingSettings(num_steps=2, batch_size=8))
    assert air.background.fitted
    fitted = copy.deepcopy(air.background.state_dict())
    assert (fitted["mean"] - 0.3).abs().max() < 0.01
    list(trained.train())
    loaded.load_state_dict(air.state_dict())
    Trainer(loaded, 1 - images, HeldOut(images), TrainingSettings(num_steps=2))
    for name, value in fitted.items():
        assert torch.equal(air.state_dict()[f"background.{name}"], value)
        assert torch.equal(loaded.state_dict()[f"background.{name}"], value)


def test_scenes_of_the_prior_show_backgrounds() -> None:
    air = small_air(background_model="pca")
    count_none = [1.0, 1e-30, 1e-30, 1e-30]
    canvases, _, counts = sample_prior(air, 50, 1, count_none)
    assert not counts.any()
    assert canvases.std(0).min() > 0, "every pixel differs between scenes"
    trace: Any = poutine.trace(air.prior).get_trace(5, [0.0, 0.0, 0.0].__getitem__)
    expected = air.background.paint(trace.nodes["z_background"]["value"])
    assert torch.equal(trace.nodes["_RETURN"]["value"][1], expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_those_of_the_latents(channels: int) -> None:
    air, images = small_air(background_model="pca", channels=channels), scenes(9, channels)
    found = infer(air, images)
    mean, _ = posterior(air.background, images)
    assert torch.equal(found.backgrounds, air.background.paint(mean))
    for scene in range(9):
        canvas = found.backgrounds[scene]
        for t in range(3):
            (painted,) = air.paint([found.z_where[scene : scene + 1, t]],
                                   [found.z_what[scene : scene + 1, t]])  # fmt: skip
            colours, opacity = painted[0, :-1], painted[0, -1]
            alone = found.backgrounds[scene] * (1 - opacity) + colours.view_as(canvas)
            torch.testing.assert_close(found.objects[scene, t], alone)
            change = (alone - found.backgrounds[scene]).abs().view(channels, 12, 12)
            torch.testing.assert_close(found.changes[scene, t], change.amax(0))
            if t < found.counts[scene]:
                canvas = canvas * (1 - opacity) + colours.view_as(canvas)
        torch.testing.assert_close(found.reconstructions[scene], canvas)


def test_objects_are_pasted_on_the_background_of_another_scene() -> None:
    """Opaque squares: the sum is one scene with the squares of the other in front."""
    air = small_air(background_model="pca", channels=3)
    images = torch.rand(2, 3, 12, 12)
    painted = torch.zeros(2, 2, 4, 12, 12)  # two objects in each image
    painted[0, :, 3, 1:4, 1:4] = painted[1, 1, 3, 6:9, 6:9] = 1
    present = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    alone = air.likelihood.cut_out(images, painted, present)
    expected = images[0].clone()
    expected[:, 1:4, 1:4] = images[1, :, 1:4, 1:4]
    expected[:, 6:9, 6:9] = images[1, :, 6:9, 6:9]
    torch.testing.assert_close(air.likelihood.add(images[:1], alone[1:])[0], expected)
    assert not air.likelihood.fits(alone[:1], alone[1:]).any()  # one is hidden
    apart = alone[:1].roll(5, 3)
    assert air.likelihood.fits(alone[:1], apart).all()


def test_scenes_with_backgrounds_teach_counting() -> None:
    air, images = small_air(background_model="pca"), scenes(16, 1)
    before = air.predict.mlp.seq[0].weight.clone()
    settings = TrainingSettings(num_steps=3, batch_size=8, added_scenes=5, added_scenes_from=1)
    for _ in Trainer(air, images, HeldOut(images), settings).train():
        pass
    assert not torch.equal(before, air.predict.mlp.seq[0].weight)


def test_a_snapshot_and_its_sheets_show_the_background(tmp_path: Path) -> None:
    air, images = small_air(background_model="pca"), scenes(9, 1)
    save_snapshot(tmp_path, take_snapshot(air, HeldOut(images), 3, seed=0))
    snapshot = load_snapshot(tmp_path / "00000003.npz")
    expected = as_bytes(infer(air, images).backgrounds)
    np.testing.assert_array_equal(snapshot.scenes.backgrounds, expected)
    found = sheets(snapshot, 9, 2)
    width = 2 * 12
    np.testing.assert_array_equal(found["backgrounds"][:width, :width], enlarge(expected, 2)[0])
    behind = found["objects"][-width:, width + 4 : 2 * width + 4]  # the second column
    np.testing.assert_array_equal(behind, enlarge(expected, 2)[7])
    black = take_snapshot(small_air(), HeldOut(images), 3, seed=0)
    assert black.scenes.backgrounds is None
    assert "backgrounds" not in sheets(black, 9, 2)
    steps_of_three = 2 * 3 + 2
    assert found["objects"].shape[1] == (steps_of_three + 1) * (width + 4) - 4


def test_the_live_page_shows_the_background_and_its_kl() -> None:
    air, images = small_air(background_model="pca"), scenes(9, 1)
    records = [{"step": 3, "kl_what": 5.0}, {"step": 6, "kl_what": 4.0, "kl_background": 2.0}]
    for number, shown in enumerate((["z_what"], ["z_what", "z_background"]), start=1):
        client = mock.Mock()
        snapshot = take_snapshot(air, HeldOut(images), 3, seed=0)
        draw_page(client, records[:number], snapshot, {})
        drawn = {call.kwargs["win"]: call for call in client.method_calls}
        assert "backgrounds" in drawn
        assert drawn["kl"].kwargs["opts"]["legend"] == shown


def test_detect_draws_reconstructions_below_the_images(tmp_path: Path) -> None:
    air = small_air(background_model="pca", channels=3)
    count_on(air, 1, 0.0)
    images = (255 * scenes(11, 3)).byte().numpy()
    draw(air, images, detect(air, images), tmp_path / "found.png")
    with Image.open(tmp_path / "found.png") as picture:
        pixels = np.asarray(picture)
    zoom = 200 // 12
    side = 12 * zoom
    assert len(pixels) == 4 * (side + 4) - 4, "two rows of images, two below"
    behind = as_bytes(infer(air, images).reconstructions)
    for index, (row, column) in {2: (1, 2), 9: (3, 1)}.items():
        middle = row * (side + 4) + side // 2, column * (side + 4) + side // 2
        assert pixels[middle].tolist() == behind[index, :, 6, 6].tolist()
