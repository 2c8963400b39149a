"""Real training counts right: recipes of seconds, and on request those of the results page."""

from pathlib import Path

import pytest
from helpers import Run, capture_only

from air import multi_mnist
from air.storage.run_folder import RunFolder

MANY_AT_FIRST = (
    "--z-pres-prior 0.99 --z-pres-prior-raw --anneal-prior exp --anneal-prior-to 1e-4 "
    "--anneal-prior-duration"
)
SMALL_NETS = (
    "--encoder-latent-size 10 --rnn-hidden-size 64 --encoder-net 64 --decoder-net 64 "
    "--predict-net 64"
)
FEW = "--num-scenes 1000 --num-test-scenes 200"
MORE = "--num-scenes 2000 --num-test-scenes 300"  # without which digits from scratch are not learnt
DIGITS = "-t 2 --min-gap 0"  # which do not overlap
FROM_SCRATCH = (
    f"--no-survey {DIGITS} {MORE} -b 32 --x-size 32 --sides 12 16 --window-size 16 "
    f"--scale-prior-mean 2.2 {SMALL_NETS}"
)
DARK = (  # flags of multi_mnist.py
    f"{FEW} --min-gap 0 --counts 0 1 --x-size 24 --sides 10 14 --object-levels 0 0 "
    "--background gradient --background-levels 160 255"
)
RECIPES = [  # flags, least count accuracy, least ELBO
    (f"-n 320 -lr 4e-3 --z-pres-prior 0.05 {FROM_SCRATCH}", 0.8, None),
    # The paper's estimator, captured, which takes a third of the time of a step.
    (
        "--estimator score -n 400 -lr 3e-3 --z-pres-prior 0.05 --bl-predict-net 64 --compile "
        f"{FROM_SCRATCH}",
        0.8,
        None,
    ),
    # With what follows from the scenes: dark digits on light gradients, in the whole image.
    (f"--data dark.npz --guide image -n 180 -b 16 -lr 4e-3 -t 2 {SMALL_NETS}", 0.95, None),
    # The same: up to four coloured sprites on gradients, by glimpses.
    (
        "-n 60 -b 16 -lr 3e-3 --recipe dsprites --background gradient --counts 0 1 2 3 4 "
        f"--x-size 32 --sides 7 9 --min-gap 1 {FEW} {SMALL_NETS}",
        0.95,
        None,
    ),
    # Up to four sprites, by glimpses, from scratch.
    (
        f"--no-survey -n 80 -b 32 -lr 3e-3 --clip-grad-norm 100 {MANY_AT_FIRST} 50 "
        "--recipe dsprites -t 5 --x-size 36 --sides 8 9 --counts 0 1 2 3 4 --min-gap 1 "
        f"{MORE} --window-size 10 --scale-prior-mean 3.2 "
        f"--scale-prior-sd 0.5 {SMALL_NETS} --guide glimpse --likelihood-sd 0.5",
        0.9,
        None,
    ),
]
# Bars some five to ten points below the results page.
DAILY = [
    # An empty canvas has some 460 nats.
    ("--no-survey -n 400 --num-scenes 20000 --num-test-scenes 2000", 0.85, 560),
    ("-n 1000 --num-test-scenes 2000", 0.97, None),
    ("-n 500 --recipe apart --num-test-scenes 2000", 0.98, None),
    (
        "--no-survey --guide difference --recipe dsprites -n 150 -b 32 -lr 2e-3 "
        "--clip-grad-norm 100 -t 2 "
        "--x-size 32 --sides 9 14 --num-scenes 5000 --num-test-scenes 500 "
        "--window-size 14 --scale-prior-mean 2 --scale-prior-sd 0.5 --decoder-output-bias -3 "
        f"--likelihood-sd 0.5 --encoder-latent-size 10 {MANY_AT_FIRST} 200",
        0.8,
        None,
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "accuracy", "elbo"),
    [*RECIPES, *(pytest.param(*recipe, marks=pytest.mark.benchmark) for recipe in DAILY)],
)
def test_a_recipe_learns_to_count(
    flags: str, accuracy: float, elbo: float | None, tmp_path: Path, succeeds: Run
) -> None:
    if "dark.npz" in flags:
        multi_mnist.main(f"{DARK} --cache-dir {tmp_path} --out {tmp_path}/dark.npz".split())
    line = f"{flags} --eval-every 0 --save-every 0 --output-dir run"
    succeeds(line, compiler=capture_only)
    last = RunFolder(tmp_path / "run").read_metrics()[-1]
    assert last["accuracy_mode"] >= accuracy
    assert elbo is None or last["eval_elbo"] >= elbo
