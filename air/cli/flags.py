"""The flags of the program: names and meanings; what their values may be is in `flag_values`.

Every flag of Pyro's AIR example is here under its name and with its meaning. A flag that is not
given leaves no value behind, so that a run that goes on can tell what is asked anew.
"""

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from air.cli.config import DEFAULTS, PRESETS
from air.cli.flag_values import COUNT, NATURAL, POSITIVE, REAL, non_linearity, number
from air.training.trainer import LEARN_PRIOR_EVERY, LEARN_PRIOR_FROM


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and ends with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def build_parser(description: str) -> Parser:
    """A parser of the flags of model, training and output."""
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    _add_training(_adder(parser, "training"))
    _add_prior(_adder(parser, "prior"))
    _add_model(_adder(parser, "nets and windows"))
    output = _adder(parser, "evaluation and output")
    _add_output(output)
    _add_page(output)
    return parser


Add = Callable[..., None]


def _adder(parser: argparse.ArgumentParser, title: str) -> Add:
    """Adds flags to a group of the help, each with its default behind its meaning."""
    group = parser.add_argument_group(title)

    def add(*names: str, help: str, **options: Any) -> None:  # noqa: ANN401
        action = group.add_argument(*names, **options)
        default = DEFAULTS[action.dest]
        if isinstance(default, list | tuple):
            default = " ".join(map(str, default))
        switch = action.nargs == 0 and not isinstance(action, argparse.BooleanOptionalAction)
        shown = "" if default is None or switch else f" (default: {default})"
        action.help = f"{help}{shown}".replace("%", "%%")

    return add


def _add_training(add: Add) -> None:
    add("-n", "--num-steps", type=NATURAL, help="optimisation steps")
    add("-b", "--batch-size", type=COUNT, help="images in a step, of all processes")
    add("-lr", "--learning-rate", type=POSITIVE, help="of model and guide")
    add("-blr", "--baseline-learning-rate", type=POSITIVE, help="of the baseline's nets (score)")
    add(
        "--lr-schedule",
        choices=["constant", "cosine"],
        help="of both rates: constant, or falling to a hundredth at the last step",
    )
    add(
        "--clip-grad-norm",
        type=POSITIVE,
        help="bound on the gradient of model and guide, "
        "for a cost in nats per image (default: none)",
    )
    add(
        "--estimator",
        choices=["score", "marginal"],
        help="of the gradient through z_pres: score function with baselines, as in the paper, or "
        "the exact expectation over the count",
    )
    add(
        "--no-baselines",
        dest="use_baselines",
        action="store_false",
        help="train z_pres without data-dependent baselines (score)",
    )
    add("--baseline-scalar", type=REAL, help="multiplies the baseline's output (score; default: 1)")
    add("--restarts", type=NATURAL, help="times to start over from the next seed on collapse")
    add(
        "--seed",
        type=number(int, at_least=0, at_most=2**32 - 1),
        help="of the weights, the batches and the samples",
    )
    add("--device", help="auto, cpu, cuda, cuda:1, ... or mps; auto is cuda if there is one")
    add("--threads", type=COUNT, help="threads of a CPU; more may be faster on an idle machine")
    add("--cuda", dest="device", action="store_const", const="cuda", help="short for --device cuda")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the step, a minute or two (default: if --num-steps is 5000 or more)",
    )
    add("--jit", action="store_true", help="trace the step once by torch.jit")


def _add_prior(add: Add) -> None:
    probability = number(float, above=0, at_most=1)
    add("--z-pres-prior", type=probability, help="ratio k of the count prior p(n) ∝ k^n")
    add(
        "--z-pres-prior-raw",
        action="store_true",
        help="use --z-pres-prior as the probability of one more object at each step",
    )
    add(
        "--count-prior",
        type=POSITIVE,
        nargs="+",
        metavar="P",
        help="p(0) p(1) ... p(--model-steps) up to a factor, in place of --z-pres-prior",
    )
    add(
        "--learn-count-prior-from",
        type=NATURAL,
        metavar="STEP",
        help=f"from that step on, every {LEARN_PRIOR_EVERY}, set p(n) to the mean of q(n) over "
        f"up to {LEARN_PRIOR_FROM:,} training scenes (default: never; for when AIR counts well)",
    )
    add(
        "--anneal-prior",
        choices=["none", "lin", "exp"],
        help="move the probabilities of z_pres over training, linearly or at a constant rate",
    )
    add("--anneal-prior-to", type=probability, help="where to; below 1.2e-7 is 1.2e-7")
    add("--anneal-prior-begin", type=NATURAL, help="step at which it begins")
    add("--anneal-prior-duration", type=COUNT, help="steps it takes")
    add("--scale-prior-mean", type=POSITIVE, help="of s: 3 shrinks the window threefold")
    add("--scale-prior-sd", type=POSITIVE, help="standard deviation of s")
    add("--pos-prior-mean", type=REAL, help="of the shift x and y of the window")
    add("--pos-prior-sd", type=POSITIVE, help="standard deviation of x and y")
    add(
        "--likelihood",
        choices=["normal", "bernoulli"],
        help="of pixels: normal around the canvas, or bernoulli, on or off (binarised at 1/2)",
    )
    add("--likelihood-sd", type=POSITIVE, help="standard deviation of a pixel (normal)")


