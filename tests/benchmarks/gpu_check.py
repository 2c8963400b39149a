"""Whether this program does on a GPU what it does on a CPU: the first command on a new machine.

    python tests/benchmarks/gpu_check.py                       on the first GPU
    python tests/benchmarks/gpu_check.py --quick               the same with tiny runs and nets
    python tests/benchmarks/gpu_check.py --device cpu --quick  what needs no GPU, in a minute

Prints one line per check: ok, FAIL or skipped (why), its name, and what was measured. The exit code
is 0 if no check failed. What failed is told at length on stderr.

    machine    versions and GPUs
    indices    compiled code draws the batches that uncompiled code draws, from all of the data
    steps      recorded steps are uncompiled ones: losses, gradients, weights, random numbers; the
               largest difference in float64, relative to the largest number of its tensor
    skipped    a recorded step on NaN images changes no weight, moment or step count of Adam
    graphs     one CUDA graph is recorded, once, while learning rates and prior change
    waiting    no call in 40 replayed steps waits for the GPU
    kernels    how many a replayed step launches
    speed      a step of 64 scenes, as in bench_step.py: at most 0.6 ms, 1.3 times the floor, and a
               twentieth of plain Pyro; with --quick there is no goal
    resuming   a run stopped by SIGTERM and resumed ends with the evaluation of one that never was
    elsewhere  the checkpoint of a GPU evaluates on the CPU, where no GPU can be seen
    other GPU  a run on the second GPU
    two ranks  a run of two processes, each on its GPU
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pyro
import torch
from pyro.infer import TraceGraph_ELBO
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, this is not a package
from air import AIR
from air.evaluation.metrics import HeldOut
from air.marginal import MarginalAIR
from air.priors import AnnealedPresencePrior
from air.storage.checkpoint import read_state
from air.subsampling import draw_indices
from air.training import Trainer, TrainingSettings
from air.training.compiled_svi import CompiledSVI, inductor
from air.training.svi import SVI, make_optimizer
from tests.benchmarks.bench_step import Case, measure
from tests.helpers import ROOT, SMALL, capture_only, small_air

MAX_DIFFERENCE = 1e-6  # in float64, where rounding makes some 1e-12
MAX_MS, MAX_FLOORS, MIN_SPEEDUP = 0.6, 1.3, 20.0  # of a step on a GPU
TIMEOUT = 900  # seconds of one process
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


class Options(NamedTuple):
    """What every check is told."""

    device: str  # cuda or cpu
    quick: bool
    folder: Path  # for runs

    @property
    def flags(self) -> str:
        """Those of main.py for a short run."""
        if self.quick or self.device == "cpu":
            return f"{SMALL} --no-compile --eval-every 0"
        return "--num-scenes 10000 --num-test-scenes 1000 --compile --eval-every 0"


def machine(options: Options) -> str:
    triton = next((found.version for found in distributions(name="triton")), "none")
    gpus = [
        f"{torch.cuda.get_device_name(k)} {torch.cuda.get_device_capability(k)}"
        for k in range(torch.cuda.device_count())
    ]
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton}"
    return f"{versions}, {', '.join(gpus) or 'no GPU'}"


def check_indices(n: int, size: int, device: str) -> None:
    """Draws n of `size`, and reads by them as a step does, which Inductor makes one kernel."""

    def draw(data: Tensor) -> tuple[Tensor, Tensor]:
        chosen = draw_indices(len(data), n, data.device)
        return chosen, data[chosen]

    data = torch.arange(size, device=device)
    compiled = inductor(make_fx(draw)(data))
    compiled(data)  # compiles
    torch.manual_seed(n)
    expected = draw(data)[0]
    torch.manual_seed(n)
    for found in compiled(data):
        assert torch.equal(found, expected), f"other indices than uncompiled code, {n} of {size}"
    drawn = torch.bincount(expected * 8 // size, minlength=8).tolist()
    fair = all(abs(k - n / 8) < 2 for k in drawn)  # the edges of an eighth cut two strata
    assert fair, f"{drawn} images from each eighth, {n} of {size}"


def indices(options: Options) -> str:
    """On a GPU, Inductor computes some indices in 32 bits; what overflows goes unnoticed."""
    sizes = (129,) if options.quick else (64, 129, 200, 256, 512, 1024, 65_536)
    for n in sizes:
        check_indices(n, max(60_000, 16 * n), options.device)
    return f"the same, from every eighth of the data, for {', '.join(map(str, sizes))} images"


def check_recorded(svi: SVI, on_gpu: bool) -> None:
    """Steps that ran uncompiled would say nothing."""
    if isinstance(svi, CompiledSVI):
        captured = len(svi._compiled) == 1 and None not in svi._compiled.values()
        assert captured, "the step ran uncompiled, or was captured again"
        assert len(svi._recorded) == on_gpu, f"{len(svi._recorded)} recordings of one step"


def state_of(air: AIR, svi: SVI) -> list[Tensor]:
    """Weights, moments and Adam's step counts."""
    moments = [tensor for state in svi.optim.state.values() for tensor in state.values()]
    return [*air.parameters(), *moments]


