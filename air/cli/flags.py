"""The flags of main.py. Every flag of Pyro's AIR example is among them, with its meaning."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from air.cli.presets import PRESETS
from air.data.user_images.preparation import ImageSettings
from air.model_settings import ModelSettings
from air.settings import SettingError, add_flags, check_settings, defaults, setting, settings_of
from air.training.settings import TrainingSettings
from multi_mnist import FolderSettings, SceneSettings


@dataclass(frozen=True)
class ProgramSettings:
    """Where to read and write, how to evaluate and what to show."""

    output_dir: str | None = setting(
        None, "folder of the run (default: runs/<time>-seed<k>)", metavar="DIR"
    )
    resume: str | None = setting(
        None, "resume the run in this folder, with its settings", metavar="RUN"
    )
    load: str | None = setting(
        None, "begin with the weights in a checkpoint or weights file", metavar="FILE"
    )
    save: str | None = setting(None, "also write the weights alone to a new file", metavar="FILE")
    data: str | None = setting(
        None,
        "train on images of one's own: a folder of pictures, a .npz, .npy, .h5 or .pt file of "
        "images x, or a folder of x.npy, which is read as it is needed. With counts, [N], count "
        "accuracies are shown. The images test_x, or those in the subfolder test, are held out or, "
        "without them, a tenth, or with -n 0 all",
        metavar="PATH",
    )
    suggest: bool = setting(
        False, "look at the images of --data, print a command that suits them, and end"
    )
    preset: str | None = setting(
        None,
        "kind of scenes, with windows and priors that suit it; other flags override the preset. "
        "With --data, add what --suggest says",
        accepts=PRESETS.__contains__,
        expected=" or ".join(PRESETS),
        metavar=f"{{{','.join(PRESETS)}}}",
    )
    restarts: int = setting(0, "times to start over with the next seed after a collapse", low=0)
    device: str = setting(
        "auto", "device: auto, cpu, cuda, cuda:1, ... or mps; auto is cuda if available"
    )
    # Two threads take 0.6 to 0.8 of the time of one on two idle cores, but 2.7 times as long where
    # a second run does the same (tests/benchmarks).
    threads: int = setting(1, "threads of a CPU; more are faster on an idle machine only", low=1)
    evaluate: bool = setting(
        False,
        "at the end, bound log p(x) by importance weighting and write evaluation.json; with -n 0 "
        "--load FILE, of a model without further training",
    )
    refine: bool = setting(
        False,
        "at the end, count the held-out scenes by latents that are fitted where the guide explains "
        "a scene badly, and merged where two windows hold one object; write refined.json",
    )
    iwae_samples: int = setting(100, "importance-weighted samples of each scene", low=1)
    iwae_scenes: int = setting(2000, "held-out scenes in that bound", low=1)
    viz: bool = setting(False, "draw curves and scenes live on a visdom server")
    viz_every: int | None = setting(
        None, "steps between drawings, rounded up to --progress-every (default: 100)", low=1
    )
    viz_log: str | None = setting(
        None, "record the drawings in a new file, to replay in visdom", metavar="FILE"
    )
    visdom_env: str | None = setting(
        None,
        "visdom environment to draw in (default: air_ and the name of the run's folder)",
        metavar="NAME",
    )
    visdom_server: str = setting(
        "http://localhost",
        "address of the visdom server; a login is taken from VISDOM_USERNAME and VISDOM_PASSWORD",
        metavar="URL",
    )
    visdom_port: int = setting(8097, "port of the visdom server", low=1, high=65535)
    verbose: bool = setting(False, "print the nets and every setting", short="-v")

    def __post_init__(self) -> None:
        check_settings(self)


SETTINGS = {  # x_size and channels have the defaults of the later class, for scenes made here
    "training": TrainingSettings,
    "images of one's own": ImageSettings,
    "model": ModelSettings,
    "evaluation and output": ProgramSettings,
    "scenes": SceneSettings,
    "folders of the scenes": FolderSettings,
}
Config = dict[str, Any]  # every flag's value by key, as JSON has them
DEFAULTS: Config = {key: value for cls in SETTINGS.values() for key, value in defaults(cls).items()}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and ends with exit code 2.

    With `quiet` it prints nothing: of several processes, only rank 0 speaks.
    """

    quiet = False

    def error(self, message: str) -> NoReturn:
        # Spaces remain: they may be those of a path in a command to copy.
        line = " ".join(part.strip() for part in message.splitlines() if part.strip())
        self.exit(2, f"{self.prog}: error: {line}\n")

    def _print_message(self, message: str, file: Any = None) -> None:  # noqa: ANN401
        if not self.quiet:
            super()._print_message(message, file)


def build_parser(description: str = "", quiet: bool = False) -> Parser:
    """A parser of all flags. A flag that is not given leaves no value."""
    parser = Parser(
        usage="%(prog)s [FLAG [VALUE ...]] ...",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.quiet = quiet
    for title, cls in SETTINGS.items():
        add_flags(parser, title, cls)
    aliases = parser.add_argument_group("short for other flags")
    aliases.add_argument(
        "--cuda", dest="device", action="store_const", const="cuda", help="--device cuda"
    )
    aliases.add_argument(
        "--no-baseline", dest="use_baselines", action="store_false", help="--no-baselines"
    )
    return parser


@contextmanager
def settings_named_by_flag(cls: type) -> Iterator[None]:
    """Turns a `SettingError` about a setting of this class into a message about its flag."""
    try:
        yield
    except SettingError as error:
        flag = next((s.flags[-1] for s in settings_of(cls) if s.name == error.name and s.flags), "")
        raise ValueError(f"{flag or error.name}: {error.problem}") from error
