"""The flags of main.py. Every flag of Pyro's AIR example is among them, with its meaning."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from air.data.synthetic.scene_settings import FolderSettings, SceneSettings
from air.data.user_images.preparation import ImageSettings
from air.storage.pretrained import names
from air.support.fields import Setting, SettingError, check_settings, setting, settings_of
from air.support.model_settings import ModelSettings
from air.training.ranks import rank, world_size
from air.training.training_settings import TrainingSettings

_input = partial(setting, group="data", common=True)
_evaluation = partial(setting, group="evaluation", on_resume="free")
_page = partial(setting, group="live page", on_resume="forget")


@dataclass(frozen=True)
class ProgramSettings:
    """The files to read and write, how to evaluate, and the live page."""

    data: str | None = _input(
        None,
        "train on your own images: a folder of pictures, a .npz, .npy, .h5 or .pt file with an "
        "array x of images, or a folder with x.npy. If true counts are known, count accuracies are "
        "reported. The images in the subfolder test or the array test_x are held out; if there are "
        "none, a tenth of the images is (with -n 0, all)",
        metavar="PATH",
        on_resume="free",
    )
    survey: bool = _input(
        True,
        "look at the training images first, without labels, and set what follows from them, unless "
        "it is set by a flag; --no-survey takes the defaults below, and begins from scratch",
        on_resume="free",
    )
    suggest: bool = _input(False, "only print what the survey finds, and exit", on_resume="free")
    device: str = setting(
        "auto",
        "device: cpu, cuda, cuda:1, ..., mps, or auto for cuda if available and cpu otherwise",
        metavar="DEVICE",
        group="training",
        common=True,
        on_resume="free",
    )
    # Two threads take 0.6 to 0.8 of the time of one on two idle cores, but 2.7 times as long where
    # a second run does the same (tests/benchmarks).
    threads: int = setting(
        1,
        "number of CPU threads; more than 1 is faster only on an idle machine",
        low=1,
        group="training",
        on_resume="free",
    )
    evaluate: bool = _evaluation(
        False,
        "after training, compute a lower bound on log p(x) by importance weighting and write "
        "evaluation.json; with -n 0 --load FILE, evaluate a model without training",
        common=True,
    )
    iwae_samples: int = _evaluation(
        100, "importance-weighted samples per scene of --evaluate", low=1
    )
    refine: bool = _evaluation(
        False,
        "after training, improve the latents of held-out scenes that the guide explains badly, "
        "count again, and write refined.json",
        common=True,
    )
    output_dir: str | None = setting(
        None,
        "new folder for the files of the run (default: runs/<time>-seed<k>)",
        metavar="DIR",
        common=True,
    )
    resume: str | None = setting(
        None,
        "resume the run in this folder, with its settings",
        metavar="RUN",
        common=True,
        on_resume="free",
    )
    load: str | None = setting(
        None,
        "begin with the weights in a checkpoint or a file of weights, or with a pretrained model "
        f"({', '.join(names())}); without --data, also with the scenes of its training",
        metavar="FILE",
        common=True,
    )
    save: str | None = setting(
        None, "also write the weights alone to a new file", metavar="FILE", on_resume="forget"
    )
    verbose: bool = setting(False, "print the nets and all settings", short="-v", on_resume="free")
    viz: bool = _page(False, "draw curves and scenes live on a visdom server", common=True)
    viz_every: int | None = _page(
        None,
        "steps between drawings, rounded up to a multiple of --progress-every (default: 100)",
        low=1,
        on_resume="free",
    )
    visdom_env: str | None = _page(
        None,
        "visdom environment to draw in (default: air_ and the name of the run's folder)",
        metavar="NAME",
    )
    visdom_server: str = _page(
        "http://localhost:8097",
        "address of the visdom server; if it needs a login, set VISDOM_USERNAME and "
        "VISDOM_PASSWORD",
        metavar="URL",
    )

    def __post_init__(self) -> None:
        check_settings(self)


LEGACY = "compatibility with Pyro's example"
SETTINGS = {  # settings classes, and the group of their flags unless a setting names another
    ImageSettings: "data",
    ModelSettings: "model",
    TrainingSettings: "training",
    ProgramSettings: "output",
    SceneSettings: "generated scenes",
    FolderSettings: "generated scenes",
}
GROUPS = (
    *("data", "model", "training", "evaluation", "output", "live page", "generated scenes"),
    LEGACY,
)
ALIASES = {  # further flags of Pyro's example: key, value and help
    "--cuda": ("device", "cuda", "same as --device cuda"),
    "--jit": ("compile", True, "same as --compile"),
    "--no-baseline": ("use_baselines", False, "same as --no-baselines"),
}
FLAGS: dict[str, Setting] = {  # the settings that have a flag, by key
    spec.key: spec
    for cls in SETTINGS
    for spec in settings_of(cls)
    if spec.flags and spec.only_in is None
}
DEFAULTS: dict[str, Any] = {key: spec.plain_default for key, spec in FLAGS.items()}


class Parser(argparse.ArgumentParser):
    """Reports an error in one line, with exit code 2."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # noqa: ANN401
        """Expands ~ in --flag=~/folder too, where a shell leaves it as it is."""
        words = sys.argv[1:] if args is None else args
        words = [
            f"{flag}={os.path.expanduser(value)}" if value.startswith("~") else word
            for word in words
            for flag, _, value in [word.partition("=")]
        ]
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        self.fail(2, f"error: {message}")

    def fail(self, code: int, message: str) -> NoReturn:
        """Prints the message in one line, which names the rank if there are several, and exits."""
        # Spaces remain: they may be those of a path in a command to copy.
        line = " ".join(part.strip() for part in message.splitlines() if part.strip())
        where = f"rank {rank()}: " if world_size() > 1 else ""
        self.exit(code, f"{self.prog}: {where}{line}\n")


class _Help(argparse.Action):
    """Prints the common flags or, if `const` is true, all."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        build_parser(parser.description or "", only_common=not self.const).print_help()
        parser.exit()


def build_parser(description: str = "", only_common: bool = False) -> Parser:
    """A parser of the flags. A flag that is not given leaves no value."""
    parser = Parser(
        usage="%(prog)s [FLAG [VALUE ...]] ...",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    helps: dict[str, Any] = {"action": _Help, "nargs": 0, "default": argparse.SUPPRESS}
    parser.add_argument("-h", "--help", help="list the common flags and exit", **helps)
    parser.add_argument("--help-all", const=True, help="list all flags and exit", **helps)
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    flags = [
        (spec, groups[spec.group or title])
        for cls, title in SETTINGS.items()
        for spec in settings_of(cls)
        if spec.key in FLAGS and (spec.common or not only_common)
    ]
    for spec, group in sorted(flags, key=lambda flag: not flag[0].common):
        spec.add_flag(group)
    for flag, (key, value, help) in ALIASES.items() if not only_common else ():
        groups[LEGACY].add_argument(
            flag, dest=key, action="store_const", const=value, default=argparse.SUPPRESS, help=help
        )
    return parser


@contextmanager
def settings_named_by_flag(cls: type) -> Iterator[None]:
    """Turns a `SettingError` about a setting of this class into a `ValueError` about its flag."""
    try:
        yield
    except SettingError as error:
        flag = next((s.flags[-1] for s in settings_of(cls) if s.name == error.name and s.flags), "")
        raise ValueError(f"{flag or error.name}: {error.problem}") from error
