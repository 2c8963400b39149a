"""The program as its users run it: from flags to files and exit codes."""

import contextlib
import json
import logging
import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyro
import pytest
import torch
from helpers import (
    NAMES,
    PANES,
    SCENES,
    SMALL,
    Run,
    capture_only,
    panes,
    run,
    visdom_server,
    write_pictures,
    write_scenes,
)  # fmt: skip

from air import viz
from air.evaluation.metrics import evaluate
from air.priors import presence_from_counts
from air.storage.run_folder import RunFolder
from main import build_parser

TUTORIAL = (  # with few steps, and few scenes
    f"{SCENES} -n 3 -blr 0.1 --z-pres-prior 0.01 --scale-prior-sd 0.2 --predict-net 200 "
    "--bl-predict-net 200 --decoder-output-use-sigmoid --decoder-output-bias -2 --seed 287710"
)
# Every flag occurs in one of these; test_every_flag_is_run holds them to it.
LINES = [
    TUTORIAL,
    f"{SMALL} --output-dir run --eval-every 2 --save-every 3 --save out.pt -v",
    f"{SMALL} -n 0 --load weights.pt --evaluate --refine --iwae-samples 3 --num-test-scenes 8 "
    "--device cpu -lr 1e-3 --lr-schedule cosine --clip-grad-norm 5 --estimator score "
    "--baseline-scalar 2",
    f"{SMALL} -t 1 --estimator score --no-baselines --no-masking --embed-net 20 10 "
    "--embed-channels 4 --non-linearity Tanh --jit",
    f"{SMALL} -t 1 --estimator marginal --window-size 20 --no-decoder-output-use-sigmoid "
    "--likelihood-sd 0.4 --compile --objective iwae --particles 2",
    f"{SMALL} --added-scenes 9 --z-pres-prior 0.9 --z-pres-prior-raw "
    "--anneal-prior exp --anneal-prior-to 1e-3 "
    "--anneal-prior-begin 1 --anneal-prior-duration 1e6 --no-viz --no-refine --scale-prior-mean 2 "
    "--scale-prior-sd 0.3 --pos-prior-mean 0.1 --pos-prior-sd 0.9 --counts 0 1 --x-size 40 "
    "--data-seed 3 --digits embedded --recipe air",
    "--data mine.npz -n 2 -b 8 --no-compile --no-suggest --survey",
    "--data pictures --no-survey -n 2 -b 8 --x-size 40 --no-crop --no-invert --alpha-over white "
    "--count-pattern (\\d+)-objects --threads 1",
    "--data mine.npz -n 2 -b 8 --x-size 40 --crop --channels 3 --invert",
    f"--recipe dsprites {SMALL} --background noisy --min-gap 0 --guide glimpse "
    "--background-model pca --likelihood bernoulli --count-prior 1 1 1 0.1 --anneal-prior none "
    "--learn-count-prior-from 1 --refine --num-test-scenes 8",
    f"{SMALL} --sides 9 18 --masking --baselines --no-z-pres-prior-raw --no-verbose --no-evaluate",
    f"{SMALL} --estimator score --num-steps=1 --no-baseline",  # as in Pyro's own test suite
]
# Run by tests of their own, with a server, an earlier run, a GPU or full MNIST.
ELSEWHERE = {
    "--viz", "--viz-every", "--visdom-env", "--visdom-server", "--resume", "--cuda", "--mnist-dir",
    "--help", "--help-all", "--suggest",
}  # fmt: skip


def test_every_flag_is_run() -> None:
    given = {word for line in LINES for word in line.split()} | ELSEWHERE
    for action in build_parser()._actions:
        options = set(action.option_strings)
        assert options & given, f"{'/'.join(options)} is in no line"
    on_off = {s for a in build_parser()._actions for s in a.option_strings if s.startswith("--no-")}
    assert on_off <= given