def _add_model(add: Add) -> None:
    sizes: dict[str, Any] = {"type": COUNT, "nargs": "*", "metavar": "SIZE"}
    add(
        "--preset",
        choices=[*PRESETS],
        help="scenes of that kind, with windows and priors that suit them; other flags go before",
    )
    add(
        "--guide",
        choices=["image", "difference"],
        help="what its steps see: the image, or the image minus what is painted so far (DAIR)",
    )
    add("-t", "--model-steps", type=COUNT, help="the most objects in a scene")
    add("--window-size", type=COUNT, help="side of the attention window in pixels")
    add("--encoder-latent-size", type=COUNT, help="size of an object's code z_what")
    add("--rnn-hidden-size", type=COUNT, help="size of the LSTMs' states")
    add("--encoder-net", **sizes, help="hidden layers from the window to z_what")
    add("--decoder-net", **sizes, help="hidden layers from z_what to the window")
    add("--predict-net", **sizes, help="hidden layers from the LSTM to z_pres and z_where")
    add(
        "--bl-predict-net",
        **sizes,
        help="hidden layers from the baseline's LSTM to its value (score)",
    )
    add(
        "--embed-net",
        **{**sizes, "nargs": "+"},
        help="layers between the image and the LSTMs (default: none)",
    )
    add("--non-linearity", type=non_linearity, metavar="NAME", help="between layers, of torch.nn")
    add("--decoder-output-bias", type=REAL, help="added before the decoder's sigmoid")
    add(
        "--decoder-output-use-sigmoid",
        action=argparse.BooleanOptionalAction,
        help="keep the decoder's output within (0, 1)",
    )
    add(
        "--no-masking",
        dest="use_masking",
        action="store_false",
        help="count the costs of finished steps too (score)",
    )


def _add_output(add: Add) -> None:
    add("--output-dir", metavar="DIR", help="folder of the run (default: runs/<time>-seed<k>)")
    add("--resume", metavar="RUN", help="go on with the run in that folder, with its settings")
    add("--load", metavar="FILE", help="begin with the weights in a checkpoint or weights file")
    add("--save", metavar="FILE", help="also write the weights alone to a new file")
    add("--save-every", type=NATURAL, help="steps between checkpoints; 0: only at the end")
    add("--progress-every", type=NATURAL, help="steps between progress records; 0: only the last")
    add("--eval-every", type=NATURAL, help="steps between evaluations; 0: only at the end")
    add("--eval-scenes", type=COUNT, help="held-out scenes in these; the last takes them all")
    add(
        "--evaluate",
        action="store_true",
        help="at the end, bound log p(x) by importance weighting and write evaluation.json; "
        "with -n 0 --load FILE of a model as it is",
    )
    add("--iwae-samples", type=COUNT, help="importance-weighted samples of each scene")
    add("--iwae-scenes", type=COUNT, help="held-out scenes in that bound, the first so many")
    add("--alarm-after", type=NATURAL, help="steps before a sign of collapse is an alarm")
    add(
        "--data",
        metavar="PATH",
        help="train on the scenes in an .npz file with x, uint8 [N, H, H] or [N, C, H, H], and, "
        "for the accuracies, counts, [N]; held out are its test_x, test_counts, ... or, where it "
        "has none, the last tenth, up to 10,000, with -n 0 all; from a folder of x.npy, "
        "counts.npy, ... or one .npy of images, batches are read as they are needed",
    )
    add("-v", "--verbose", action="store_true", help="print the nets and every setting")


def _add_page(add: Add) -> None:
    add(
        "--viz",
        action=argparse.BooleanOptionalAction,
        help="draw curves and scenes live on a visdom server",
    )
    add(
        "--viz-every",
        type=COUNT,
        help="steps between drawings, rounded up to --progress-every (default: 100, or more where "
        "drawing would take more than a twentieth of the time)",
    )
    add("--viz-log", metavar="FILE", help="record the drawings in a new file, to replay in visdom")
    add(
        "--visdom-env",
        metavar="NAME",
        help="visdom environment to draw in (default: air_ and the name of the run's folder)",
    )
    add(
        "--visdom-server",
        metavar="URL",
        help="address of the visdom server; a login is taken from VISDOM_USERNAME and "
        "VISDOM_PASSWORD",
    )
    add("--visdom-port", type=number(int, at_least=1, at_most=65535), help="its port")
