"""Trains every estimator on many seeds and writes one table that counts every run.

    python tests/benchmarks/seeds.py --out seeds --seeds 10 --jobs 2 -- -n 5000

What stands behind ``--`` goes to ``main.py``. Each run has a folder of its own below ``--out``; a
run that is done is not done again and one that was stopped goes on, so the command can be given
again until the table is whole. Nothing is left out: a seed that fails stands in the table. The rows
below ours are published figures of other programs, each by its own protocol.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

MAIN = Path(__file__).parents[2] / "main.py"
ESTIMATORS = ("marginal", "score")


COLUMNS = (
    *("estimator", "seeds", "count accuracy", "worst seed", "seeds ≥ 98 %", "digits apart"),
    *("to 95 %", "to 98 %", "ELBO", "bound of log p(x)", "box F1"),
)
# What others report, by their papers and repositories; a dash where they give no figure.
PUBLISHED = """\
| Pyro's tutorial (training data, 200,000 steps, 4 h on a K80) | 1 | 98.7 % | — | 1 | — | — | — | ≈ 657 | — | — |
| addtt/attend-infer-repeat-pytorch (failed runs left out, about 1 in 5) | — | 98.3 ± 0.15 % | — | — | — | — | — | 627.4 ± 0.7 | 636.8 ± 0.8 | — |
| aakhundov/tf-attend-infer-repeat (Concrete) | 10 | 98 % | — | — | — | — | 25,000 steps | — | — | — |
| GenJAX, enumeration (training data) | 1 | 98.4 % | — | 1 | — | 53 s on a 4090 | — | 634 | — | — |
"""  # noqa: E501


class Result(NamedTuple):
    """What one run reached; steps and seconds are None where it never did."""

    accuracy: float  # by mode, on all held-out scenes, at the end
    apart: float  # the same over the scenes whose digits share no pixel
    elbo: float
    bound: float
    box_f1: float
    steps_to: dict[float, int | None]  # the first evaluation at or above that accuracy
    seconds_to: dict[float, float | None]  # of training


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def is_done(folder: Path) -> bool:
    """Whether a run has taken all its steps; the last thing it writes is its evaluation."""
    return (folder / "evaluation.json").exists()


def run(folder: Path, estimator: str, seed: int, flags: Sequence[str]) -> int:
    """Trains one seed, or goes on with it; returns the exit code, 0 where nothing is left."""
    if is_done(folder):
        return 0
    if (folder / "checkpoint.pt").exists():
        arguments = ["--resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)  # stopped before its first checkpoint
        arguments = ["--output-dir", str(folder), "--estimator", estimator, "--seed", str(seed)]
        arguments += ["--eval-every", "250", "--evaluate", *flags]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("a") as log:
        command = [sys.executable, str(MAIN), *arguments]
        return subprocess.run(command, stdout=log, stderr=log).returncode


def read_result(folder: Path) -> Result:
    """What a run that is done reached."""
    lines, final = read_lines(folder), json.loads((folder / "evaluation.json").read_text())
    evaluations = [line for line in lines if "eval_elbo" in line]
    seconds = {line["step"]: line["seconds"] for line in lines if "seconds" in line}
    steps_to = {
        goal: next((e["step"] for e in evaluations if e["accuracy_mode"] >= goal), None)
        for goal in (0.95, 0.98)
    }
    return Result(
        *(final[name] for name in ("accuracy_mode", "accuracy_apart", "eval_elbo", "bound")),
        final["box_f1"],
        steps_to,
        {goal: None if step is None else seconds[step] for goal, step in steps_to.items()},
    )


def row(estimator: str, results: Sequence[Result]) -> str:
    """One line of the table, over all seeds of an estimator."""
    accuracies = [100 * r.accuracy for r in results]

    def spread(values: Sequence[float], digits: int = 1) -> str:
        sd = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.mean(values):.{digits}f} ± {sd:.{digits}f}"

    def reached(goal: float) -> str:
        steps = [r.steps_to[goal] for r in results]
        seconds = [r.seconds_to[goal] for r in results]
        got = [step for step in steps if step is not None]
        if not got:
            return f"0 of {len(steps)}"
        middle = statistics.median(second for second in seconds if second is not None)
        return f"{statistics.median(got):,.0f} steps, {middle:.0f} s ({len(got)} of {len(steps)})"

    good = sum(accuracy >= 98 for accuracy in accuracies)
    cells = [
        estimator,
        str(len(results)),
        f"{spread(accuracies)} %",
        f"{min(accuracies):.1f} %",
        f"{good} of {len(results)}",
        f"{spread([100 * r.apart for r in results])} %",
        reached(0.95),
        reached(0.98),
        spread([r.elbo for r in results]),
        spread([r.bound for r in results]),
        spread([r.box_f1 for r in results], 3),
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    """Runs what is left and writes table.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and the table")
    parser.add_argument("--seeds", type=int, default=10, help="seeds 0, 1, ... of each estimator")
    parser.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=ESTIMATORS)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("flags", nargs="*", help="behind --: flags of main.py for every run")
    args = parser.parse_args()
    runs = [(args.out / f"{e}-seed{s}", e, s) for s in range(args.seeds) for e in args.estimators]
    with ThreadPoolExecutor(args.jobs) as pool:
        codes = list(pool.map(lambda r: run(*r, args.flags), runs))
    failed = [str(folder) for (folder, _, _), code in zip(runs, codes, strict=True) if code]
    rows = []
    for estimator in args.estimators:
        folders = [folder for folder, e, _ in runs if e == estimator and is_done(folder)]
        if folders:
            rows.append(row(estimator, [read_result(folder) for folder in folders]))
    header = "| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|"
    table = "\n".join([header, *rows, PUBLISHED])
    (args.out / "table.md").write_text(table)
    print(table)
    if failed:
        print(f"not done: {', '.join(failed)}; see the .log files there", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