def process_state() -> tuple[Any, ...]:
    """What a program that is called as a function must leave as it was."""
    drawn = pyro.util.get_rng_state()
    return (
        (drawn["torch"].tolist(), drawn["random"], drawn["numpy"][1].tolist()),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        pyro.infer.is_validation_enabled(),
        [*logging.getLogger().handlers],
        [*warnings.filters],
        sys.stdout.errors,
        os.getcwd(),
    )


@pytest.mark.parametrize(
    "line", [*LINES[-2:], *(pytest.param(line, marks=pytest.mark.slow) for line in LINES[:-2])]
)
def test_lines_end_well(line: str, tmp_path: Path, succeeds: Run) -> None:
    if "--data" in line.split():
        write_scenes(tmp_path / "mine.npz")
        write_pictures(tmp_path / "pictures")
    if "--load" in line:
        succeeds(f"{SMALL} -n 1 --output-dir first --save weights.pt")
    options: dict[str, Any] = {"compiler": capture_only}  # Inductor takes a minute
    before = process_state()
    if "--data " in line or "dsprites" in line:  # without counts, in colour, with a background
        options["dpi"] = 50
    done = succeeds(line, **options)
    assert process_state() == before
    assert "held-out scenes: ELBO" in done.stdout
    assert "Traceback" not in done.stderr
    if "--evaluate" in line:
        (written,) = tmp_path.glob("runs/*/evaluation.json")
        found = json.loads(written.read_text())
        assert math.isfinite(found["bound"])
        assert found["bound_se"] > 0
    if "--refine" in line:
        (written,) = tmp_path.glob("runs/*/refined.json")
        found = json.loads(written.read_text())
        assert found["seconds_per_scene"] > 0
        assert f"count accuracy {found['accuracy_mode']:.1%} by mode." in done.stdout
    assert "Warning" not in done.stderr