def take_steps(kind: Any, estimator: str, options: Options) -> tuple[list[Tensor], Tensor]:  # noqa: ANN401
    """What twelve steps compute in float64, losses first, and the random state afterwards."""
    pyro.set_rng_seed(1)
    air = small_air(num_steps=2).double().to(options.device)
    data = torch.randint(256, (300, 12, 12), dtype=torch.uint8).to(options.device)
    program = MarginalAIR(air) if estimator == "marginal" else air
    optimizer = make_optimizer(air, 1e-3, 1e-2, clip_grad_norm=100.0)
    prior = AnnealedPresencePrior([0.5, 0.5], "lin", 1e-3, 0, 10, options.device)
    svi = kind(program.model, program.guide, optimizer, TraceGraph_ELBO())
    losses = []
    for step in range(12):
        prior.set_step(step)
        for group in optimizer.param_groups:
            group["lr"].fill_(1e-3 / (step + 1))
        losses.append(svi.step(data, batch_size=8, z_pres_prior_p=prior))
    check_recorded(svi, options.device == "cuda")
    gradients = [p.grad for p in air.parameters() if p.grad is not None]
    tensors = [torch.tensor(losses), *gradients, *state_of(air, svi), svi.stats.sums]
    state = torch.cuda.get_rng_state() if options.device == "cuda" else torch.get_rng_state()
    return [tensor.detach().double().cpu() for tensor in tensors], state


def steps(options: Options) -> str:
    """Without Inductor, whose sums round otherwise: the recording is what is checked."""
    recorded, said = partial(CompiledSVI, compiler=capture_only), []
    for estimator in ("marginal", "score"):
        expected, expected_state = take_steps(SVI, estimator, options)
        found, state = take_steps(recorded, estimator, options)
        assert len(set(found[0].tolist())) == 12, f"{estimator}: losses repeat"
        furthest = max(  # where all are zero but for rounding, relative to a small number
            float((one - other).abs().max() / other.abs().max().clamp(min=1e-4))
            for one, other in zip(found, expected, strict=True)
        )
        said.append(f"{estimator} differs by {furthest:.1e}")
        assert furthest <= MAX_DIFFERENCE, said[-1]  # which a NaN is not
        assert torch.equal(state, expected_state), f"{estimator}: another random state afterwards"
    return f"{', '.join(said)}; random states are equal"


def skipped(options: Options) -> str:
    """Marginal alone: on a GPU, to draw from a probability of NaN ends the process."""
    pyro.set_rng_seed(1)
    air = small_air(use_baselines=False).to(options.device)
    program, optimizer = MarginalAIR(air), make_optimizer(air, 1e-3, 1e-2)
    svi = CompiledSVI(program.model, program.guide, optimizer, TraceGraph_ELBO(), capture_only)
    data = torch.rand(40, 12, 12).to(options.device)
    for _ in range(5):
        svi.step(data, batch_size=8)
    before = [tensor.clone() for tensor in state_of(air, svi)]
    changed = []
    for images in (torch.full_like(data, math.nan), data.clone()):
        data.copy_(images)
        svi.step(data, batch_size=8)
        assert bool(svi.skipped) == bool(images.isnan().any()), "skipped the wrong step"
        pairs = zip(before, state_of(air, svi), strict=True)
        changed.append(sum(not torch.equal(old, new) for old, new in pairs))
    check_recorded(svi, options.device == "cuda")
    assert changed[0] == 0 < changed[1], f"{changed} of {len(before)} tensors changed"
    return f"changed 0 of {len(before)} tensors; the next step changed {changed[1]}"


