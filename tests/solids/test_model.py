"""AIR with a renderer: kinds summed out, depth, geometry of the guide, and a short run."""

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.poutine as poutine
import pytest
import torch
from torch import Tensor

from air import AIR, detect
from air.data.synthetic.solids import SolidsGenerator, draw_scenes
from air.evaluation import HeldOut, evaluate
from air.evaluation.solids import score_solids
from air.inference import infer
from air.main import main
from air.marginal import MarginalAIR
from air.solids.model import Z_WHAT_SIZE, Solids, SolidsAIR, from_ground, to_ground
from air.solids.world import KINDS
from air.storage.run_folder import RunFolder
from air.support.model_settings import ModelSettings

SIDE = 20


def settings(**changes: Any) -> ModelSettings:  # noqa: ANN401
    about: dict[str, Any] = {
        "num_steps": 3, "x_size": SIDE, "channels": 3, "window_size": 8, "rnn_hidden_size": 16,
        "z_what_size": Z_WHAT_SIZE, "guide_input": "glimpse", "scale_prior_mean": 1.0,
        "scale_prior_sd": 0.15, "likelihood_sd": 0.3, "renderer": "solids",
    }  # fmt: skip
    return ModelSettings(**about | changes)


def make_air(**changes: Any) -> SolidsAIR:  # noqa: ANN401
    pyro.set_rng_seed(0)
    air = AIR.from_settings(settings(**changes)).double()
    assert isinstance(air, SolidsAIR)
    return air


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.from_numpy(draw_scenes(5, (3,), SIDE, 0).x)


def with_kind(z_what: Tensor, kind: int) -> Tensor:
    """The code with a kind that is certain."""
    z_what = z_what.clone()
    z_what[:, : len(KINDS)] = torch.nn.functional.one_hot(torch.tensor(kind), 3) * 1e3
    return z_what


def test_kinds_are_summed_out_exactly(images: Tensor) -> None:
    """The expectation equals the sum over all 3^3 combinations, each painted with certain kinds."""
    air, x = make_air(), images.double() / 255
    # All three within 0.4 of each other, so that they hide one another.
    where = [torch.randn(5, 3).double() * 0.2 + torch.tensor([1.0, 0, 0]) for _ in range(3)]
    what = [torch.randn(5, Z_WHAT_SIZE).double() * 0.3 for _ in range(3)]
    ones, black = torch.ones(3, 5).double(), torch.zeros_like(x)
    canvas = air.likelihood.compose(air.paint(where, what), ones, black)
    probs = [air.solids(w, z).log_probs.exp() for w, z in zip(where, what, strict=True)]
    expected, picture = torch.zeros(5).double(), torch.zeros_like(x)
    for kinds in product(range(3), repeat=3):
        certain = [with_kind(z, kind) for z, kind in zip(what, kinds, strict=True)]
        one = air.likelihood.compose(air.paint(where, certain), ones, black)
        weight = math.prod(p[:, kind] for p, kind in zip(probs, kinds, strict=True))
        expected = expected + weight * air.likelihood.log_prob(x, one)
        picture = picture + weight[:, None, None, None] * air.likelihood.show(one)
    torch.testing.assert_close(air.likelihood.log_prob(x, canvas), expected)
    torch.testing.assert_close(air.likelihood.show(canvas), picture)
    of_site = air.likelihood.distribution(canvas).log_prob(x.flatten(1))
    torch.testing.assert_close(of_site, expected)


def test_nearer_solids_hide_farther_ones_in_any_order() -> None:
    air = make_air(num_steps=2)
    near = torch.tensor([[1.0, 0.0, -0.3]]).double()
    far = torch.tensor([[1.0, 0.05, 0.3]]).double()
    cube, ball = (with_kind(torch.ones(1, Z_WHAT_SIZE).double(), k) for k in (0, 1))
    black = torch.zeros(1, 3, SIDE, SIDE).double()

    def shown(where: list[Tensor], what: list[Tensor]) -> Tensor:
        ones = torch.ones(len(where), 1).double()
        return air.likelihood.show(air.likelihood.compose(air.paint(where, what), ones, black))

    both = shown([near, far], [cube, ball])
    assert torch.equal(both, shown([far, near], [ball, cube]))
    alone = shown([near], [cube])
    solid = (alone - air.likelihood.show(black)).abs().amax(1)[0] > 0.25
    assert solid.sum() > 10
    assert (both - alone)[0, :, solid].abs().max() < 0.15  # the cube hides the ball


