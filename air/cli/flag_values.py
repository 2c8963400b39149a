"""What the values of flags may be, on the command line and in a file."""

import argparse
import math
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn


def number(
    kind: type, at_least: float = -math.inf, at_most: float = math.inf, above: float = -math.inf
) -> Callable[[str], Any]:
    """A converter of a flag's text to a finite number within bounds; 1e4 is a whole number too."""
    expected = "a whole number" if kind is int else "a number"
    if above > -math.inf:
        expected += f" above {above:g}"
    if at_least > -math.inf:
        expected += f" of at least {at_least:g}"
    if at_most < math.inf:
        expected += f", at most {at_most:g}"

    def convert(text: str) -> Any:  # noqa: ANN401
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        right = math.isfinite(value) and at_least <= value <= at_most and value > above
        if not right or (kind is int and value != int(value)):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return int(text) if kind is int and text.lstrip("+-").isdigit() else kind(value)

    return convert


COUNT, NATURAL = number(int, at_least=1), number(int, at_least=0)
REAL, POSITIVE = number(float), number(float, above=0)


def non_linearity(name: str) -> str:
    """A converter of a flag's text to the name of a class of ``torch.nn``."""
    candidate = getattr(nn.modules.activation, name, None)
    try:
        if isinstance(candidate, type) and issubclass(candidate, nn.Module):
            candidate()
            return name
    except TypeError:
        pass
    raise argparse.ArgumentTypeError(
        f"expected the name of an activation of torch.nn without arguments, such as ReLU, "
        f"got {name!r}"
    )


def check_values(
    parser: argparse.ArgumentParser,
    config: Mapping[str, Any],
    defaults: Mapping[str, Any],
    source: Path,
) -> None:
    """Holds a configuration from a file to what its flags accept.

    Raises:
        ValueError: For the first value that its flag would refuse.
    """
    for action in parser._actions:
        value = config.get(action.dest, defaults.get(action.dest))
        if value is None and defaults.get(action.dest) is None:
            continue
        listed = action.nargs not in (None, 0)
        switch = action.nargs == 0 and not isinstance(action.const, str)
        fits = isinstance(value, list | tuple) == listed and isinstance(value, bool) == switch
        if not fits or not all(_accepts(action, one) for one in (value if listed else [value])):
            raise ValueError(
                f"{source}: {action.option_strings[-1]} cannot be {reprlib.repr(value)}"
            )


def _accepts(action: argparse.Action, value: Any) -> bool:  # noqa: ANN401
    if isinstance(value, bool):
        return True
    if not isinstance(value, int | float | str) or (action.choices and value not in action.choices):
        return False
    if action.type is None:
        return isinstance(value, str)
    try:
        kind: Any = action.type
        meant = kind(str(value))
        return bool(meant == value or (isinstance(meant, Path) and isinstance(value, str)))
    except (ValueError, argparse.ArgumentTypeError):
        return False