@cache
def recorded_trainer(options: Options) -> Trainer:
    """Trains the default model; its rates and prior change at each step. Counts recordings."""
    pyro.set_rng_seed(1)
    data = torch.randint(256, (60_000, 50, 50), dtype=torch.uint8).to(options.device)
    settings = TrainingSettings(10**6, compile=True, lr_schedule="cosine", anneal_prior="exp")
    air, held_out = AIR(use_baselines=False).to(options.device), HeldOut(data[:9].cpu())
    compiler = capture_only if options.quick else inductor
    trainer = Trainer(air, data, held_out, settings, compiler=compiler)
    trainer.svi._record = mock.Mock(wraps=trainer.svi._record)  # type: ignore[union-attr]
    take(trainer, 10)
    return trainer


def take(trainer: Trainer, number: int) -> None:
    for _ in range(number):
        trainer._take_step()


def graphs(options: Options) -> str:
    trainer = recorded_trainer(options)
    take(trainer, 50)
    check_recorded(trainer.svi, options.device == "cuda")
    recordings = trainer.svi._record.call_count  # type: ignore[union-attr]
    assert recordings == 1, f"{recordings} recordings in {trainer.step} steps"
    assert (skips := trainer.stats.read()[2]) == 0, f"{skips} steps were skipped"
    return f"recorded once in {trainer.step} steps"


def waits(work: Callable[[], object]) -> list[str]:
    """The places where it waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [each for each in caught if "synchroniz" in str(each.message)]
    return [f"{Path(each.filename).name}:{each.lineno}" for each in found]


def waiting(options: Options) -> str:
    trainer = recorded_trainer(options)
    assert len(waits(trainer.stats.sums.tolist)) > 0, "torch does not notice what waits"
    places = waits(lambda: take(trainer, 40))
    assert not places, f"{len(places)} calls in 40 steps wait for the GPU: {sorted(set(places))}"
    return "0 calls in 40 steps wait for the GPU"


def kernels(options: Options) -> str:
    trainer = recorded_trainer(options)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        take(trainer, 5)
        torch.cuda.synchronize()
    counts = [e.count for e in profiled.key_averages() if e.device_type.name == "CUDA"]
    return f"{sum(counts) / 5:.0f} in a step, copies included"


def speed(options: Options) -> str:
    forms = {"plain": "score", "compiled": "marginal", "floor": "marginal"}
    cases = [Case(form, forms[form], 64, 3, options.device, 1) for form in forms]
    turns, steps = (2, 10) if options.quick else (10, 50)
    ms = {c.form: 1e3 * t.step for c, t in zip(cases, measure(cases, turns, steps), strict=True)}
    said = ", ".join(f"{form} {taken:.2f} ms" for form, taken in ms.items())
    floors, speedup = ms["compiled"] / ms["floor"], ms["plain"] / ms["compiled"]
    said += f"; {floors:.2f} times the floor, {speedup:.1f} times as fast as plain Pyro"
    reached = ms["compiled"] <= MAX_MS and floors <= MAX_FLOORS and speedup >= MIN_SPEEDUP
    goals = f"at most {MAX_MS} ms, {MAX_FLOORS} times, at least {MIN_SPEEDUP:.0f} times"
    assert reached or options.quick, f"{said}; the goals: {goals}"
    return said


def run_program(
    options: Options, line: str, *launcher: str, stop_at: Path | None = None, **environment: str
) -> None:
    """Runs main.py to its end, or stops it by SIGTERM once there is a file `stop_at`."""
    command = [sys.executable, *launcher, str(ROOT / "main.py"), *line.split()]
    variables = {**os.environ, "AIR_CACHE": str(options.folder / "cache"), **environment}
    until, log = time.monotonic() + TIMEOUT, (options.folder / "log").open("w+")
    pipes = {"stdout": log, "stderr": log}
    with log, subprocess.Popen(command, env=variables, cwd=options.folder, **pipes) as run:
        try:
            while run.poll() is None and time.monotonic() < until:
                if stop_at and stop_at.exists():
                    break
                time.sleep(0.01)
            run.terminate()  # where it has not ended; torchrun ends its processes
            code = run.wait(100)
        finally:
            run.kill()
    if code != (128 + signal.SIGTERM if stop_at else 0):
        print(said := (options.folder / "log").read_text(), file=sys.stderr)
        errors = [row for row in said.splitlines() if "error" in row.lower()]
        raise AssertionError(f"main.py {line}: exit code {code}: {''.join(errors[-1:])}")


def records(folder: Path, key: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that have a number of that name; it must be finite."""
    text = (folder / "metrics.jsonl").read_text()
    found = [line for line in map(json.loads, text.splitlines()) if key in line]
    assert all(math.isfinite(line[key]) for line in found), f"{key} is not finite"
    return found