@pytest.mark.slow
def test_a_run_leaves_what_the_readme_says(
    tmp_path: Path, succeeds: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(viz, "DPI", 50)  # which takes a fraction of the time
    line = f"{SMALL} --eval-every 2 --output-dir out --save-every 2"
    succeeds(line, dpi=viz.DPI)
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    assert config["batch_size"] == 8
    assert set(config["versions"]) == {"python", "torch", "pyro-ppl", "numpy"}
    assert re.fullmatch("[0-9a-f]{64}", config["data_sha256"])
    lines = RunFolder(out).read_metrics()
    assert [line["step"] for line in lines if "elbo" in line] == [2, 4]
    evaluations = [line for line in lines if "eval_elbo" in line]
    assert [line["step"] for line in evaluations] == [2, 4]
    assert evaluations[-1]["eval_scenes"] == 40
    assert np.array(evaluations[-1]["confusion"]).sum() == 40
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["step"] == 4
    drawn = {path.name: path.read_bytes() for path in (out / "figures").iterdir()}
    assert set(drawn) == {f"{name}.png" for name in NAMES}
    assert {path.name for path in (out / "snapshots").iterdir()} == {
        f"{step:08}.npz" for step in (0, 2, 4)
    }
    for path in (out / "figures").iterdir():
        path.unlink()
    viz.main([str(out)])  # draws them again from the folder alone
    assert {path.name: path.read_bytes() for path in (out / "figures").iterdir()} == drawn
    assert {path.name for path in out.iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoint.pt", "figures", "snapshots",
    }  # fmt: skip


@pytest.mark.slow
def test_resume_refuses_what_would_be_another_run(
    tmp_path: Path, succeeds: Run, refused: Callable[[str], str]
) -> None:
    succeeds(f"{SMALL} --output-dir run")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    (tmp_path / "precious.pt").write_text("precious")
    for line, message in [
        ("--resume run -b 9", "--batch-size: --resume keeps the settings of the run, which has 8"),
        ("--resume run --counts 1", "which has [0, 1, 2]"),
        ("--resume run -n 2", "--num-steps: expected at least the 4 steps already taken, got 2"),
        ("--resume nothing", "nothing is not a run folder"),
        ("--resume run --save precious.pt", "--save never overwrites, and precious.pt exists"),
    ]:
        assert message in refused(line)
    with contextlib.closing(RunFolder.open(tmp_path / "run")):
        assert "run is in use by another process" in refused("--resume run")
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    folder = RunFolder(tmp_path / "run")
    succeeds("--resume run -n 6")
    once = folder.read_metrics()
    assert [line["step"] for line in once if "elbo" in line] == [2, 4, 6]
    succeeds("--resume run")
    assert folder.read_metrics() == once  # nothing was left to do, and nothing is said twice


@pytest.mark.slow
def test_a_run_with_an_annealed_prior_goes_on_and_is_loaded(tmp_path: Path, succeeds: Run) -> None:
    tiny = SMALL.replace("-n 4", "-n 2")
    scenes = "--x-size 64 --sides 9 18"
    model = (
        f"{scenes} --guide glimpse --z-pres-prior 0.99 --z-pres-prior-raw --anneal-prior exp "
        "--anneal-prior-to 1e-4 --anneal-prior-duration 1000"
    )
    learn = "--learn-count-prior-from 1"
    for line in (
        f"{model} {tiny} --output-dir run",
        "--resume run -n 4",
        f"{scenes} {SMALL} {learn} --load run/checkpoint.pt --output-dir second",
        f"{scenes} -n 0 --load second/checkpoint.pt --output-dir third {SCENES} --evaluate "
        "--iwae-samples 2",
    ):  # fmt: skip
        assert not succeeds(line).stderr
    assert RunFolder(tmp_path / "run").read_metrics()[-1]["step"] == 4
    config = json.loads((tmp_path / "third" / "config.json").read_text())
    assert (config["guide"], config["x_size"], config["rnn_hidden_size"]) == ("glimpse", 64, 16)
    learnt = torch.load(tmp_path / "second" / "checkpoint.pt", weights_only=True)["learnt_prior"]
    assert learnt is None  # a hundred steps are not over
    expected = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["presence"]
    assert presence_from_counts(config["count_prior"]) == pytest.approx(expected)


@pytest.mark.slow
def test_a_loaded_model_is_evaluated_as_it_was_trained_on_all_of_a_file(
    tmp_path: Path, succeeds: Run, refused: Callable[[str], str]
) -> None:
    write_scenes(tmp_path / "mine.npz")
    with np.load(tmp_path / "mine.npz") as file:
        number = len(file["x"])
    line = f"{SMALL} -n 1 --likelihood-sd 0.2 --scale-prior-sd 0.3 --output-dir first"
    succeeds(line)
    load = "--load first/checkpoint.pt -n 0 --data mine.npz --evaluate --iwae-samples 2"
    succeeds(f"{load} --output-dir second")
    settings = json.loads((tmp_path / "second" / "config.json").read_text())
    assert (settings["likelihood_sd"], settings["scale_prior_sd"]) == (0.2, 0.3)
    found = json.loads((tmp_path / "second" / "evaluation.json").read_text())
    assert found["eval_scenes"] == number
    for flags, message in [
        ("--scale-prior-sd 0.5", "z_where_scale_prior is"),
        ("--rnn-hidden-size 20", "do not fit these settings"),
        ("--counts 0 1", "--counts applies only to generated scenes and cannot be combined with"),
    ]:
        assert message in refused(f"{load} {flags} --output-dir third")
        assert not (tmp_path / "third").exists()


def test_wrong_input_ends_in_one_line_with_exit_code_2(
    tmp_path: Path, refused: Callable[[str], str]
) -> None:
    write_scenes(tmp_path / "mine.npz")
    (tmp_path / "text.npz").write_text("no scenes")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("precious")
    for line, message in [
        ("--learning-rate 0", "argument -lr/--learning-rate: expected a number above 0"),
        ("--device toaster", "--device"),
        ("--data missing.npz", "missing.npz"),
        ("--data mine.npz --crop", "--crop: expected --x-size too"),
        ("--data mine.npz --x-size 90 --crop", "too small to crop to 90 x 90"),
        ("--data mine.npz --channels 5", "has 1 channels, expected 5"),
        ("--data mine.npz --count-pattern x", "expected a regular expression with one group"),
        ("--invert", "--invert applies only to images of --data, which is missing"),
        ("--data mine.txt", "mine.txt"),
        ("--data text.npz", "text.npz"),
        ("--load missing.pt --data mine.npz", "there is no file missing.pt"),
        ("--load mine.npz --data mine.npz", "mine.npz"),
        ("--save mine.npz --data mine.npz", "--save never overwrites, and mine.npz exists"),
        ("--output-dir taken --data mine.npz", "--output-dir: expected a new or empty folder"),
        ("--save nowhere/w.pt --data mine.npz", "there is no folder nowhere to write w.pt into"),
        ("--no-masking --data mine.npz", "--estimator score"),
        ("--viz --visdom-server http://127.0.0.1:1 --data mine.npz", "no visdom server answers at"),
        ("--digits mnist --mnist-dir nowhere", "nowhere"),
    ]:
        assert message in refused(line), line
        assert not (tmp_path / "runs").exists()
    assert (tmp_path / "taken" / "mine.txt").read_text() == "precious"


@pytest.mark.slow
def test_an_evaluation_that_a_signal_ended_failing_figures_and_a_foreign_checkpoint(
    tmp_path: Path,
    environment: dict[str, str],
    succeeds: Run,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One run lives through all of them: it loses no evaluation, and names no files."""

    def evaluate_and_be_told_to_stop(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("air.training.trainer.evaluate", evaluate_and_be_told_to_stop)
        line = f"{SMALL} --output-dir run --evaluate --iwae-samples 2"
        done = run(line, tmp_path, environment)
    assert done.returncode == 143
    assert "saved at step 4 of 4" in done.stdout
    assert not (tmp_path / "run" / "evaluation.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]

    with mock.patch.object(viz, "draw_run", side_effect=OSError("no such font")):
        succeeds("--resume run --evaluate", dpi=viz.DPI)
    assert (tmp_path / "run" / "evaluation.json").exists()
    assert "could not be drawn: no such font; try: python viz.py run" in caplog.text

    (tmp_path / "victim.pt").write_text("precious")
    path = tmp_path / "run" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["config"] |= {"save": "victim.pt", "cache_dir": "elsewhere", "alarm_after": 0}
    state["config"] |= {"viz": True, "visdom_server": "http://127.0.0.1:1"}
    torch.save(state, path)
    done = succeeds("--resume run -n 5")
    assert not done.stderr
    assert (tmp_path / "victim.pt").read_text() == "precious"
    assert not (tmp_path / "elsewhere").exists()
    assert "\nWARNING: the ELBO" in done.stdout  # a collapse is told
    assert "another --seed" in done.stdout
    assert RunFolder(tmp_path / "run").read_metrics()[-1]["alarm"]


@pytest.mark.slow
def test_the_live_page_shows_the_run(tmp_path: Path, succeeds: Run) -> None:
    line = (
        f"{SMALL} -t 1 --counts 0 1 -n 20 --viz --viz-every 10 --eval-every 10 --save-every 0 "
        "--visdom-env live --output-dir run"
    )
    with visdom_server(tmp_path / "server") as (port, _):
        done = succeeds(f"{line} --visdom-server http://127.0.0.1:{port}")
        found = panes(port, "live")
    assert f"Live plots: http://127.0.0.1:{port}/env/live" in done.stdout
    assert set(found) == PANES
    traces = {trace["name"]: trace for trace in found["elbo"]["content"]["data"]}
    told = [each for each in RunFolder(tmp_path / "run").read_metrics() if "elbo" in each]
    assert traces["training"]["x"] == [each["step"] for each in told] == [*range(2, 21, 2)]
    assert traces["training"]["y"] == [each["elbo"] for each in told]
    assert list(filter(None, traces["held out"]["x"])) == [10, 20]
    assert "step 20" in found["inferred"]["title"]
