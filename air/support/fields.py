"""Settings: each is declared once, with its default, its help, its bounds and its flag.

A settings class is a frozen dataclass whose fields are made by `setting`, and whose
``__post_init__`` calls `check_settings`. One check serves Python, files and command lines: it
raises a `SettingError`. `add_flags` makes the flags of a command line. Needs no torch.
"""

import argparse
import contextlib
import functools
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

# The value of a setting in a resumed run:
#   keep    the value of the run; a flag with another value is refused
#   free    the value of the flag or, without it, of the run
#   forget  the value of the flag or, without it, the default, because a file must not name files to
#           write or servers to reach
OnResume = Literal["keep", "free", "forget"]


class SettingError(ValueError):
    """A setting cannot have the value it was given.

    Attributes:
        name: The field of the settings class.
        problem: The accepted values and the given value, in words.
    """

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name}: {problem}")
        self.name, self.problem = name, problem


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The declaration of one field of a settings class."""

    help: str  # its meaning, for the help of a command line
    low: float = -math.inf  # least number, also of those in a list
    high: float = math.inf  # greatest number
    above: float = -math.inf  # exclusive lower bound
    length: tuple[int, int | None] = (0, None)  # least and greatest length of a list
    accepts: Callable[[Any], bool] = lambda value: True  # a further check, also of those in a list
    accepted: str = ""  # the accepted values in words; by default from type and bounds
    key: str = ""  # its name in a configuration; by default that of the field
    flag: str | None = None  # its long flag; None for the key with dashes, "" for no flag
    short: str | None = None  # its short flag
    metavar: str | None = None  # its placeholder in the help
    group: str | None = None  # its heading in the help of main.py; None for that of its class
    common: bool = False  # whether --help of main.py lists it, and not only --help-all
    only_in: str | None = None  # the only program that has its flag; None for all programs
    on_resume: OnResume = "keep"  # its value in a resumed run
    with_model: bool = False  # whether loaded weights bring its value along
    # Keys of settings that, when this flag is given, lose their value from a survey or from loaded
    # weights.
    overrides: Sequence[str] = ()

    # What follows from the field; `settings_of` fills it in.
    name: str = ""
    default: Any = None  # None means that the setting may be left open
    scalar: type = str  # int, float, str or bool; of a list, that of its elements
    is_list: bool = False
    is_optional: bool = False
    choices: tuple[str, ...] = ()

    @property
    def flags(self) -> list[str]:
        """Its flags, none if it has no flag."""
        long = self.flag
        if long is None:
            long = "--" + self.key.replace("_", "-")
        return [flag for flag in (self.short, long) if flag]

    @property
    def plain_default(self) -> Any:  # noqa: ANN401
        """Its default, as JSON has it."""
        return list(self.default) if isinstance(self.default, tuple) else self.default

    @property
    def expected(self) -> str:
        """The accepted values, or the accepted elements of a list, in words."""
        if self.accepted or self.choices:
            return self.accepted or " or ".join(self.choices)
        words = {int: "a whole number", float: "a number", str: "a text", bool: "yes or no"}
        text = words[self.scalar]
        text += f" above {self.above:.10g}" if self.above > -math.inf else ""
        text += f" of at least {self.low:.10g}" if self.low > -math.inf else ""
        return text + (f", at most {self.high:.10g}" if self.high < math.inf else "")

    def add_flag(self, group: "argparse._ArgumentGroup") -> None:
        """Adds its flag, if it has one. A flag that is not given leaves no value."""
        if not self.flags:
            return
        metavar = self.metavar or {int: "N", float: "X"}.get(self.scalar)
        options: dict[str, Any] = {"type": self.parse, "metavar": metavar}
        if self.scalar is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif self.choices:
            options = {"choices": self.choices}
        elif self.is_list:
            least, most = self.length
            options["nargs"] = most or ("+" if least else "*")
        help = self.help.replace("%", "%%")
        if self.default is not None and self.default is not False:
            default = self.default if self.is_list else [self.default]
            help += f" (default: {' '.join(map(str, default))})"
        options |= {"dest": self.key, "default": argparse.SUPPRESS}
        group.add_argument(*self.flags, help=help, **options)

    def parse(self, text: str) -> Any:  # noqa: ANN401
        """The value that a word of a command line stands for; 1e4 is a whole number too.

        Raises:
            argparse.ArgumentTypeError: If it stands for none.
        """
        value: Any = text
        if self.scalar in (int, float):
            with contextlib.suppress(ValueError):
                value = float(text)
                if self.scalar is int and value.is_integer():
                    value = int(value)
        if not self._accepts(value):
            raise argparse.ArgumentTypeError(f"expected {self.expected}, got {text!r}")
        return value

    def check(self, value: Any) -> None:  # noqa: ANN401
        """Checks a value from Python or from a file."""
        if value is None and self.is_optional:
            return
        least, most = self.length
        if self.is_list:
            fits = isinstance(value, list | tuple) and least <= len(value) <= (most or math.inf)
            fits = fits and all(map(self._accepts, value))
        else:
            fits = self._accepts(value)
        if not fits:
            length = f"a list of {most or 'values'}, each " if self.is_list else ""
            given = reprlib.repr(value)
            raise SettingError(self.name, f"expected {length}{self.expected}, got {given}")

    def _accepts(self, value: Any) -> bool:  # noqa: ANN401
        """Whether the setting can have this value, or its list this element."""
        types = int | float if self.scalar is float else self.scalar
        fits = isinstance(value, types) and isinstance(value, bool) == (self.scalar is bool)
        if fits and self.scalar in (int, float):
            fits = -math.inf < value < math.inf and value > self.above
            fits = fits and self.low <= value <= self.high
        return fits and (not self.choices or value in self.choices) and self.accepts(value)


def setting(default: Any, help: str, **about: Any) -> Any:  # noqa: ANN401
    """A dataclass field that is a setting; `Setting` has the keywords."""
    return field(default=default, metadata={"setting": Setting(help=help, **about)})


model_setting = functools.partial(setting, with_model=True)


def settings_of(cls: type) -> tuple[Setting, ...]:
    """The settings of a settings class, in their order."""
    hints = get_type_hints(cls)
    declared = []
    for spec in fields(cls):
        hint = hints[spec.name]
        options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        (hint,) = (option for option in options if option is not NoneType)
        is_list = isinstance(get_origin(hint), type)  # tuple[int, ...] or Sequence[int]
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        about = spec.metadata["setting"]
        declared.append(
            replace(
                about,
                name=spec.name,
                key=about.key or spec.name,
                default=spec.default,
                scalar=str if choices else get_args(hint)[0] if is_list else hint,
                is_list=is_list,
                is_optional=NoneType in options,
                choices=choices,
            )
        )
    return tuple(declared)


def check_settings(settings: object) -> None:
    """Checks every field of a settings object, in which NumPy's numbers become Python's."""
    for spec in settings_of(type(settings)):
        value = _to_plain(getattr(settings, spec.name))
        object.__setattr__(settings, spec.name, value)  # the object is frozen
        spec.check(value)


def from_config(cls: type[T], config: Mapping[str, Any]) -> T:
    """An object of a settings class from values by key; keys that are missing have defaults."""
    known = [spec for spec in settings_of(cls) if spec.key in config]
    return cls(**{spec.name: config[spec.key] for spec in known})


def add_flags(parser: argparse.ArgumentParser, title: str, cls: type) -> None:
    """Adds a group of flags, one for each setting of a settings class."""
    group = parser.add_argument_group(title)
    for spec in settings_of(cls):
        spec.add_flag(group)


def _to_plain(value: Any) -> Any:  # noqa: ANN401
    """NumPy scalars become Python's, also within a list; any other object stays the same."""
    if isinstance(value, list | tuple):
        return type(value)([_to_plain(element) for element in value])
    # JSON has no NumPy scalars, and those of few bits overflow in products of sizes.
    return value.item() if getattr(value, "shape", None) == () else value
