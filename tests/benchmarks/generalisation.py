"""Can a model count what it never saw? The paper's experiments on other counts (section 4).

    python tests/benchmarks/generalisation.py --out generalisation --seeds 3 --jobs 2 -- -n 3000

Trains on scenes of 0, 1 and 2 digits, and of 0, 1 and 3, and asks for the count of scenes with 3
and with 2, of digits that were never trained on. Prints a table that counts every run and writes
``figure.png`` into ``--out``. Words behind ``--`` are passed to ``main.py``. Finished runs are not
repeated, so the command can be given again until the table is complete.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, this is not a package
from air.cli.flags import FLAGS
from air.data.synthetic.scene_settings import SceneSettings
from air.support.fields import settings_of
from tests.benchmarks.seeds import MAIN, check_flags, read_lines, train

EXPERIMENTS = {"0, 1, 2 to 3": ((0, 1, 2), 3), "0, 1, 3 to 2": ((0, 1, 3), 2)}
GUIDES = {"image": "AIR", "difference": "DAIR"}
HEAD = ("digits", "guide", "estimator", "seeds", "counts seen", "the other", "of each seed")


class Case(NamedTuple):
    """One run."""

    experiment: str
    guide: str
    estimator: str
    seed: int

    def folder(self, out: Path) -> Path:
        counts = "".join(map(str, EXPERIMENTS[self.experiment][0]))
        return out / f"{counts}-{self.guide}-{self.estimator}-seed{self.seed}"


def arguments_of(case: Case, flags: Sequence[str]) -> list[str]:
    """The flags of main.py for a training run, without the run's folder."""
    own = ["--guide", case.guide, "--estimator", case.estimator, "--seed", str(case.seed)]
    counts = ["--counts", *map(str, EXPERIMENTS[case.experiment][0])]
    return [*own, *counts, "--evaluate", "--iwae-samples", "5", *flags]


def same_scenes(folder: Path) -> list[str]:
    """The flags of the scenes that a run was trained on, and of where it ran."""
    config, flags = json.loads((folder / "config.json").read_text()), []
    places = ("mnist_dir", "device", "threads")
    of_scenes = [spec.key for spec in settings_of(SceneSettings) if spec.key != "x_size"]
    for name in (*FLAGS.keys() & of_scenes, *places):
        value, flag = config.get(name), f"--{name.replace('_', '-')}"
        if value is True:
            flags.append(flag)
        elif value not in (None, False):
            flags += [flag, *map(str, value if isinstance(value, list) else [value])]
    return flags


def measure(case: Case, out: Path, flags: Sequence[str]) -> tuple[float, float] | None:
    """Count accuracy on the counts that were seen and on the other, None where a run failed."""
    folder, other = case.folder(out), EXPERIMENTS[case.experiment][1]
    if train(folder, arguments_of(case, flags)):
        return None
    elsewhere = folder.with_name(f"{folder.name}-other")
    if not any("accuracy_mode" in line for line in read_lines(elsewhere)):
        shutil.rmtree(elsewhere, ignore_errors=True)  # stopped before its evaluation
        load = ["--load", str(folder / "checkpoint.pt"), "-n", "0", "--no-compile"]
        scenes = [*same_scenes(folder), "--counts", str(other), "--num-scenes", "2"]
        command = [sys.executable, str(MAIN), *load, *scenes, "--output-dir", str(elsewhere)]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            return None
    found = [read_lines(path)[-1]["accuracy_mode"] for path in (folder, elsewhere)]
    return found[0], found[1]


def rows(results: dict[Case, tuple[float, float] | None]) -> list[list[str]]:
    """The table: a row for each experiment, guide and estimator, over all its seeds."""
    table = []
    for experiment, guide, estimator in dict.fromkeys(case[:3] for case in results):
        found = [r for case, r in results.items() if case[:3] == (experiment, guide, estimator)]
        done = [result for result in found if result]
        means = [
            f"{statistics.mean(part):.1%}" if done else "—" for part in zip(*done, strict=True)
        ]
        each = ", ".join(f"{result[1]:.1%}" if result else "failed" for result in found)
        own = [experiment, GUIDES[guide], estimator, str(len(found))]
        table.append([*own, *(means or ["—", "—"]), each])
    return table


def draw(results: dict[Case, tuple[float, float] | None]) -> Figure:
    """The accuracy on the count never seen, a dot for each seed over the bar of their mean."""
    figure = Figure((7.1, 2.6), layout="constrained")
    panels = figure.subplots(1, len(EXPERIMENTS), sharey=True)
    for axes, experiment in zip(panels, EXPERIMENTS, strict=True):
        kinds = list(dict.fromkeys(case[1:3] for case in results if case.experiment == experiment))
        for x, (guide, estimator) in enumerate(kinds):
            mine = [r for case, r in results.items() if case[:3] == (experiment, guide, estimator)]
            heights = [100 * result[1] for result in mine if result]
            axes.bar(x, statistics.mean(heights or [0.0]), color="#BBD7EA", width=0.6)
            axes.plot([x] * len(heights), heights, "o", color="#0072B2", ms=4)
        names = [f"{GUIDES[guide]}\n{estimator}" for guide, estimator in kinds]
        axes.set_xticks(range(len(kinds)), names)
        axes.set_title(f"trained on {experiment.replace(' to', ' digits, asked for')}")
        axes.set_ylim(0, 100)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("count accuracy (%)")
    return figure


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Trains on some counts, and asks for another.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, ... so many")
    parser.add_argument("--estimators", nargs="+", default=["marginal", "score"])
    parser.add_argument("--guides", nargs="+", default=[*GUIDES], choices=[*GUIDES])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given, flags = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    given.out.mkdir(parents=True, exist_ok=True)
    cases = [
        *map(Case._make, product(EXPERIMENTS, given.guides, given.estimators, range(given.seeds)))
    ]
    for case in cases:
        check_flags(case.folder(given.out), arguments_of(case, flags))
    with ThreadPoolExecutor(given.jobs) as pool:
        found = pool.map(lambda case: measure(case, given.out, flags), cases)
        results = dict(zip(cases, found, strict=True))
    for row in (HEAD, ["---"] * len(HEAD), *rows(results)):
        print(f"| {' | '.join(row)} |")
    draw(results).savefig(given.out / "figure.png", dpi=200)
    sys.exit(None in results.values())


if __name__ == "__main__":
    main()
