"""The model of the background: what covers what, what is learnt, what is shown."""

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import SMALL, count_on, run, small_air
from PIL import Image
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from torch import Tensor, nn
from torch.nn.functional import interpolate

from air.background import Background
from air.detect import detect, draw
from air.evaluation.elbo import sample_elbo
from air.evaluation.metrics import HeldOut, evaluate
from air.inference import infer, sample_prior
from air.likelihoods import make_likelihood
from air.marginal import MarginalAIR
from air.support.model_settings import ModelSettings
from air.training import Trainer, TrainingSettings
from air.training.events import CheckpointDue, Progress
from air.visualization.dashboard import draw_page
from air.visualization.drawing import enlarge, sheets
from air.visualization.snapshots import as_bytes, load_snapshot, save_snapshot, take_snapshot

KINDS = [("constant", 1), ("constant", 3), ("vae", 1), ("vae", 3)]


def scenes(number: int, channels: int) -> Tensor:
    return torch.rand(number, channels, 12, 12).squeeze(1)


@pytest.mark.parametrize("side", [20, 64, 75])
def test_levels_are_interpolated_as_pytorch_does(side: int) -> None:
    background = Background(ModelSettings(x_size=side, background_model="vae", channels=3), nn.ReLU)
    assert background.grid <= 32
    levels = torch.rand(2, 3, background.grid, background.grid)
    background.decode = nn.Identity()
    painted = background.paint(levels)
    expected = interpolate(levels, (side, side), mode="bilinear", align_corners=False)
    torch.testing.assert_close(painted, expected)


@pytest.mark.parametrize("name", ["normal", "bernoulli"])
@pytest.mark.parametrize("channels", [1, 3])
def test_objects_cover_what_is_behind_them(name: Any, channels: int) -> None:  # noqa: ANN401
    """Against a loop over pixels in NumPy; the last object lies in front."""
    likelihood = make_likelihood(name, 0.3, covers=True)
    background, opacity = scenes(4, channels), torch.rand(3, 4, 1, 12, 12)
    opacity[0, :, :, :5], opacity[1, :, :, 5:] = 0, 1
    colours = torch.rand(3, 4, channels, 12, 12)
    present = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]).float()
    painted = torch.cat((colours * opacity, opacity), 2)
    canvas = likelihood.compose(painted, present, background)
    expected = background.reshape(4, channels, 12, 12).numpy().copy()
    for t in range(3):
        for scene in np.flatnonzero(present[t]):
            for row, column in np.ndindex(12, 12):
                a = float(opacity[t, scene, 0, row, column])
                before = expected[scene, :, row, column]
                ink = colours[t, scene, :, row, column].numpy()
                expected[scene, :, row, column] = (1 - a) * before + a * ink
    np.testing.assert_allclose(canvas.view(4, channels, 12, 12), expected, atol=1e-6)
    assert torch.equal(canvas[3], background[3])


@pytest.mark.parametrize(("kind", "channels"), KINDS)
def test_backgrounds_have_the_shape_of_images(kind: Any, channels: int) -> None:  # noqa: ANN401
    air = small_air(background_model=kind, channels=channels, z_background_size=4)
    assert air.background is not None
    assert air.background.z_size == (channels if kind == "constant" else 4)
    painted = air.background.paint(5 * torch.randn(6, air.background.z_size))
    assert painted.shape == scenes(6, channels).shape
    assert 0 <= painted.min() < painted.max() <= 1
    is_flat = (painted == painted[..., :1, :1]).all()
    assert is_flat == (kind == "constant")


