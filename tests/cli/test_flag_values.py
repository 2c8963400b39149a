"""What flags accept: from text, and from a configuration in a file."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from air.cli.flag_values import COUNT, NATURAL, POSITIVE, REAL, check_values, non_linearity, number


def test_text_becomes_numbers_within_bounds() -> None:
    assert [COUNT("1e4"), NATURAL("0"), POSITIVE("1e-9"), REAL("-2")] == [10_000, 0, 1e-9, -2.0]
    assert COUNT("9007199254740993") == 2**53 + 1  # which no float is
    for kind, text, expected in [
        (COUNT, "0", "a whole number of at least 1"),
        (COUNT, "1.5", "a whole number"),
        (POSITIVE, "0", "a number above 0"),
        (REAL, "nan", "a number"),
        (REAL, "inf", "a number"),
        (number(float, above=0, at_most=1), "1.1", "a number above 0, at most 1"),
    ]:
        with pytest.raises(argparse.ArgumentTypeError, match=f"expected {expected}.*got '{text}'"):
            kind(text)


def test_non_linearities_are_those_of_torch() -> None:
    assert non_linearity("ReLU") == "ReLU"
    for name in ("Linear", "relu", "__doc__", "MultiheadAttention"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected the name of an activation"):
            non_linearity(name)


def test_a_configuration_is_held_to_its_flags() -> None:
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.add_argument("--size", type=COUNT)
    parser.add_argument("--kind", choices=["a", "b"])
    parser.add_argument("--nets", type=COUNT, nargs="*")
    parser.add_argument("--pair", type=COUNT, nargs=2)
    parser.add_argument("--on", action="store_true")
    defaults = {"size": 3, "kind": "a", "nets": [4], "pair": None, "on": False}
    right: list[dict[str, Any]] = [{}, {"size": 5}, {"kind": "b", "nets": [], "on": True}]
    for config in [*right, {"pair": [1, 2]}]:
        check_values(parser, config, defaults, Path("file"))
    wrong = [{"size": 0}, {"size": "5"}, {"size": [5]}, {"kind": "c"}, {"nets": 4}, {"nets": [0]}]
    for config in [*wrong, {"on": 1}, {"pair": 3}]:
        with pytest.raises(ValueError, match=r"^file: --\w+ cannot be"):
            check_values(parser, config, defaults, Path("file"))