def test_absent_solids_leave_the_ground() -> None:
    air = make_air()
    where, what = [torch.ones(2, 3).double()] * 3, [torch.ones(2, Z_WHAT_SIZE).double()] * 3
    canvas = air.likelihood.compose(air.paint(where, what), torch.zeros(3, 2).double())
    ground = air.likelihood.show(torch.zeros(2, 3, SIDE, SIDE).double())
    torch.testing.assert_close(air.likelihood.show(canvas), ground)


def test_another_ground_is_painted_looked_past_and_saved(images: Tensor) -> None:
    air, loaded, x = make_air(), make_air(), images.double() / 255
    of_ours = infer(air, x)
    air.decode.ground.add_(0.05)
    loaded.load_state_dict(air.state_dict())
    found = infer(loaded, x + 0.05)
    torch.testing.assert_close(found.count_probs, of_ours.count_probs)
    torch.testing.assert_close(found.backgrounds, air.decode.ground.expand_as(x))
    state = air.state_dict()
    assert [name for name in state if name.endswith("ground")] == ["decode.ground"]
    del state["decode.ground"]  # as in files of earlier programs, whose ground was that of scenes
    other = make_air()
    other.load_state_dict(state)
    torch.testing.assert_close(other.decode.ground, make_air().decode.ground)


def test_places_are_uniform_under_the_prior() -> None:
    place = to_ground(torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0)).double())
    assert place.abs().max() < 0.9
    quarters = torch.quantile(place, torch.tensor([0.25, 0.5, 0.75]).double(), dim=0)
    torch.testing.assert_close(
        quarters[:, 0], torch.tensor([-0.45, 0, 0.45]).double(), atol=0.02, rtol=0
    )
    torch.testing.assert_close(to_ground(from_ground(place)), place.clamp(-0.891, 0.891))


def test_a_window_shows_its_solid() -> None:
    """The window at the true latents holds all pixels that the solid changes."""
    generator = SolidsGenerator(32, np.random.default_rng(1))
    air = make_air(x_size=32)
    for _ in range(10):
        ((kind, pose),) = generator.draw_solids(1)
        _, (mask,) = generator.draw([(kind, pose)])
        size, place = torch.tensor(pose[:1]), from_ground(torch.tensor(pose[1:3]))
        scale, *shift = air.window(torch.cat((size, place))[None])[0].tolist()
        rows, columns = np.nonzero(mask)
        for pixels, move in ((columns, shift[0]), (rows, shift[1])):
            assert np.abs(scale * ((2 * pixels + 1) / 32 - 1) + move).max() < 1


@pytest.mark.parametrize("num_steps", [1, 2])
def test_score_and_marginal_estimators_agree(num_steps: int, images: Tensor) -> None:
    """The mean of AIR's own ELBO over samples is that of the exact expectation over the count."""
    air = make_air(num_steps=num_steps, z_pres_bias=1.0)
    means, many = [], images.repeat_interleave(150, 0)
    for program in (air, MarginalAIR(air)):
        with torch.no_grad():
            guide: Any = poutine.trace(program.guide).get_trace(many)
            replayed = poutine.replay(program.model, trace=guide)
            model: Any = poutine.trace(replayed).get_trace(many)
        elbo: Any = 0
        for trace, sign in ((model, 1), (guide, -1)):
            trace.compute_log_prob()
            sites = [site for site in trace.nodes.values() if site["type"] == "sample"]
            elbo = elbo + sign * sum(site["log_prob"] for site in sites)
        values = elbo.double().view(len(images), 150).sum(0)
        means.append((values.mean(), values.std() / math.sqrt(len(values))))
    (one, se), (other, other_se) = means
    assert abs(one - other) < 4 * math.hypot(se, other_se)


