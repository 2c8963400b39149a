"""The scripts under tests/benchmarks, on scenes and nets too small for their figures to matter."""

import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch
from conftest import small_air
from pyro.infer import TraceGraph_ELBO

from air import AIR
from air.checkpoint import save_weights
from air.marginal import MarginalAIR
from tests.benchmarks.plain_torch import LOSSES

BENCHMARKS = Path(__file__).parent / "benchmarks"
TINY = (
    "--num-scenes 20 --num-test-scenes 12 --rnn-hidden-size 16 --encoder-latent-size 5 "
    "--encoder-net 12 --decoder-net 12 --predict-net 8 --bl-predict-net 8"
)


def run(script: str, line: str, folder: Path) -> str:
    """What a script prints; it must end well."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *line.split()],
        cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIR_CACHE", str(tmp_path / "cache"))


def test_table_counts_every_seed_and_runs_none_twice(tmp_path: Path) -> None:
    line = f"--out out --seeds 2 --estimators marginal -- -n 2 -b 4 --iwae-samples 2 {TINY}"
    header, _, ours, *published = run("seeds.py", line, tmp_path).splitlines()
    assert cells(ours)[:2] == ["marginal", "2"]
    assert len(cells(header)) == len(cells(ours)) == 11
    assert all(len(cells(row)) == 11 for row in published if row)
    written = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.glob("out/*/*.*"))
    assert run("seeds.py", line, tmp_path).splitlines()[2] == ours
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.glob("out/*/*.*")) == written


def test_a_seed_that_fails_stands_in_the_table(tmp_path: Path) -> None:
    command = f"--out out --seeds 2 --estimators marginal -- -n 1 -b 4 --iwae-samples 2 {TINY}"
    (tmp_path / "out" / "marginal-seed1").mkdir(parents=True)
    (tmp_path / "out" / "marginal-seed1" / "mine.txt").write_text("no place for a run")
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "seeds.py"), *command.split()],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    ours = cells(done.stdout.splitlines()[2])
    assert ours[:2] == ["marginal", "2, of which 1 ended in an error"]
    assert ours[3:5] == ["an error", "0 of 2"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "seeds.py"), *command.replace("-n 1", "-n 3").split()],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "was begun with num_steps 1, not 3" in done.stderr


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
        TraceGraph_ELBO().loss_and_grads(program.model, program.guide, images)
    expected = {name: p.grad.clone() for name, p in air.named_parameters() if p.grad is not None}
    air.zero_grad()
    pyro.set_rng_seed(2)
    presence = torch.tensor(air.default_presence).double()
    LOSSES[estimator](air, images, presence).backward()
    found = {name: 6 * p.grad for name, p in air.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-7, msg=name)


def test_forms_of_a_step_take_turns(tmp_path: Path) -> None:
    line = "--forms eager --estimators marginal --batch-sizes 4 --model-steps 1 --turns 1 --steps 1"
    _, _, plain, eager = run("bench_step.py", line, tmp_path).splitlines()
    assert cells(plain)[:3] == ["4", "1", "plain, score"]
    assert cells(eager)[:3] == ["4", "1", "eager, marginal"]
    assert float(cells(plain)[3]) > 0
    assert float(cells(eager)[4]) == pytest.approx(
        float(cells(plain)[3]) / float(cells(eager)[3]), rel=0.1, abs=0.1
    )
