"""Times one optimisation step in four forms, side by side.

    python tests/benchmarks/bench_step.py
    python tests/benchmarks/bench_step.py --batch-sizes 64 256 1024 --model-steps 3 6 --device cuda

    plain     Pyro as its example has it: a stock LSTM cell over image and latents, grid_sample,
              ``pyro.optim.Adam``, ``pyro.infer.SVI``, TraceGraph_ELBO; score function
    eager     ours, uncompiled (``--no-compile``)
    compiled  ours (``--compile``)
    floor     the same arithmetic in plain torch: ELBO and estimator written out, ``torch.compile``
              (on a GPU without the optimiser and the drawing of the batch)

Every form runs in its own process. They take turns of a few steps, so that other work of the
machine slows all forms equally; the median over all turns counts. Prints a Markdown table:
milliseconds a step, how many times as fast as plain Pyro and as slow as the floor, seconds of the
first step with compilation, and peak memory with 150 MB of scenes (on a GPU, the memory that torch
reserves; on a CPU, that of the process).
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import TraceGraph_ELBO
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, this is not a package
from air import AIR
from air import air as program
from air.marginal import MarginalAIR
from air.priors import DEFAULT_COUNT_RATIO, CountPrior, geometric_presence
from air.spatial_transformer import positive_scale
from air.training.compiled_svi import CompiledSVI
from air.training.svi import SVI, make_optimizer
from tests.benchmarks.plain_torch import LOSSES

SCENES = 60_000
FORMS = ("plain", "eager", "compiled", "floor")


class Case(NamedTuple):
    """A form of the step, and its sizes."""

    form: str
    estimator: str
    batch_size: int
    model_steps: int
    device: str
    threads: int


# Plain Pyro: the changes that make this implementation fast are undone.


class StockCell(nn.LSTMCell):
    """torch's LSTM cell on image and latents joined, at every step."""

    def project(self, image: Tensor) -> Tensor:
        return image

    def forward(self, image: Tensor, latents: Any, state: Any) -> Any:  # type: ignore[override]  # noqa: ANN401
        return super().forward(torch.cat((image, *latents), 1), state)


def grid(z_where: Tensor, inverse: bool, n: int, out_size: int) -> Tensor:
    """Where `grid_sample` reads; (s, x, y) becomes the affine map x -> s x + (x, y)."""
    s = positive_scale(z_where[:, :1])
    where = torch.cat((1 / s, -z_where[:, 1:] / s) if inverse else (s, z_where[:, 1:]), 1)
    zero = torch.zeros_like(where[:, 0])
    rows = (where[:, 0], zero, where[:, 1], zero, where[:, 0], where[:, 2])
    return affine_grid(
        torch.stack(rows, 1).view(n, 2, 3), [n, 1, out_size, out_size], align_corners=False
    )


def paint_by_grid(z_where: Tensor, window_size: int, image_size: int, windows: Tensor) -> Tensor:
    """`air.spatial_transformer.window_to_image`."""
    n = len(z_where)
    windows = windows.view(n, 1, window_size, window_size)
    at = grid(z_where, False, n, image_size)
    return grid_sample(windows, at, align_corners=False).view(n, image_size, image_size)


def cut_by_grid(z_where: Tensor, window_size: int, image_size: int, images: Tensor) -> Tensor:
    """`air.spatial_transformer.image_to_window`."""
    n = len(z_where)
    at = grid(z_where, True, n, window_size)
    return grid_sample(images[:, None], at, align_corners=False).view(n, -1)


def undo() -> None:
    """For this process: stock cells, grids, permutations, provenance, objects one by one."""
    program.ImageLSTMCell = lambda image, latent, hidden: StockCell(image + latent, hidden)
    program.window_to_image, program.image_to_window = paint_by_grid, cut_by_grid
    program.draw_indices = lambda size, n, device: torch.randperm(size, device=device)[:n]
    program.detach_provenance = lambda z: z
    together = AIR.paint
    AIR.paint = lambda model, *z: torch.cat(  # type: ignore[method-assign]
        [together(model, [where], [what]) for where, what in zip(*z, strict=True)]
    )


# The four forms, each a function that takes one step.


