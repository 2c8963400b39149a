"""Trains by objectives and estimators on many seeds; writes a table and a figure of every run.

    python tests/benchmarks/seeds.py --out seeds --seeds 10 --jobs 2

Words behind ``--`` are passed to ``main.py``. Each run has its own folder in ``--out``. Finished
runs are not repeated and stopped runs are resumed, so the command can be given again until the
table is complete. The table counts every seed, including those that failed. The rows below ours are
published results of other programs, each with its own protocol.
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, this is not a package
from air.cli.flags import build_parser

MAIN = Path(__file__).parents[2] / "main.py"
VARIANTS = {  # names of rows, and their flags
    "marginal": "--estimator marginal",
    "score": "--estimator score",
    "rloo": "--estimator rloo",
    "mvd": "--estimator mvd",
    "vimco-5": "--objective iwae --estimator vimco --particles 5",
    "iwae-2": "--objective iwae --particles 2",
    "iwae-5": "--objective iwae --particles 5",
    "rws-5": "--objective rws --particles 5",
}


MEASURES = ("accuracy_mode", "digits_apart", "eval_elbo", "bound", "box_f1")  # as in Result
COLUMNS = (
    *("estimator", "seeds", "count accuracy", "worst seed", "seeds ≥ 98 %", "digits apart"),
    *("to 95 %", "to 98 %", "ELBO", "bound of log p(x)", "box F1", "ms a step"),
)
# Results from papers and repositories; a dash where they give no figure.
PUBLISHED = """\
| Pyro's tutorial (training data, 200,000 steps, 4 h on a K80) | 1 | 98.7 % | — | 1 | — | — | — | ≈ 657 | — | — | — |
| Pyro's example, as timed for GenJAX (training data) | 1 | ≈ 98.5 % | — | — | — | — | — | ≈ 645 | — | — | — |
| addtt/attend-infer-repeat-pytorch (failed runs left out, about 1 in 5) | — | 98.3 ± 0.15 % | — | — | — | — | — | 627.4 ± 0.7 | 636.8 ± 0.8 | — | — |
| akosiorek/attend_infer_repeat (300,000 steps) | — | 94 to 98 %, about 1 in 5 works | — | — | — | — | — | — | — | — | — |
| aakhundov/tf-attend-infer-repeat (Concrete) | 10 | 98 % | — | — | — | — | 25,000 steps | — | — | — | — |
| GenJAX's study (PLDI 2024): enumeration (training data) | 1 | 98.4 % | — | 1 | — | 197 s | 317 s | 634.4 | — | — | — |
| GenJAX's study: measure-valued derivatives (training data) | 1 | 98.4 % | — | 1 | — | 53 s | 87 s | 634.7 | — | — | — |
| GenJAX's study: IWAE, K = 2, measure-valued derivatives (training data) | 1 | 98.4 % | — | 1 | — | 91 s | 227 s | — | 638.5 | — | — |
| GenJAX's study: score function, no baseline (training data) | 1 | 27.5 % | — | 0 | — | — | — | 460.1 | — | — | — |
| GenJAX's study: reweighted wake-sleep, K = 10 (training data) | 1 | 66.6 % | — | 0 | — | — | — | — | — | — | — |
| SuPAIR (another model) | 5 | ≈ 98 % | — | — | — | — | — | — | — | — | — |
"""  # noqa: E501


class Result(NamedTuple):
    """Results of a run; steps and seconds are None for accuracies that it did not reach."""

    accuracy: float  # by mode, on all held-out scenes, at the end
    apart: float  # the same over the scenes whose digits share no pixel
    elbo: float
    bound: float
    box_f1: float
    ms: float  # milliseconds of a training step, over the whole run
    steps_to: dict[float, int | None]  # the first evaluation at or above that accuracy
    seconds_to: dict[float, float | None]  # of training


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def is_done(folder: Path) -> bool:
    """Whether a run has taken all its steps; the last thing it writes is its evaluation."""
    return (folder / "evaluation.json").exists()


def check_flags(folder: Path, arguments: Sequence[str]) -> None:
    """Refuses to count a run that was begun with other flags than are asked for now."""
    config = folder / "config.json"
    begun = json.loads(config.read_text()) if config.exists() else {}
    for name, value in vars(build_parser().parse_args(arguments)).items():
        if name in begun and begun[name] != value:
            sys.exit(f"{folder} was begun with {name} {begun[name]}, not {value}; change --out")


def arguments_of(run: tuple[Path, str, int], flags: Sequence[str]) -> list[str]:
    """The flags of main.py for a run, without its folder."""
    _, estimator, seed = run
    own = ["--seed", str(seed), *VARIANTS[estimator].split()]
    return [*own, "--eval-every", "250", "--evaluate", *flags]


def train(folder: Path, arguments: Sequence[str]) -> int:
    """Trains one seed, or resumes its run; returns the exit code, 0 for a finished run."""
    if is_done(folder):
        return 0
    goes_on = (folder / "checkpoint.pt").exists()
    if not goes_on and (folder / "config.json").exists():
        shutil.rmtree(folder)  # stopped before its first checkpoint
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("a") as log:
        place = ["--resume" if goes_on else "--output-dir", str(folder)]
        command = [sys.executable, str(MAIN), *place, *arguments]
        return subprocess.run(command, stdout=log, stderr=log).returncode


def read_result(folder: Path) -> Result:
    """Results of a finished run; NaN for measures that its scenes do not allow."""
    lines, final = read_lines(folder), json.loads((folder / "evaluation.json").read_text())
    final["digits_apart"] = (final["accuracy_by_overlap"] or [None])[0]
    evaluations = [line for line in lines if "eval_elbo" in line]

    def seconds(step: int) -> float:
        """Of training, by the first progress line at that step or behind it."""
        return next(line["seconds"] for line in lines if "seconds" in line and line["step"] >= step)

    steps_to = {
        goal: next((e["step"] for e in evaluations if e["accuracy_mode"] >= goal), None)
        for goal in (0.95, 0.98)
    }
    return Result(
        *(math.nan if final[name] is None else final[name] for name in MEASURES),
        1000 * seconds(final["step"]) / final["step"],
        steps_to,
        {goal: None if step is None else seconds(step) for goal, step in steps_to.items()},
    )


def row(estimator: str, results: Sequence[Result], seeds: int) -> str:
    """One line of the table, over all seeds of an estimator, those that ended badly included."""
    accuracies = [100 * r.accuracy for r in results]
    lost = seeds - len(results)

    def spread(values: Sequence[float], digits: int = 1) -> str:
        if not values:
            return "—"
        sd = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.mean(values):.{digits}f} ± {sd:.{digits}f}"

    def reached(goal: float) -> str:
        steps = [r.steps_to[goal] for r in results if r.steps_to[goal] is not None]
        seconds = [r.seconds_to[goal] for r in results if r.seconds_to[goal] is not None]
        if not steps:
            return f"0 of {seeds}"
        middle = f"{statistics.median(steps):,.0f} steps, {statistics.median(seconds):.0f} s"
        return f"{middle} ({len(steps)} of {seeds})"

    good = sum(accuracy >= 98 for accuracy in accuracies)
    cells = [
        estimator,
        f"{seeds}, of which {lost} ended in an error" if lost else str(seeds),
        f"{spread(accuracies)} %",
        "an error" if lost else f"{min(accuracies):.2f} %",
        f"{good} of {seeds}",
        f"{spread([100 * r.apart for r in results])} %",
        reached(0.95),
        reached(0.98),
        spread([r.elbo for r in results]),
        spread([r.bound for r in results]),
        spread([r.box_f1 for r in results], 3),
        f"{statistics.median(r.ms for r in results):.0f}" if results else "—",
    ]
    return "| " + " | ".join(cells) + " |"


def draw(folders: dict[str, list[Path]], path: Path) -> None:
    """Draws the count accuracy of every run over its steps, one colour for each estimator."""
    figure = Figure((7.1, 3.2), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    for number, (estimator, runs) in enumerate(folders.items()):
        for seed, run in enumerate(runs):
            points = [
                (e["step"], 100 * e["accuracy_mode"]) for e in read_lines(run) if "eval_elbo" in e
            ]
            axes.plot(
                *zip(*points, strict=True), f"C{number}", lw=0.9, label="" if seed else estimator
            )
    axes.set(xlabel="step", ylabel="count accuracy, %", ylim=(80, 100))
    axes.grid(color="0.93")
    axes.legend(fontsize="small")
    figure.savefig(path)


def main() -> int:
    """Runs what is left and writes table.md and figure.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and the table")
    parser.add_argument("--seeds", type=int, default=10, help="seeds 0, 1, ... of each estimator")
    parser.add_argument("--estimators", nargs="+", choices=VARIANTS, default=["marginal", "score"])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("flags", nargs="*", help="behind --: flags of main.py for every run")
    args = parser.parse_args()
    runs = [(args.out / f"{e}-seed{s}", e, s) for s in range(args.seeds) for e in args.estimators]
    for run in runs:
        check_flags(run[0], arguments_of(run, args.flags))
    with ThreadPoolExecutor(args.jobs) as pool:
        codes = list(pool.map(lambda run: train(run[0], arguments_of(run, args.flags)), runs))
    failed = [str(folder) for (folder, _, _), code in zip(runs, codes, strict=True) if code]
    done = {
        e: [run for run, name, _ in runs if name == e and is_done(run)] for e in args.estimators
    }
    rows = [row(e, [read_result(run) for run in done[e]], args.seeds) for e in done]
    draw(done, args.out / "figure.png")
    header = "| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|"
    table = "\n".join([header, *rows, PUBLISHED])
    (args.out / "table.md").write_text(table)
    print(table)
    if failed:
        print(f"not done: {', '.join(failed)}; see the .log files there", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
