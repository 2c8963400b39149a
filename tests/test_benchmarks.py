"""The scripts under tests/benchmarks, on scenes and nets too small for their figures to matter.

By default only their help, and what they compute without a run; the rest by ``-m benchmark``.
"""

import contextlib
import io
import json
import os
import runpy
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import programs
import pyro
import pytest
import torch
from helpers import loss_and_gradients, small_air
from PIL import Image

from air import AIR
from air.data.scenes import Scenes
from air.marginal import MarginalAIR
from air.solids.renderer import Renderer
from air.storage.checkpoint import save_weights
from tests.benchmarks import finite_differences
from tests.benchmarks.plain_torch import LOSSES

pytestmark = pytest.mark.slow
in_full = pytest.mark.benchmark

BENCHMARKS = Path(__file__).parent / "benchmarks"
TINY = (
    "--no-survey --num-scenes 20 --num-test-scenes 12 --rnn-hidden-size 16 --encoder-latent-size 5 "
    "--encoder-net 12 --decoder-net 12 --predict-net 8 --bl-predict-net 8"
)


def start(script: str, line: str, folder: Path) -> tuple[object, str, str]:
    """Runs a script in this process; returns its exit code, output and errors."""
    said, complained, code = io.StringIO(), io.StringIO(), None
    with (
        contextlib.chdir(folder),
        mock.patch.object(sys, "argv", [script, *line.split()]),
        mock.patch.object(sys, "path", [*sys.path]),
        mock.patch.dict(os.environ),
        programs.draw_no_figures(),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(complained),
    ):
        try:
            runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        except SystemExit as ended:
            code = ended.code
    return code, said.getvalue(), complained.getvalue()


def run(script: str, line: str, folder: Path) -> str:
    """The output of a script, which must succeed."""
    code, said, complained = start(script, line, folder)
    assert not code, (code, complained)
    return said


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIR_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "script", [path.name for path in BENCHMARKS.glob("*.py") if "argparse" in path.read_text()]
)
def test_every_script_shows_its_help(script: str, tmp_path: Path) -> None:
    code, said, complained = start(script, "--help", tmp_path)
    assert (code, complained) == (0, "")
    assert said.startswith(f"usage: {script}")


@in_full
def test_table_counts_every_seed_and_runs_none_twice(tmp_path: Path) -> None:
    flags = f"-n 2 -b 4 --iwae-samples 2 {TINY}"
    line = f"--out out --seeds 2 --estimators marginal -- {flags}"
    whole, taken = tmp_path / "out" / "marginal-seed0", tmp_path / "out" / "marginal-seed1"
    taken.mkdir(parents=True)
    (taken / "mine.txt").write_text("no place for a run")
    code, said, complained = start("seeds.py", line, tmp_path)
    assert code == 1
    assert f"not done: {taken.relative_to(tmp_path)}" in complained
    header, _, ours, *published = said.splitlines()
    assert cells(ours)[:2] == ["marginal", "2, of which 1 ended in an error"]
    assert cells(ours)[3:5] == ["an error", "0 of 2"]
    assert len(cells(header)) == len(cells(ours)) == 12
    assert all(len(cells(row)) == 12 for row in published if row)

    (taken / "mine.txt").unlink()
    (whole / "evaluation.json").unlink()  # as if it had been stopped before it
    header, _, ours, *_ = run("seeds.py", line, tmp_path).splitlines()
    assert cells(ours)[:2] == ["marginal", "2"]
    assert json.loads((whole / "config.json").read_text())["resume"] is not None  # it went on
    written = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.glob("out/*/*.*"))
    assert run("seeds.py", line, tmp_path).splitlines()[2] == ours
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.glob("out/*/*.*")) == written
    code, _, _ = start("seeds.py", line.replace("-n 2", "-n 3"), tmp_path)
    assert "was begun with num_steps 2, not 3" in str(code)


@in_full
def test_gradient_variance_of_every_part_of_a_loaded_model(tmp_path: Path) -> None:
    air = AIR(
        rnn_hidden_size=16, z_what_size=5, encoder_net=[12], decoder_net=[12], predict_net=[8],
        bl_predict_net=[8],
    )  # fmt: skip
    with torch.no_grad():
        air.decode.mlp.seq[-1].bias.fill_(-40.0)  # which paints nothing, and passes no gradient
    save_weights(air, tmp_path / "weights.pt")
    line = f"--load {tmp_path}/weights.pt --draws 3 --batch-size 4 -- {TINY}"
    rows = {
        cells(row)[0]: cells(row)[1:]
        for row in run("gradient_variance.py", line, tmp_path).splitlines()[2:]
    }
    assert list(rows) == ["initial states", "decode", "rnn", "predict", "encode"]
    assert float(rows["decode"][0]) == 0
    assert float(rows["predict"][0]) > 0


@pytest.mark.parametrize("estimator", ["marginal", "score"])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_the_floor_has_the_gradients_of_the_pyro_program(estimator: str, num_steps: int) -> None:
    air = small_air(num_steps=num_steps, use_baselines=estimator == "score").double()
    images = torch.rand(6, 12, 12).double()
    program = MarginalAIR(air) if estimator == "marginal" else air
    pyro.set_rng_seed(2)
    with pyro.validation_enabled(False):
        _, expected = loss_and_gradients(program, images)
    pyro.set_rng_seed(2)
    presence = torch.tensor(air.default_presence).double()
    LOSSES[estimator](air, images, presence).backward()
    found = {name: 6 * p.grad for name, p in air.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-7, msg=name)