def build(case: Case) -> Callable[[], Any]:
    """Makes model, data and optimiser."""
    torch.set_num_threads(case.threads)
    pyro.enable_validation(False)
    pyro.set_rng_seed(0)
    if case.form == "plain":
        undo()
    score = case.estimator == "score"
    model = AIR(num_steps=case.model_steps, use_baselines=score).to(case.device)
    data = torch.randint(256, (SCENES, 50, 50), dtype=torch.uint8).to(case.device)
    probs = geometric_presence(DEFAULT_COUNT_RATIO, case.model_steps)
    prior = CountPrior(probs, device=case.device)
    arguments = {"batch_size": case.batch_size, "z_pres_prior_p": prior}
    if case.form == "plain":
        adam = pyro.optim.Adam(lambda name: {"lr": 1e-2 if "bl_" in name else 1e-3})
        plain = pyro.infer.SVI(model.model, model.guide, adam, TraceGraph_ELBO())
        return lambda: plain.step(data, **arguments)
    optimizer = make_optimizer(model, 1e-3, 1e-2)
    if case.form == "floor":
        mode = "reduce-overhead" if case.device == "cuda" else "default"
        loss = torch.compile(LOSSES[case.estimator], mode=mode)

        def step() -> None:
            chosen = torch.randint(SCENES, (case.batch_size,), device=case.device)
            optimizer.zero_grad()
            loss(model, model.to_images(data[chosen]), prior.probs).backward()
            optimizer.step()

        return step
    trained = model if score else MarginalAIR(model)
    kind = {"eager": SVI, "compiled": CompiledSVI}[case.form]
    svi = kind(trained.model, trained.guide, optimizer, TraceGraph_ELBO())
    return lambda: svi.step_async(data, **arguments)


def serve(case: Case, connection: Connection) -> None:
    """The process of one form: receives a number of steps, takes them, and sends their time."""
    synchronize = torch.cuda.synchronize if case.device == "cuda" else lambda: None
    step = build(case)
    while steps := connection.recv():
        synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize()
        connection.send(time.perf_counter() - start)
    on_cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    connection.send(torch.cuda.max_memory_reserved() if case.device == "cuda" else on_cpu)


# Taking turns.


class Timing(NamedTuple):
    """The times and the memory of one form."""

    first: float  # seconds until the first step was done, compiling included
    step: float  # seconds, the median of turns
    memory: int  # bytes


def measure(cases: list[Case], turns: int, steps: int) -> list[Timing]:
    """Times the cases in turn."""
    context = multiprocessing.get_context("spawn")
    pipes, processes, firsts = [], [], []
    for case in cases:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(case, theirs), daemon=True)
        process.start()
        theirs.close()  # so that a process that dies ends the pipe
        ours.send(1)
        firsts.append(ours.recv())
        ours.send(max(steps, 5))  # to warm up, and on a GPU to record a CUDA graph
        ours.recv()
        pipes.append(ours)
        processes.append(process)
    times: list[list[float]] = [[] for _ in cases]
    for _ in range(turns):
        for pipe, taken in zip(pipes, times, strict=True):
            pipe.send(steps)
            taken.append(pipe.recv() / steps)
    memories = []
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(0)
        memories.append(pipe.recv())
        process.join()
    return [
        Timing(first, statistics.median(taken), memory)
        for first, taken, memory in zip(firsts, times, memories, strict=True)
    ]


def rows(cases: list[Case], timings: list[Timing]) -> list[str]:
    """Lines of the table, with ratios to plain Pyro and to the floor of the same estimator."""
    plain = timings[0].step
    floors = {c.estimator: t.step for c, t in zip(cases, timings, strict=True) if c.form == "floor"}
    lines = []
    for case, timing in zip(cases, timings, strict=True):
        cells = [
            str(case.batch_size),
            str(case.model_steps),
            f"{case.form}, {case.estimator}",
            f"{1e3 * timing.step:.2f}",
            f"{plain / timing.step:.1f}",
            f"{timing.step / floors[case.estimator]:.2f}" if case.estimator in floors else "",
            f"{timing.first:.1f}",
            f"{timing.memory / 2**20:,.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


COLUMNS = (
    *("batch", "T", "form", "ms a step", "plain / this", "this / floor"),
    *("first step, s", "peak MiB"),
)


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64])
    parser.add_argument("--model-steps", type=int, nargs="+", default=[3])
    parser.add_argument("--estimators", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--forms", nargs="+", choices=FORMS[1:], default=FORMS[1:])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5, help="of one turn")
    args = parser.parse_args()
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    with tempfile.TemporaryDirectory() as empty:  # so that compiling takes the time of a first run
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
        for batch_size, model_steps in product(args.batch_sizes, args.model_steps):
            forms = [("plain", "score")]
            forms += [(form, estimator) for estimator in args.estimators for form in args.forms]
            setting = batch_size, model_steps, args.device, args.threads
            cases = [Case(form, estimator, *setting) for form, estimator in forms]
            print(*rows(cases, measure(cases, args.turns, args.steps)), sep="\n", flush=True)


if __name__ == "__main__":
    main()
