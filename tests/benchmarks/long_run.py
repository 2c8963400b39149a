"""Memory and time per step during a long run, to see whether they grow.

    python tests/benchmarks/long_run.py                     20,000 steps of a tiny model
    python tests/benchmarks/long_run.py -- --compile --viz  with further flags of main.py

Prints a Markdown table, and by how much the memory grew after a tenth of the steps. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

MAIN = Path(__file__).parents[2] / "main.py"
TINY = (
    "--num-scenes 500 --num-test-scenes 50 -b 8 --rnn-hidden-size 16 --encoder-latent-size 5 "
    "--encoder-net 12 --decoder-net 12 --predict-net 8 --bl-predict-net 8 --eval-every 500"
)


def resident(process: int) -> float:
    """Memory of a process, MiB; 0 once it has ended."""
    status = Path(f"/proc/{process}/status").read_text()
    lines = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return int(lines[0].split()[1]) / 1024 if lines else 0.0


def follow(folder: Path, steps: int, flags: list[str]) -> list[tuple[int, float, float]]:
    """Step, memory and seconds of training, about a hundred times."""
    command = [sys.executable, str(MAIN), *TINY.split(), "--output-dir", str(folder)]
    found: list[tuple[int, float, float]] = []
    with subprocess.Popen([*command, "-n", str(steps), *flags], stdout=-3) as process:
        metrics = folder / "metrics.jsonl"
        while process.poll() is None:
            time.sleep(0.2)
            lines = metrics.read_text().splitlines()[-3:-1] if metrics.exists() else []
            told = [line for line in map(json.loads, lines) if "seconds" in line]
            if told and told[-1]["step"] >= len(found) * steps / 100:
                found.append((told[-1]["step"], resident(process.pid), told[-1]["seconds"]))
    return found


def main() -> None:
    """Follows one run and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("flags", nargs="*", help="behind --: flags of main.py")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = follow(Path(folder, "run"), args.steps, args.flags)
    found = [row for row in found if row[1]]
    if not found:
        sys.exit("the run failed, or it was too short to see anything")
    tenths = [
        next((row for row in found if row[0] >= tenth * args.steps / 10), found[-1])
        for tenth in range(1, 11)
    ]
    print("| step | memory, MiB | ms a step |")
    print("|---|---|---|")
    for (before, _, start), (step, memory, seconds) in pairwise(tenths):
        pace = 1000 * (seconds - start) / max(step - before, 1)
        print(f"| {step:,} | {memory:.0f} | {pace:.2f} |")
    print(f"memory {tenths[-1][1] / tenths[0][1] - 1:+.1%} since step {tenths[0][0]:,}")


if __name__ == "__main__":
    main()
