"""How training scales with the number of processes: times a step by one, by two, by more.

    python tests/benchmarks/bench_scaling.py
    python tests/benchmarks/bench_scaling.py --device cuda --ranks 2 4 8 --batch-sizes 512

Each number of ranks trains the default model under torchrun on scenes of noise. A batch size is
that of all ranks together. The script times the steps, and separately the all_reduce of a step.

The second table is a model, not a measurement: a step by K GPUs takes the time of a step on one
K-th of the batch, as measured by one process, plus the bytes of the all_reduce times 2 (K - 1) / K
(a ring passes each byte on that often) over the bandwidth of the slowest link, and ``--latency``
for each of the ring's 2 (K - 1) hops. Nothing overlaps. Bandwidths and latency are flags.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, this is not a package

from air import AIR
from air.cli.device import pick_device
from air.evaluation.metrics import HeldOut
from air.training.events import Progress
from air.training.ranks import any_rank, is_main, joined_ranks, local_rank, sum_over_ranks
from air.training.trainer import Trainer
from air.training.training_settings import TrainingSettings

SCENES = 6_000
WARM_UP = 10  # steps
ROOT = Path(__file__).parents[2]


class Timing(NamedTuple):
    """Times that rank 0 measured."""

    step_ms: float
    message_ms: float
    message_bytes: int


def work(out: Path, batch_size: int, steps: int, device_name: str, compiled: bool) -> None:
    """Trains on every rank; rank 0 writes the `Timing`."""
    torch.set_num_threads(1)
    with joined_ranks():
        device = pick_device(device_name, local_rank())
        torch.manual_seed(0)
        air = AIR(use_baselines=False).to(device)
        images = torch.randint(256, (SCENES, 50, 50), dtype=torch.uint8).to(device)
        settings = TrainingSettings(
            num_steps=WARM_UP + steps, batch_size=batch_size, compile=compiled, eval_every=0,
            progress_every=WARM_UP,
        )  # fmt: skip
        trainer = Trainer(air, images, HeldOut(images[:10]), settings)
        told = [event for event in trainer.train() if isinstance(event, Progress)]
        step_seconds = (told[-1].seconds - told[0].seconds) / (told[-1].step - told[0].step)
        used = [p for p in air.parameters() if p.grad is not None]
        message = torch.zeros(sum(p.numel() for p in used) + 2, device=device)
        taken = []
        for _ in range(20):
            any_rank(False)  # all begin together
            begin = time.perf_counter()
            sum_over_ranks(message)
            float(message[0])  # waits for the device
            taken.append(time.perf_counter() - begin)
        if is_main():
            size = message.numel() * message.element_size()
            timing = Timing(1e3 * step_seconds, 1e3 * statistics.median(taken), size)
            out.write_text(json.dumps(timing))


def measure(ranks: int, batch_size: int, arguments: argparse.Namespace) -> Timing:
    """Lets so many ranks work; one is a plain process."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "timing.json")
        words = [__file__, "--work", out, "--batch-sizes", batch_size, "--steps", arguments.steps]
        words += ["--device", arguments.device, *(["--compile"] if arguments.compile else [])]
        command = [sys.executable, *launcher, *map(str, words)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, check=True, env=environment)
        return Timing._make(json.loads(out.read_text()))


def model(alone: Timing, ranks: int, gigabytes: float, latency: float) -> float:
    """The milliseconds of a step by so many ranks, of which each takes as long as `alone`."""
    seconds = 2 * (ranks - 1) * (alone.message_bytes / ranks / (gigabytes * 1e9) + latency * 1e-6)
    return alone.step_ms + 1e3 * seconds


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], help="beside one")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--steps", type=int, default=100, help="a multiple of 10")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--node-bandwidth", type=float, default=200.0, help="GB/s, among 8 GPUs")
    parser.add_argument("--network-bandwidth", type=float, default=25.0, help="GB/s, among nodes")
    parser.add_argument("--latency", type=float, default=10.0, help="microseconds a hop")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.work:
        work(given.work, given.batch_sizes[0], given.steps, given.device, given.compile)
        return
    print("| ranks | batch | ms a step | images/s | times one rank | message, MB | message, ms |")
    print("|---|---|---|---|---|---|---|", flush=True)
    alone = {}
    for batch_size in given.batch_sizes:
        rates: list[float] = []
        for ranks in sorted({1, *given.ranks}):
            t = measure(ranks, batch_size, given)
            alone.setdefault(batch_size, t)
            rates.append(1e3 * batch_size / t.step_ms)
            print(
                f"| {ranks} | {batch_size} | {t.step_ms:.1f} | {rates[-1]:.0f} "
                f"| {rates[-1] / rates[0]:.2f} | {t.message_bytes / 1e6:.1f} "
                f"| {t.message_ms if ranks > 1 else 0:.1f} |",
                flush=True,
            )
    print("\n| a model: GPUs | images a GPU | ms a step | images/s | of perfect scaling |")
    print("|---|---|---|---|---|")
    for batch_size in given.batch_sizes:
        for ranks, gigabytes in ((8, given.node_bandwidth), (64, given.network_bandwidth)):
            ms = model(alone[batch_size], ranks, gigabytes, given.latency)
            print(
                f"| {ranks} | {batch_size} | {ms:.1f} | {1e3 * ranks * batch_size / ms:.0f} "
                f"| {alone[batch_size].step_ms / ms:.0%} |"
            )


if __name__ == "__main__":
    main()
