"""Checks that the program works on a GPU as on a CPU: the first command on a new machine.

    python tests/benchmarks/gpu_check.py                       on the first GPU, some ten minutes
    python tests/benchmarks/gpu_check.py --device cpu --quick  without a GPU, with tiny runs

Prints one line per check: ok, FAIL or skipped, its name, and the measurement. The exit code is 0 if
no check failed. The details of a failure are on stderr.

    machine  versions and GPUs
    tests    the tests that need a GPU
    step     loss, gradients and weights of a step equal those on a CPU, uncompiled and compiled
    speed    milliseconds and peak memory of a step of 64 scenes, uncompiled and compiled
    resume   a run that was stopped and resumed ends with the evaluation of an uninterrupted run
    solids   a run with a renderer as the decoder, and its evaluation
    ranks    a run of two processes, each on its own GPU
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, this is not a package
from air.storage.checkpoint import read_state
from air.training.compiled_svi import inductor
from tests.benchmarks.bench_step import Case, measure
from tests.helpers import ROOT, SMALL, capture_only
from tests.two_ranks import one_step

TOLERANCE = 1e-3  # of a GPU's result, relative to the largest number of its tensor
TIMEOUT = 900  # seconds of one process


class Options(NamedTuple):
    """The arguments of every check."""

    device: str  # cuda or cpu
    quick: bool
    folder: Path  # for runs


class Skipped(Exception):  # not an error
    """A check that this machine cannot run."""


def machine(options: Options) -> str:
    gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    return f"torch {torch.__version__}, CUDA {torch.version.cuda}, {', '.join(gpus) or 'no GPU'}"


def tests(options: Options) -> str:
    if options.device == "cpu":
        raise Skipped("needs CUDA")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", "on_a_gpu", "tests/training"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    print(done.stdout, file=sys.stderr)
    last = done.stdout.strip().splitlines()[-1:]
    assert done.returncode == 0, last
    return "".join(last)


def step(options: Options) -> str:
    """With the same noise on both devices."""
    furthest = 0.0
    compiler = capture_only if options.quick else inductor
    for estimator in ("marginal", "score"):
        expected = one_step(estimator, False)
        for captured in (False, True):
            found = one_step(estimator, captured, options.device, compiler)
            assert found.keys() == expected.keys(), f"{estimator}: gradients of other parameters"
            for name, value in expected.items():
                difference = (found[name].cpu() - value).abs().max() / value.abs().max().clamp(1e-3)
                where = f"{estimator}, captured {captured}, {name}: {float(difference):.1e}"
                assert difference <= TOLERANCE, where  # which a NaN is not
                furthest = max(furthest, float(difference))
    return f"the largest relative difference is {furthest:.1e}"


def speed(options: Options) -> str:
    if options.device == "cpu":
        raise Skipped("needs CUDA; see bench_step.py")
    cases = [Case(form, "marginal", 64, 3, options.device, 1) for form in ("eager", "compiled")]
    timings = measure(cases, *((2, 10) if options.quick else (10, 50)))
    return ", ".join(
        f"{case.form} {1e3 * timing.step:.2f} ms, {timing.memory / 2**20:,.0f} MiB"
        for case, timing in zip(cases, timings, strict=True)
    )


def run_program(options: Options, line: str, *launcher: str, stop_at: Path | None = None) -> None:
    """Runs main.py to its end, or stops it by SIGTERM once there is a file `stop_at`."""
    command = [sys.executable, *launcher, str(ROOT / "main.py"), *line.split()]
    variables = {**os.environ, "AIR_CACHE": str(options.folder / "cache")}
    until, log = time.monotonic() + TIMEOUT, (options.folder / "log").open("w+")
    with (
        log,
        subprocess.Popen(command, env=variables, cwd=options.folder, stdout=log, stderr=log) as run,
    ):
        while run.poll() is None and time.monotonic() < until:
            if stop_at and stop_at.exists():
                break
            time.sleep(0.01)
        run.terminate()  # where it has not ended
        code = run.wait(100)
    if code != (128 + signal.SIGTERM if stop_at else 0):
        text = (options.folder / "log").read_text()
        print(text, file=sys.stderr)
        errors = [row for row in text.splitlines() if "error" in row.lower()]
        raise AssertionError(f"main.py {line}: exit code {code}: {''.join(errors[-1:])}")


def flags(options: Options) -> str:
    """Flags of a short run."""
    sizes = "--num-scenes 10000 --num-test-scenes 1000 --compile"
    if options.quick:
        sizes = f"{SMALL} --no-compile"
    return f"{sizes} --eval-every 0 --device {options.device}"


def last_evaluation(folder: Path) -> Mapping[str, Any]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    found: Mapping[str, Any] = [record for record in records if "eval_elbo" in record][-1]
    return found


def resume(options: Options) -> str:
    """The stopped run comes first, because nobody knows before at which step it stops."""
    new = f"{flags(options)} --save-every 50 --output-dir"
    saved = options.folder / "stopped" / "checkpoint.pt"
    run_program(options, f"{new} stopped -n 1000000", stop_at=saved)
    stopped_at = read_state(saved)["step"]
    end = stopped_at + (10 if options.quick else 200)
    run_program(options, f"--resume stopped -n {end}")
    run_program(options, f"{new} uninterrupted -n {end}")
    resumed, expected = (last_evaluation(options.folder / x) for x in ("stopped", "uninterrupted"))
    result = f"stopped at step {stopped_at} of {end}, ELBO {resumed['eval_elbo']}"
    different = [key for key in expected if resumed.get(key) != expected[key]]
    assert not different, f"{result} and not {expected['eval_elbo']}; {different} differ"
    return f"{result}, the same evaluation"


def solids(options: Options) -> str:
    steps = 3 if options.quick else 300
    sizes = "--num-scenes 200 --num-test-scenes 50" if options.quick else ""
    line = f"--recipe solids {sizes} --device {options.device} -n {steps} --output-dir solids"
    run_program(options, line)
    found = last_evaluation(options.folder / "solids")
    return f"{steps} steps, ELBO {found['eval_elbo']}, kind {found['kind_accuracy']}"


def ranks(options: Options) -> str:
    if torch.cuda.device_count() < 2:
        raise Skipped("needs 2 GPUs")
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    run_program(options, f"{flags(options)} -n 100 --output-dir ranks", *launcher)
    return f"100 steps, ELBO {last_evaluation(options.folder / 'ranks')['eval_elbo']}"


Check = Callable[[Options], str]  # returns the measurement; raises what went wrong
CHECKS: tuple[Check, ...] = (machine, tests, step, speed, resume, solids, ranks)


def main(argv: Sequence[str] | None = None, checks: Sequence[Check] = CHECKS) -> int:
    """Runs the checks; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny runs")
    given = parser.parse_args(argv)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no GPU; without one: --device cpu")
    torch.set_num_threads(1)
    pyro.enable_validation(False)  # its checks read from the device
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        options = Options(given.device, given.quick, Path(folder))
        for check in checks:
            try:
                status, detail = "ok", check(options)
            except Skipped as reason:
                status, detail = "skipped", str(reason)
            except Exception as error:  # the other checks still run
                traceback.print_exc()
                status, failed = "FAIL", True
                detail = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            print(f"{status:<8} {check.__name__:<8} {detail}".rstrip(), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