@in_full
def test_forms_of_a_step_take_turns(tmp_path: Path) -> None:
    line = "--forms eager --estimators marginal --batch-sizes 4 --model-steps 1 --turns 1 --steps 1"
    _, _, plain, eager = run("bench_step.py", line, tmp_path).splitlines()
    assert cells(plain)[:3] == ["4", "1", "plain, score"]
    assert cells(eager)[:3] == ["4", "1", "eager, marginal"]
    assert float(cells(plain)[3]) > 0
    assert float(cells(eager)[4]) == pytest.approx(
        float(cells(plain)[3]) / float(cells(eager)[3]), rel=0.1, abs=0.1
    )


@in_full
def test_generalisation_counts_every_run_and_draws(tmp_path: Path) -> None:
    line = (
        "--out out --seeds 1 --estimators marginal --guides difference -- -n 2 -b 4 "
        f"--iwae-samples 2 {TINY}"
    )
    for name, accuracy in (("", 0.75), ("-other", 0.5)):  # done before
        done = tmp_path / "out" / f"012-difference-marginal-seed0{name}"
        done.mkdir(parents=True)
        (done / "evaluation.json").write_text("{}")
        (done / "metrics.jsonl").write_text(json.dumps({"accuracy_mode": accuracy}) + "\n")
    header, _, *table = run("generalisation.py", line, tmp_path).splitlines()
    assert len(table) == 2  # experiments
    assert cells(table[0])[4:] == ["75.0%", "50.0%", "50.0%"]
    for row in table:
        digits, guide, estimator, seeds, seen, other, each = cells(row)
        assert (guide, estimator, seeds) == ("DAIR", "marginal", "1")
        assert seen.endswith("%")
        assert other.endswith("%")
        assert each == other
        assert digits.startswith("0, 1, ")
    assert len(cells(header)) == 7
    with Image.open(tmp_path / "out" / "figure.png") as figure:
        assert figure.width > 1000
    config = json.loads((tmp_path / "out/013-difference-marginal-seed0/config.json").read_text())
    assert (config["counts"], config["guide"], config["seed"]) == ([0, 1, 3], "difference", 0)
    evaluated = tmp_path / "out/013-difference-marginal-seed0-other/metrics.jsonl"
    confusion = json.loads(evaluated.read_text().splitlines()[-1])["confusion"]
    assert [sum(row) for row in confusion] == [0, 0, 12]


@in_full
def test_scaling_of_two_ranks_and_a_model_of_many(tmp_path: Path) -> None:
    line = "--ranks 2 --batch-sizes 4 --steps 10 --device cpu --latency 0 --node-bandwidth 1e9"
    rows = [cells(row) for row in run("bench_scaling.py", line, tmp_path).splitlines() if row]
    one, two, eight, many = (rows[k] for k in (2, 3, 6, 7))
    assert [one[:2], two[:2], eight[:2], many[:2]] == [
        ["1", "4"], ["2", "4"], ["8", "4"], ["64", "4"],
    ]  # fmt: skip
    assert one[4] == "1.00"
    assert float(two[6]) > 0
    parameters = sum(
        p.numel() for name, p in AIR().named_parameters() if not name.startswith("bl_")
    )
    assert float(one[5]) == pytest.approx(4 * parameters / 1e6, abs=0.1)
    assert eight[4] == "100%"


@in_full
def test_downstream_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_weights(AIR(), tmp_path / "weights.pt")
    line = "--load weights.pt --labels 30 60 --test-scenes 20 --updates 2"
    _, _, *table = run("downstream.py", line, tmp_path).splitlines()
    assert [cells(row)[:2] for row in table] == [
        [task, labels] for task in ("sum", "ascending", "digit") for labels in ("30", "60")
    ]
    assert all(cell.endswith("%") for row in table for cell in cells(row)[2:])


def test_tasks_are_of_the_digits_from_left_to_right() -> None:
    from tests.benchmarks import downstream  # here, for scikit-learn takes a second to import

    x = np.zeros((2, 50, 50), np.uint8)
    boxes = np.array([[[30, 0, 40, 9], [5, 0, 15, 9]], [[5, 0, 15, 9], [30, 0, 40, 9]]], np.float32)
    scenes = Scenes(x, np.array([2, 2]), None, np.array([[3, 7], [3, 7]]), boxes)
    task = downstream.make_task(AIR(), scenes)
    assert task.targets["sum"].tolist() == [10, 10]
    assert task.targets["ascending"].tolist() == [0, 1]
    assert task.latents.shape == (2, 2 * 54)


def test_finite_differences_are_the_gradients_of_the_renderer() -> None:
    renderer = Renderer(32).double()
    size = (1 + 0.1 * torch.randn(20).double()).requires_grad_()
    place = (torch.rand(20, 2).double() - 0.5).requires_grad_()
    angle = (6.3 * torch.rand(20, 2).double()).requires_grad_()
    weights = torch.randn(20, 3, 4, renderer.patch**2).double()
    found = []
    with mock.patch.object(finite_differences, "STEP", 1e-5):
        for draw in (finite_differences.draw, finite_differences.draw_black_box):
            turns = torch.stack((angle.cos(), angle.sin()), -1)
            total = (weights * draw(renderer, size, place, turns)[0]).sum()
            found.append(torch.autograd.grad(total, (size, place, angle)))
    for exact, ours in zip(*found, strict=True):
        off = (exact - ours).abs() / exact.abs().mean()
        assert off.median() < 1e-4  # at a kink of the picture, a difference is that of both sides
