"""Trains, converts and measures the models of ``air/pretrained``.

    python tests/benchmarks/pretrained.py            trains what has not been trained yet
    python tests/benchmarks/pretrained.py --check    do weights and code still fit?

The first command takes half an hour a model on one idle core of a CPU. It writes NAME.pt and
NAME.json, the card, for each model, and pictures of held-out scenes. The second one measures the
models again and compares with their cards; its exit code is 1 if a figure differs.
"""

import argparse
import contextlib
import io
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, this is not a package
from air.cli.flags import ProgramSettings
from air.data.synthetic.scene_settings import FolderSettings, SceneSettings
from air.main import main as air_main
from air.multi_mnist import load_scenes
from air.storage.checkpoint import read_state, write_state
from air.storage.pretrained import FOLDER, card
from air.storage.run_folder import versions
from air.support.fields import from_config, settings_of
from tests.benchmarks.seeds import check_flags, read_lines, train

PICTURES = 8  # held-out scenes to try a model on
MIN_HALVED = 1000  # numbers in a tensor from which it is stored in half precision
FIGURES = (
    "accuracy_mode",
    "box_f1",
    "eval_elbo",
    "bound",
)  # of the card, by key in evaluation.json
TOLERANCE = {"accuracy_mode": 0.1, "box_f1": 0.002, "eval_elbo": 1.0, "bound": 1.0}
MAX_LOST = 0.1  # points of accuracy that half precision may cost
EVALUATE = "--evaluate --iwae-samples 10"  # 100, the default, take 20 minutes for many digits
OTHER_SCENES = "--num-test-scenes 1000 --num-scenes 100"


class Model(NamedTuple):
    """A model to train."""

    use: str  # what it is for
    fails: str  # at what it fails
    flags: str  # of main.py
    others: tuple[str, ...]  # flags of other scenes, on which its accuracy is measured too


FEWER = "--num-scenes 30000 --num-test-scenes 5000"
MODELS = {
    "digits": Model(
        "0 to 2 handwritten digits, light on black, about 16 of 50 pixels long",
        "digits of other sizes, more than 2 digits, backgrounds that are not black",
        "",
        ("--counts 3", "--sides 10 12", "--sides 24 28", "--background gradient"),
    ),
    "many-digits": Model(
        "0 to 9 handwritten digits, light on black, about 11 of 84 pixels long",
        "digits of other sizes, digits that overlap much, backgrounds that are not black",
        f"--counts 0 1 2 3 4 5 6 7 8 9 --x-size 84 --sides 12 16 --min-gap 0 {FEWER}",
        ("--sides 9 11", "--sides 18 24 --counts 0 1 2 3 4 5", "--background gradient"),
    ),
    "sprites": Model(
        "0 to 4 coloured shapes of one colour each on smooth dark backgrounds, 9 to 18 of 64 "
        "pixels long",
        "shapes that hide another one, larger shapes, textured or light backgrounds",
        "--recipe dsprites --counts 0 1 2 3 4 --background gradient --x-size 64 --sides 9 18 "
        + FEWER,
        ("--min-gap 0", "--background black", "--sides 20 28 --counts 0 1 2",
         "--background textured"),
    ),
}  # fmt: skip
SEED_OF_SCENES = "--data-seed 6"  # another one than the default, on which recipes were chosen


def training_flags(name: str) -> list[str]:
    """The flags of main.py by which a model is trained."""
    return f"{MODELS[name].flags} {SEED_OF_SCENES} {EVALUATE}".split()


def convert(run: Path, name: str) -> None:
    """Writes the weights of a run in half precision, with the settings of model and images."""
    state = read_state(run / "checkpoint.pt")
    of_program = {s.key for cls in (ProgramSettings, FolderSettings) for s in settings_of(cls)}
    config = {k: v for k, v in state["config"].items() if k not in of_program}
    weights = {
        # The baseline (bl_) is needed by the score function alone; constants stay as they are.
        key: tensor if tensor.numel() < MIN_HALVED else tensor.half()
        for key, tensor in state["model"].items()
        if not key.startswith("bl_")
    }
    kept = {key: state[key] for key in ("format", "data_sha256", "step", "presence")}
    config["crop"] = False  # users' images are resized
    FOLDER.mkdir(exist_ok=True)
    # It cannot be resumed, and has an empty optimiser because checkpoints have one.
    write_state(FOLDER / f"{name}.pt", kept | {"config": config, "model": weights, "optimizer": {}})


