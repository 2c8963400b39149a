"""The program as its users run it: from flags to files and exit codes."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    NAMES,
    ROOT,
    SCENES,
    SMALL,
    panes,
    run,
    visdom_server,
    write_pictures,
    write_scenes,
)  # fmt: skip

import viz
from air.evaluation.metrics import evaluate
from air.priors import continue_probs_from_counts
from air.storage.checkpoint import load_air
from air.visualization.visdom_panes import ORDER
from main import build_parser, main

TUTORIAL = (  # with few steps, and few scenes
    f"{SCENES} -n 3 -blr 0.1 --z-pres-prior 0.01 --scale-prior-sd 0.2 --predict-net 200 "
    "--bl-predict-net 200 --decoder-output-use-sigmoid --decoder-output-bias -2 --seed 287710"
)
# Every flag occurs in one of these; test_every_flag_is_run holds them to it.
LINES = [
    TUTORIAL,
    f"{SMALL} --output-dir run --eval-every 2 --eval-scenes 10 --save-every 3 --save out.pt -v",
    f"{SMALL} -n 0 --load weights.pt --evaluate --refine --iwae-samples 3 "
    "--iwae-scenes 30 --device cpu -lr 1e-3 --lr-schedule cosine --clip-grad-norm 5 "
    "--matmul-precision medium --estimator score --baseline-scalar 2 --restarts 1 "
    "--alarm-after 1e6",
    f"{SMALL} -t 1 --estimator score --no-baselines --no-masking --embed-net 20 10 "
    "--embed-channels 4 --non-linearity Tanh --compile",
    f"{SMALL} -t 5 --estimator marginal --window-size 20 --no-decoder-output-use-sigmoid "
    "--likelihood-sd learn --jit",
    f"{SMALL} --added-scenes 9 --added-scenes-from 1 --z-pres-prior 0.9 --z-pres-prior-raw "
    "--anneal-prior exp --anneal-prior-to 1e-3 "
    "--anneal-prior-begin 1 --anneal-prior-duration 1e6 --no-viz --no-refine --scale-prior-mean 2 "
    "--scale-prior-sd 0.3 --pos-prior-mean 0.1 --pos-prior-sd 0.9 --counts 0 1 --x-size 40 "
    "--scale-mean 1.5 --scale-sd 0.05 --min-gap 2 --data-seed 3 --digits embedded --recipe air "
    "--cache-dir cache",
    "--data mine.npz -n 2 -b 8 --no-compile --no-suggest",
    "--data pictures -n 2 -b 8 --x-size 40 --no-crop --no-invert --alpha-over white "
    "--count-pattern (\\d+)-objects --threads 2",
    "--data mine.npz -n 2 -b 8 --x-size 40 --crop --channels 3 --invert",
    f"--preset dsprites {SMALL} --no-binary --background noisy --guide glimpse "
    "--background-levels 20 90 --object-levels 100 255 --background-model vae "
    "--z-background-size 3 --background-net 20 --background-steps 1 "
    "--likelihood bernoulli --count-prior 1 1 1 0.1 --anneal-prior none --learn-count-prior-from 1",
    f"{SMALL} --sides 9 18 --rotation 20 --binary --masking --baselines --no-z-pres-prior-raw "
    "--no-verbose --no-evaluate --no-jit",
    f"{SMALL} --estimator score --no-baseline",
]
# Run by tests of their own, with a server, an earlier run, a GPU or full MNIST.
ELSEWHERE = {
    "--viz", "--viz-every", "--viz-log", "--visdom-env", "--visdom-server", "--visdom-port",
    "--resume", "--cuda", "--mnist-dir", "--help", "--suggest",
}  # fmt: skip


def metrics(run_folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def test_every_flag_is_run() -> None:
    given = {word for line in LINES for word in line.split()} | ELSEWHERE
    for action in build_parser()._actions:
        options = set(action.option_strings)
        assert options & given, f"{'/'.join(options)} is in no line"
    on_off = {s for a in build_parser()._actions for s in a.option_strings if s.startswith("--no-")}
    assert on_off <= given


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("line", LINES)
def test_lines_end_well(line: str, tmp_path: Path, environment: dict[str, str]) -> None:
    if "--data" in line.split():
        write_scenes(tmp_path / "mine.npz")
        write_pictures(tmp_path / "pictures")
    if "--load" in line:
        done = run(f"{SMALL} -n 1 --output-dir first --save weights.pt", tmp_path, environment)
        assert done.returncode == 0, done.stderr
    done = run(line, tmp_path, environment)
    assert done.returncode == 0, done.stderr
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


def test_a_run_leaves_what_the_readme_says(tmp_path: Path, environment: dict[str, str]) -> None:
    line = f"{SMALL} --eval-every 2 --output-dir out --save-every 2"
    done = run(line, tmp_path, environment, dpi=viz.DPI)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    assert config["batch_size"] == 8
    assert set(config["versions"]) == {"python", "torch", "pyro-ppl", "numpy"}
    assert re.fullmatch("[0-9a-f]{64}", config["data_sha256"])
    lines = metrics(out)
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
        "config.json", "metrics.jsonl", "checkpoint.pt", "checkpoint.previous.pt", "figures",
        "snapshots",
    }  # fmt: skip


@pytest.mark.slow
def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    line = f"{SMALL} -t 2 -n 60 --progress-every 1 --anneal-prior lin --anneal-prior-duration 100"
    assert run(f"{line} --output-dir whole", tmp_path, environment).returncode == 0
    name = "stopped"
    command = [sys.executable, str(ROOT / "main.py"), *line.split(), "--output-dir", name]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        log = tmp_path / name / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not log.exists() or len(log.read_text().splitlines()) < 3:
            assert time.monotonic() < deadline, "no step was taken"
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)  # SIGTERM: see test_faults
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert f"python {ROOT / 'main.py'} --resume {name}" in output
    assert torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["step"] < 60
    done = run(f"--resume {name}", tmp_path, environment)
    assert done.returncode == 0, done.stderr
    whole, resumed = (
        torch.load(tmp_path / folder / "checkpoint.pt", weights_only=True)
        for folder in ("whole", name)
    )
    for key, weight in whole["model"].items():
        assert torch.equal(weight, resumed["model"][key]), key
    expected, found = (
        [{k: v for k, v in line.items() if "second" not in k} for line in metrics(folder)]
        for folder in (tmp_path / "whole", tmp_path / name)
    )
    assert found == expected


def test_resume_refuses_what_would_be_another_run(
    tmp_path: Path, environment: dict[str, str], refused: Callable[[str], str]
) -> None:
    assert run(f"{SMALL} --output-dir run", tmp_path, environment).returncode == 0
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    (tmp_path / "precious.pt").write_text("precious")
    for line, message in [
        ("--resume run -b 9", "--resume keeps the settings of the run, where batch_size is 8"),
        ("--resume run --counts 1", "where counts is [0, 1, 2]"),
        ("--resume run -n 2", "--num-steps must be at least the 4"),
        ("--resume nothing", "nothing is no folder of a run"),
        ("--resume run --save precious.pt", "--save never overwrites, and precious.pt exists"),
    ]:
        assert message in refused(line)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    done = run("--resume run -n 6", tmp_path, environment)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics(tmp_path / "run") if "elbo" in line] == [2, 4, 6]
    once = metrics(tmp_path / "run")
    assert run("--resume run", tmp_path, environment).returncode == 0
    assert metrics(tmp_path / "run") == once  # nothing was left to do, and nothing is said twice


@pytest.mark.slow
def test_a_run_of_a_preset_goes_on_and_is_loaded(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    tiny = SMALL.replace("-n 4", "-n 2")
    learn = "--anneal-prior none --learn-count-prior-from 1"
    for line in (
        f"--preset small-digits --lr-schedule constant {tiny} --output-dir run",
        "--resume run -n 4",
        f"--preset small-digits {SMALL} {learn} --load run/checkpoint.pt --output-dir second",
        "--preset small-digits -n 0 --load second/checkpoint.pt --output-dir third "
        f"{SCENES} --evaluate --iwae-samples 2 --iwae-scenes 10",
    ):  # fmt: skip
        done = run(line, tmp_path, environment)
        assert (done.returncode, done.stderr) == (0, "")
    assert metrics(tmp_path / "run")[-1]["step"] == 4
    config = json.loads((tmp_path / "third" / "config.json").read_text())
    assert (config["guide"], config["x_size"], config["rnn_hidden_size"]) == ("glimpse", 64, 16)
    learnt = torch.load(tmp_path / "second" / "checkpoint.pt", weights_only=True)["learnt_prior"]
    assert learnt is None  # a hundred steps are not over
    expected = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["presence"]
    assert continue_probs_from_counts(config["count_prior"]) == pytest.approx(expected)


def test_a_loaded_model_is_evaluated_as_it_was_trained_on_all_of_a_file(
    tmp_path: Path, environment: dict[str, str], refused: Callable[[str], str]
) -> None:
    write_scenes(tmp_path / "mine.npz")
    with np.load(tmp_path / "mine.npz") as file:
        number = len(file["x"])
    line = f"{SMALL} -n 1 --likelihood-sd 0.2 --scale-prior-sd 0.3 --output-dir first"
    assert run(line, tmp_path, environment).returncode == 0
    load = "--load first/checkpoint.pt -n 0 --data mine.npz --evaluate --iwae-samples 2"
    done = run(f"{load} --output-dir second", tmp_path, environment)
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "second" / "config.json").read_text())
    assert (settings["likelihood_sd"], settings["scale_prior_sd"]) == (0.2, 0.3)
    found = json.loads((tmp_path / "second" / "evaluation.json").read_text())
    assert found["eval_scenes"] == number
    for flags, message in [
        ("--scale-prior-sd 0.5", "z_where_scale_prior is"),
        ("--rnn-hidden-size 20", "do not fit these settings"),
        ("--counts 0 1", "--counts is about scenes made here, but --data brings its own"),
    ]:
        assert message in refused(f"{load} {flags} --output-dir third")
        assert not (tmp_path / "third").exists()


def test_a_checkpoint_without_the_size_of_its_images_is_loaded(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    line = f"{SMALL} --preset dsprites --num-scenes 20 --num-test-scenes 5 --output-dir run"
    assert run(line, tmp_path, environment).returncode == 0
    path = tmp_path / "run" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    del state["config"]["channels"]  # an earlier program did not record it
    state["config"]["x_size"] = 50  # and of --data it recorded this default
    torch.save(state, path)
    air = load_air(path)
    assert (air.x_size, air.channels) == (64, 3)


def test_wrong_input_ends_in_one_line_with_exit_code_2(
    tmp_path: Path, refused: Callable[[str], str]
) -> None:
    write_scenes(tmp_path / "mine.npz")
    (tmp_path / "text.npz").write_text("no scenes")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("precious")
    for line, message in [
        ("--learning-rate 0", "argument -lr/--learning-rate: expected a number above 0"),
        ("--device cuda:77", "--device"),
        ("--device toaster", "--device"),
        ("--data missing.npz", "missing.npz"),
        ("--data mine.npz --crop", "--crop: expected --x-size too"),
        ("--data mine.npz --x-size 90 --crop", "too small to crop to 90 x 90"),
        ("--data mine.npz --channels 5", "x has 1 channels, expected 5"),
        ("--data mine.npz --count-pattern x", "expected a regular expression with one group"),
        ("--invert", "--invert is about images of one's own; name them by --data"),
        ("--data mine.txt", "mine.txt"),
        ("--data text.npz", "text.npz"),
        ("--load missing.pt --data mine.npz", "there is no file missing.pt"),
        ("--load mine.npz --data mine.npz", "mine.npz"),
        ("--save mine.npz --data mine.npz", "--save never overwrites, and mine.npz exists"),
        ("--output-dir taken --data mine.npz", "--output-dir must be a new or empty folder"),
        (
            "--save nowhere/w.pt --data mine.npz",
            "there is no folder nowhere to write w.pt into",
        ),
        ("--viz-log mine.npz --data mine.npz", "--viz-log never overwrites, and mine.npz exists"),
        ("--no-masking --data mine.npz", "--estimator score"),
        ("--counts 0 99", "--counts: expected a whole number of at least 0, at most 50"),
        ("--data-seed -1", "--data-seed: expected a whole number of at least 0"),
        ("--digits mnist --mnist-dir nowhere", "nowhere"),
    ]:
        assert message in refused(line), line
        assert not (tmp_path / "runs").exists()
    assert (tmp_path / "taken" / "mine.txt").read_text() == "precious"


@pytest.mark.slow
def test_a_collapsed_run_starts_over_from_the_next_seed(
    tmp_path: Path, environment: dict[str, str], refused: Callable[[str], str]
) -> None:
    line = f"{SMALL} --eval-every 2 --alarm-after 2 --restarts 2 --seed 7 --output-dir run"
    line += " --viz-log drawn"
    done = run(line, tmp_path, environment)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"Starting over with --seed (\d)", done.stdout) == ["8", "9"]
    assert "WARNING: the ELBO" in done.stdout
    assert metrics(tmp_path / "run")[-1]["alarm"]
    settings = json.loads((tmp_path / "run-seed9" / "config.json").read_text())
    assert (settings["seed"], settings["restarts"]) == (9, 0)
    assert metrics(tmp_path / "run-seed9")[-1]["step"] == 4
    assert (tmp_path / "run" / "snapshots" / "00000002.npz").exists()
    assert {path.stem for path in (tmp_path / "run" / "figures").iterdir()} == NAMES
    drawn = [json.loads(line) for line in (tmp_path / "drawn").read_text().splitlines()]
    environments = {message["eid"] for _, message in drawn if message.get("win") == "elbo"}
    assert environments == {"air_run", "air_run-seed8", "air_run-seed9"}
    # It would start over into run-seed8 again.
    assert "run-seed8 is not empty" in refused("--resume run")


@pytest.mark.slow
@pytest.mark.parametrize("collapses", [False, True])
def test_a_signal_during_an_evaluation_ends_the_run(
    collapses: bool,
    tmp_path: Path,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def evaluate_and_be_told_to_stop(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments, **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AIR_CACHE", environment["AIR_CACHE"])
    monkeypatch.setattr("air.training.trainer.evaluate", evaluate_and_be_told_to_stop)
    more = "--eval-every 2 --alarm-after 2 --restarts 3" if collapses else "--evaluate"
    assert main(f"{SMALL} --output-dir run {more}".split()) == 143
    assert f"saved at step {2 if collapses else 4} of 4" in capsys.readouterr().out
    assert not (tmp_path / "run" / "evaluation.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    monkeypatch.undo()
    if not collapses:  # goes on where it stopped
        assert run("--resume run --evaluate", tmp_path, environment).returncode == 0
        assert (tmp_path / "run" / "evaluation.json").exists()


def test_a_foreign_checkpoint_names_no_files_to_write(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    assert run(f"{SMALL} --output-dir run", tmp_path, environment).returncode == 0
    (tmp_path / "victim.pt").write_text("precious")
    path = tmp_path / "run" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["config"] |= {"save": "victim.pt", "viz_log": "victim.pt", "cache_dir": "elsewhere"}
    state["config"] |= {"viz": True, "visdom_server": "http://127.0.0.1", "visdom_port": 1}
    torch.save(state, path)
    done = run("--resume run -n 5", tmp_path, environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "victim.pt").read_text() == "precious"
    assert not (tmp_path / "elsewhere").exists()


def test_viz_without_a_server_ends_before_training(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    line = f"{SMALL} --viz --visdom-server http://127.0.0.1 --visdom-port 1"
    done = run(line, tmp_path, environment)
    assert done.returncode == 2
    assert "no visdom server answers at http://127.0.0.1:1" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_viz_on_a_server_that_dies_and_comes_back(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    line = (
        f"{SMALL} -t 1 --counts 0 1 -n 250 --estimator score --viz --viz-every 5 --eval-every 20 "
        "--save-every 0 --visdom-env live --eval-scenes 10 --viz-log session.log --output-dir run"
    )
    log = tmp_path / "run" / "metrics.jsonl"

    def wait_for_step(step: int) -> None:
        deadline = time.monotonic() + 120
        while not log.exists() or f'"step": {step},' not in log.read_text():
            assert time.monotonic() < deadline, f"step {step} was not reached"
            time.sleep(0.05)

    with visdom_server(tmp_path / "one") as (port, server):
        command = [sys.executable, str(ROOT / "main.py"), *line.split()]
        command += ["--visdom-server", "http://127.0.0.1", "--visdom-port", str(port)]
        with subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=-1, stderr=-1, text=True
        ) as process:
            wait_for_step(20)
            server.kill()
            server.wait()
            wait_for_step(60)
            with visdom_server(tmp_path / "two", port):
                output, complaints = process.communicate(timeout=120)
                found = panes(port, "live")
        assert process.returncode == 0, complaints
    assert f"Live plots: http://127.0.0.1:{port}/env/live" in output
    assert complaints.count("\n") == complaints.count("no live plots for now") == 1
    # No scene has two objects, and no model a background.
    assert set(found) == set(ORDER) - {"distance", "backgrounds"}
    traces = {trace["name"]: trace for trace in found["elbo"]["content"]["data"]}
    assert traces["training"]["x"] == list(range(2, 251, 2))
    assert traces["held out"]["x"] == [*range(20, 250, 20), 250]
    assert "step 250" in found["inferred"]["title"]
    told = [line["elbo"] for line in metrics(tmp_path / "run") if "elbo" in line]
    assert traces["training"]["y"] == told
    recorded = [json.loads(line) for line in (tmp_path / "session.log").read_text().splitlines()]
    assert len(recorded) > len(ORDER)


@pytest.mark.slow
def test_a_run_starts_over_though_its_server_is_gone(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    line = f"{SMALL} -n 60 --eval-every 40 --alarm-after 40 --restarts 1 --viz --output-dir run"
    with visdom_server(tmp_path / "one") as (port, server):
        command = [sys.executable, str(ROOT / "main.py"), *line.split()]
        with subprocess.Popen(
            [*command, "--visdom-port", str(port)], cwd=tmp_path, env=environment, stdout=-1,
            stderr=-1, text=True,
        ) as process:  # fmt: skip
            while not (tmp_path / "run" / "metrics.jsonl").exists():
                assert process.poll() is None
                time.sleep(0.05)
            server.kill()
            output, complaints = process.communicate(timeout=120)
    assert process.returncode == 0, complaints
    assert "Starting over with --seed 1" in output
    assert metrics(tmp_path / "run-seed1")[-1]["step"] == 60


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_its_curves(
    tmp_path: Path, environment: dict[str, str], refused: Callable[[str], str]
) -> None:
    with visdom_server(tmp_path / "server") as (port, _):
        line = f"{SMALL} -n 4 --viz --visdom-port {port} --output-dir run"
        for flags in (line, f"--resume run -n 8 --viz --visdom-port {port}"):
            done = run(flags, tmp_path, environment)
            assert (done.returncode, done.stderr) == (0, "")
        found = panes(port, "air_run")
    assert "no visdom server answers" in refused(f"--resume run -n 10 --viz --visdom-port {port}")
    traces = {trace["name"]: trace["x"] for trace in found["elbo"]["content"]["data"]}
    assert traces["training"] == [2, 4, 6, 8]


def test_visdom_is_not_imported_without_viz() -> None:
    code = "import sys, main; assert not {m for m in sys.modules if m.startswith('visdom')}"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True)