def resuming(options: Options) -> str:
    """The stopped run comes first: the step at which it stops is not known before."""
    new = f"{options.flags} --device {options.device} --save-every 50 --output-dir"
    saved = options.folder / "half" / "checkpoint.pt"
    run_program(options, f"{new} half -n 1000000", stop_at=saved)
    step = read_state(saved)["step"]
    end = step + (10 if options.quick else 200)
    run_program(options, f"--resume half -n {end}")
    run_program(options, f"{new} whole -n {end}")
    resumed, whole = (records(options.folder / x, "eval_elbo")[-1] for x in ("half", "whole"))
    said = f"stopped at step {step} of {end}, ELBO {resumed['eval_elbo']}"
    others = [key for key in whole if resumed.get(key) != whole[key]]
    assert not others, f"{said} and not {whole['eval_elbo']}; {', '.join(others)} differ"
    return f"{said}, the same evaluation"


def elsewhere(options: Options) -> str:
    line = f"{options.flags} -n 0 --load whole/checkpoint.pt --device cpu"
    run_program(options, f"{line} --output-dir cpu", CUDA_VISIBLE_DEVICES="")
    here, run = (records(options.folder / name, "eval_elbo")[-1] for name in ("cpu", "whole"))
    said = f"ELBO {here['eval_elbo']:.3f} on the CPU, {run['eval_elbo']:.3f} in the run"
    # A GPU draws other samples of the latents in the same scenes.
    assert abs(here["eval_elbo"] - run["eval_elbo"]) <= 5 * run["eval_elbo_se"], said
    return said


def short_run(options: Options, name: str, device: str = "", launcher: Sequence[str] = ()) -> str:
    steps = 10 if options.quick else 100
    line = f"{options.flags} -n {steps} --device {device or options.device}"
    run_program(options, f"{line} --output-dir {name}", *launcher)
    elbos = [record["elbo"] for record in records(options.folder / name, "elbo")]
    return f"{steps} steps, ELBO {elbos[0]:.3f} to {elbos[-1]:.3f}"


class Check(NamedTuple):
    """A line of the result."""

    name: str
    run: Callable[[Options], str]  # what was measured; raises what went wrong
    gpus: tuple[int, int] = (0, 1)  # that it needs, with --device cpu and with --device cuda


CHECKS = (
    Check("machine", machine),
    Check("indices", indices),
    Check("steps", steps),
    Check("skipped", skipped),
    Check("graphs", graphs, (1, 1)),
    Check("waiting", waiting, (1, 1)),
    Check("kernels", kernels, (1, 1)),
    Check("speed", speed, (1, 1)),
    Check("resuming", resuming),
    Check("elsewhere", elsewhere, (1, 1)),
    Check("other GPU", partial(short_run, name="other", device="cuda:1"), (2, 2)),
    Check("two ranks", partial(short_run, name="two", launcher=TORCHRUN), (2, 2)),
)


def result(check: Check, options: Options) -> tuple[str, str]:
    """The status of a check, and what it measured or why it failed."""
    on_gpu = options.device == "cuda"
    if check.gpus[0] and not on_gpu:
        return "skipped (needs CUDA)", ""
    if on_gpu and torch.cuda.device_count() < check.gpus[1]:
        return f"skipped (needs {check.gpus[1]} GPUs)", ""
    try:
        return "ok", check.run(options)
    except Exception as error:  # the other checks are to go on
        traceback.print_exc()
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return "FAIL", kind + str(error).strip().partition("\n")[0]


def main(argv: Sequence[str] | None = None, checks: Sequence[Check] = CHECKS) -> int:
    """Runs the checks; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny runs; no goals for speed")
    given = parser.parse_args(argv)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no GPU; without one: --device cpu")
    torch.set_num_threads(1)
    pyro.enable_validation(False)  # its checks read from the device
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        options = Options(given.device, given.quick, Path(folder))
        for check in checks:
            status, detail = result(check, options)
            failed = failed or status == "FAIL"
            print(f"{status:<8} {check.name:<10} {detail}".rstrip(), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