def measure(name: str, flags: str = "") -> dict[str, Any]:
    """evaluation.json of a model in the package, by main.py."""
    with tempfile.TemporaryDirectory() as folder:
        line = f"--load {name} -n 0 {EVALUATE} --output-dir {folder}/run {flags}"
        with contextlib.redirect_stdout(io.StringIO()):
            code = air_main(shlex.split(line))
        if code:
            sys.exit(f"main.py {line} ended with exit code {code}")
        return json.loads(Path(folder, "run/evaluation.json").read_text())


def figures(evaluation: dict[str, Any]) -> dict[str, float]:
    """What a card has of an evaluation; the accuracy in per cent."""
    found = {name: evaluation[name] for name in FIGURES}
    return {name: round(100 * x if name == FIGURES[0] else x, 3) for name, x in found.items()}


def write_card(run: Path, name: str) -> None:
    """Measures a converted model and writes its card."""
    model = MODELS[name]
    config = json.loads((run / "config.json").read_text())
    trained = figures(json.loads((run / "evaluation.json").read_text()))
    others = {o: measure(name, f"{o} {OTHER_SCENES}") for o in model.others}
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=FOLDER, capture_output=True, text=True, check=True
    )
    written = {
        "for": model.use,
        "fails_at": model.fails,
        "command": f"python main.py {' '.join(training_flags(name))}",
        "seed": config["seed"],
        "steps": read_lines(run)[-1]["step"],
        "commit": commit.stdout.strip(),
        "versions": versions(),
        "data_sha256": config["data_sha256"],
        "held_out": figures(measure(name)),
        "held_out_in_single_precision": trained,
        "accuracy_on_other_scenes": {o: figures(e)[FIGURES[0]] for o, e in others.items()},
    }
    (FOLDER / f"{name}.json").write_text(json.dumps(written, indent=2) + "\n")
    lost = trained[FIGURES[0]] - written["held_out"][FIGURES[0]]
    if lost > MAX_LOST:
        sys.exit(f"{name}: half precision costs {lost:.2f} points of accuracy")


def write_pictures(name: str) -> None:
    """Draws held-out scenes of another seed, to try the model on."""
    config = read_state(FOLDER / f"{name}.pt")["config"]
    settings = from_config(SceneSettings, config)
    settings = replace(settings, seed=settings.seed + 1, num_scenes=2, num_test_scenes=200)
    scenes = load_scenes(settings).test
    folder = FOLDER / "pictures" / name
    folder.mkdir(parents=True, exist_ok=True)
    rows = {n: iter(np.flatnonzero(scenes.counts == n)) for n in reversed(settings.counts)}
    for number, count in zip(range(1, PICTURES + 1), cycle(rows), strict=False):
        pixels = scenes.x[next(rows[count])]
        pixels = pixels if pixels.ndim == 2 else pixels.transpose(1, 2, 0)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def check(name: str) -> list[str]:
    """The figures that are not those of the card, one line each."""
    expected, found = card(name)["held_out"], figures(measure(name))
    return [
        f"{name}: {key} is {found[key]}, and {expected[key]} on the card"
        for key, tolerance in TOLERANCE.items()
        if abs(found[key] - expected[key]) > tolerance
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and converts, or checks; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=Path, default=Path("runs/pretrained"), help="their runs")
    parser.add_argument("--check", action="store_true", help="measure again, change nothing")
    # argparse checks the empty list, too, against the choices.
    parser.add_argument("names", nargs="*", choices=[*MODELS, []], help="default: all models")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    problems: list[str] = []
    for name in args.names or MODELS:
        if args.check:
            problems += check(name)
            continue
        run, flags = args.runs / name, training_flags(name)
        check_flags(run, flags)
        if train(run, flags):
            sys.exit(f"training failed; see {run.with_suffix('.log')}")
        convert(run, name)
        write_card(run, name)
        write_pictures(name)
        print(f"{name}: {card(name)['held_out']}")
    print("\n".join(problems) or "All models fit." if args.check else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