def test_scores_match_solids_by_place() -> None:
    place = torch.tensor([[[0.5, 0.0], [-0.5, 0.1], [0.0, 0.0]]])
    kinds = torch.tensor([[[0.0, -9, -9], [-9, -9, 0.0], [0, 0, 0]]])
    angles = torch.tensor([[[math.pi / 2 + 0.1, 0], [0, -0.2], [0, 0]]])
    solids = Solids(kinds, torch.tensor([[1.1, 0.9, 1.0]]), place, angles)
    poses = torch.tensor([[[1.0, -0.5, 0.0, 2 * math.pi - 0.3], [1.0, 0.5, 0.0, 0.0]]])
    scores = score_solids(
        solids, torch.tensor([2]), torch.tensor([[2, 0]]), poses, torch.tensor([2])
    )
    assert scores.kind_accuracy == 1
    assert scores.place_error == pytest.approx(0.05)
    assert scores.size_error == pytest.approx(0.1)
    assert scores.angle_error == pytest.approx(math.degrees(0.1), abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 1}, "channels: expected 3 for solids, got 1"),
        ({"guide_input": "image"}, "guide_input: expected glimpse"),
        ({"background_model": "pca"}, "background_model: expected none"),
        ({"z_what_size": 50}, "z_what_size: expected 7"),
        ({"decoder_net": [10]}, r"decoder_net: expected \(200,\)"),
        ({"pos_prior_sd": 2.0}, "pos_prior_sd: expected 1.0"),
    ],
)
def test_refuses_what_does_not_suit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AIR.from_settings(settings(**changes))


def test_refuses_refinement_and_an_own_decoder(images: Tensor) -> None:
    with pytest.raises(ValueError, match="refine: expected windows"):
        infer(make_air(), images, refine=True)
    with pytest.raises(ValueError, match="decode: "):
        AIR.from_settings(settings(), lambda s: {"decode": torch.nn.Linear(7, 3 * 64)})
    with pytest.raises(ValueError, match="renderer: expected none"):
        AIR(renderer="solids")


@pytest.mark.slow
def test_learns_kinds_and_places_and_tells_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A minute's recipe in small: a run by the command line, its evaluation and its detections."""
    run = tmp_path / "run"
    words = "--recipe solids --num-scenes 600 --num-test-scenes 100 -n 60 --eval-every 60"
    assert main([*words.split(), "--output-dir", str(run)]) == 0
    assert "renderer = solids" in capsys.readouterr().out
    lines = RunFolder(run).read_metrics()
    final = next(line for line in reversed(lines) if "kind_accuracy" in line)
    assert final["kind_accuracy"] > 0.9
    assert final["place_error"] < 0.15
    scenes = draw_scenes(20, (1,), 32, 7)
    np.save(tmp_path / "x.npy", scenes.x)
    words = ["--load", str(run / "checkpoint.pt"), str(tmp_path / "x.npy")]
    assert detect.main(words) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    solids = [each["objects"][0]["solid"] for each in found if each["objects"]]
    assert len(solids) > 15
    true = [KINDS[int(label)] for label in scenes.labels[:, 0]]
    right = [s["kind"] == kind for s, kind in zip(solids, true, strict=True)]
    assert sum(right) > 15
    assert all(("angle" in s) == (s["kind"] != "sphere") for s in solids)
    air = detect.load_air(run / "checkpoint.pt")
    held_out = HeldOut(scenes.x, scenes.counts, labels=scenes.labels, poses=scenes.solid_poses)
    scored = evaluate(air, held_out).solids
    assert scored.kind_accuracy == pytest.approx(sum(right) / 20)
    foreign = held_out._replace(labels=scenes.labels + 7)  # digits, perhaps
    assert evaluate(air, foreign).solids is None
    for flag in ("--tile=32", "--crop"):
        with pytest.raises(SystemExit) as ended:
            detect.main([*words, flag])
        assert ended.value.code == 2
    np.save(tmp_path / "wide.npy", np.pad(scenes.x, [(0, 0), (0, 0), (0, 0), (8, 8)]))
    assert detect.main([*words[:2], str(tmp_path / "wide.npy"), "--no-crop"]) == 0
    assert "pictures that are not square are padded" in caplog.text
    line = f"--recipe solids --num-scenes 20 --num-test-scenes 5 -n 0 --output-dir {tmp_path}/empty"
    assert main(line.split()) == 0
    config = json.loads((tmp_path / "empty" / "config.json").read_text())
    assert config["renderer"] == "solids"