@pytest.mark.parametrize(("kind", "channels"), KINDS)
@pytest.mark.parametrize("estimator", ["marginal", "score"])
def test_every_parameter_has_a_gradient(kind: str, channels: int, estimator: str) -> None:
    air = small_air(background_model=kind, channels=channels)
    program = MarginalAIR(air) if estimator == "marginal" else air
    TraceGraph_ELBO().loss_and_grads(program.model, program.guide, scenes(40, channels))
    for name, parameter in air.named_parameters():
        if estimator == "marginal" and name.startswith("bl_"):
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_scenes_of_the_prior_show_backgrounds() -> None:
    air = small_air(background_model="vae")
    count_none = [1.0, 1e-30, 1e-30, 1e-30]
    canvases, _, counts = sample_prior(air, 50, 1, count_none)
    assert not counts.any()
    assert canvases.std(0).min() > 0, "every pixel differs between scenes"
    trace: Any = poutine.trace(air.prior).get_trace(5, [0.0, 0.0, 0.0].__getitem__)
    assert air.background is not None
    expected = air.background.paint(trace.nodes["z_background"]["value"])
    assert torch.equal(trace.nodes["_RETURN"]["value"][1], expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_those_of_the_latents(channels: int) -> None:
    air, images = small_air(background_model="vae", channels=channels), scenes(9, channels)
    found = infer(air, images)
    assert air.background is not None
    mean, _ = air.background.encode(images.flatten(1))
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


@pytest.mark.parametrize(
    "options", [{}, {"guide_input": "difference"}, {"likelihood": "bernoulli"}]
)
def test_the_terms_of_the_elbo_add_up_to_pyros(options: dict[str, Any]) -> None:
    air, images = small_air(background_model="vae", **options), scenes(10, 1)
    torch.manual_seed(2)
    terms = sample_elbo(air, images)
    torch.manual_seed(2)
    expected = -Trace_ELBO().loss(air.model, air.guide, images)
    assert terms.elbo.sum().item() == pytest.approx(expected, rel=1e-5)
    assert (terms.kl_background != 0).all()
    found = evaluate(air, HeldOut(images), seed=2)
    assert found.kl_background == pytest.approx(terms.kl_background.mean().item(), rel=1e-4)
    without = small_air(**options)
    assert evaluate(without, HeldOut(images)).kl_background is None
    assert (sample_elbo(without, images).kl_background == 0).all()


def test_objects_are_pasted_on_the_background_of_another_scene() -> None:
    """Opaque squares: the sum is one scene with the squares of the other in front."""
    air = small_air(background_model="constant", channels=3)
    images = torch.rand(2, 3, 12, 12)
    painted = torch.zeros(2, 2, 4, 12, 12)  # two objects in each image
    painted[0, :, 3, 1:4, 1:4] = painted[1, 1, 3, 6:9, 6:9] = 1
    present = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    alone = air.likelihood.cut_out(images, painted, present)
    expected = images[0].clone()
    expected[:, 1:4, 1:4] = images[1, :, 1:4, 1:4]
    expected[:, 6:9, 6:9] = images[1, :, 6:9, 6:9]
    torch.testing.assert_close(air.likelihood.add(images[:1], alone[1:])[0], expected)
    assert not air.likelihood.fits(images[:1], alone[:1], alone[1:]).any()  # one is hidden
    apart = alone[:1].roll(5, 3)
    assert air.likelihood.fits(images[:1], alone[:1], apart).all()


def test_scenes_with_backgrounds_teach_counting_and_are_refined(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    line = f"{SMALL} --num-test-scenes 4 --background-model vae --refine --output-dir run"
    done = run(line, tmp_path, environment)
    assert done.returncode == 0, done.stderr
    assert "With refined latents" in done.stdout
    air, images = small_air(background_model="vae"), scenes(16, 1)
    before = air.predict.mlp.seq[0].weight.clone()
    settings = TrainingSettings(
        num_steps=3, batch_size=8, added_scenes=5, added_scenes_from=1, background_steps=0
    )
    for _ in Trainer(air, images, HeldOut(images), settings).train():
        pass
    assert not torch.equal(before, air.predict.mlp.seq[0].weight)


def test_a_snapshot_and_its_sheets_show_the_background(tmp_path: Path) -> None:
    air, images = small_air(background_model="vae"), scenes(9, 1)
    save_snapshot(tmp_path, take_snapshot(air, HeldOut(images), 3, seed=0))
    snapshot = load_snapshot(tmp_path / "00000003.npz")
    expected = as_bytes(infer(air, images).backgrounds)
    assert snapshot.scenes.backgrounds is not None
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
    air, images = small_air(background_model="vae"), scenes(9, 1)
    records = [{"step": 3, "kl_what": 5.0}, {"step": 6, "kl_what": 4.0, "kl_background": 2.0}]
    for number, shown in enumerate((["z_what"], ["z_what", "z_background"]), start=1):
        client = mock.Mock()
        snapshot = take_snapshot(air, HeldOut(images), 3, seed=0)
        draw_page(client, records[:number], snapshot, {})
        drawn = {call.kwargs["win"]: call for call in client.method_calls}
        assert "backgrounds" in drawn
        assert drawn["kl"].kwargs["opts"]["legend"] == shown


def test_detect_draws_reconstructions_below_the_images(tmp_path: Path) -> None:
    air = small_air(background_model="constant", channels=3)
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


@pytest.mark.parametrize("options", [{}, {"channels": 3}, {"likelihood": "bernoulli"}])
def test_the_background_alone_has_the_elbo_of_a_scene_without_objects(
    options: dict[str, Any],
) -> None:
    """So the first phase of training, with zero objects, has a second computation."""
    air = small_air(background_model="vae", **options).double()
    images = air.likelihood.prepare(scenes(30, air.channels).double())
    air.num_steps = 0
    program = air
    trace: Any = poutine.trace(program.guide).get_trace(images, batch_size=10)
    replayed = poutine.replay(program.model, trace)
    ours = TraceGraph_ELBO().loss_and_grads(
        replayed, poutine.replay(program.guide, trace), images, batch_size=10
    )
    gradients = {name: p.grad for name, p in air.named_parameters()}
    air.zero_grad()

    assert air.background is not None
    drawn = images[trace.nodes["data"]["value"]]
    z = trace.nodes["z_background"]["value"]
    q = torch.distributions.Normal(*air.background.encode(drawn.flatten(1)))
    noise = ((z - q.mean) / q.stddev).detach()
    z = q.mean + q.stddev * noise
    canvas = air.background.decode(z).view_as(drawn)
    elbo = air.likelihood.distribution(canvas).log_prob(drawn).flatten(1).sum(1)
    elbo = elbo + (torch.distributions.Normal(0, 1).log_prob(z) - q.log_prob(z)).sum(1)
    (-3 * elbo.sum()).backward()
    assert ours == pytest.approx(-3 * elbo.sum().item())
    for name, parameter in air.named_parameters():
        if name.startswith("background"):
            torch.testing.assert_close(gradients[name], parameter.grad, msg=name)
        else:
            assert gradients[name] is None, name


@pytest.mark.parametrize("estimator", ["marginal", "score"])
def test_the_first_steps_train_the_background_and_nothing_else(estimator: Any) -> None:  # noqa: ANN401
    images, sizes = scenes(40, 1), {"num_steps": 7, "batch_size": 8, "progress_every": 1}

    def trainer() -> Trainer:
        torch.manual_seed(0)
        air = small_air(background_model="constant")
        settings = TrainingSettings(
            **sizes, estimator=estimator, background_steps=4, save_every=3, eval_every=0
        )
        return Trainer(air, images, HeldOut(images), settings)

    whole, saved = trainer(), {}
    before = {name: p.clone() for name, p in whole.air.named_parameters()}
    for event in whole.train():
        if isinstance(event, CheckpointDue) and event.step == 3:
            saved = copy.deepcopy(whole.state_dict())
        if isinstance(event, Progress):
            now = dict(whole.air.named_parameters())
            changed = {name for name in now if not torch.equal(now[name], before[name])}
            of_background = {n for n in now if n.startswith("background.")}
            assert of_background <= changed
            assert (changed == of_background) == (event.step <= 4)
    resumed = trainer()
    resumed.load_state_dict(saved)
    for _ in resumed.train():
        pass
    for one, other in zip(whole.air.parameters(), resumed.air.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_frozen_background_stays_as_it_is() -> None:
    air, images = small_air(background_model="vae"), scenes(20, 1)
    assert air.background is not None
    air.background.requires_grad_(False)
    settings = TrainingSettings(num_steps=3, batch_size=8, background_steps=2, eval_every=0)
    before = copy.deepcopy(air.state_dict())
    for _ in Trainer(air, images, HeldOut(images), settings).train():
        pass
    for name, value in air.state_dict().items():
        if name.startswith("background."):
            assert torch.equal(value, before[name])
    assert not torch.equal(air.decode.mlp.seq[-1].bias, before["decode.mlp.seq.2.bias"])


def test_some_steps_must_be_left_for_the_objects() -> None:
    air, images = small_air(background_model="vae"), scenes(20, 1)
    with pytest.raises(ValueError, match="background_steps: expected fewer than the 9 steps"):
        Trainer(air, images, HeldOut(images), TrainingSettings(num_steps=9, background_steps=9))
    Trainer(small_air(), images, HeldOut(images), TrainingSettings(num_steps=9))
