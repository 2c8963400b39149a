"""Settings: one declaration gives defaults, flags, and the check of values from anywhere."""

import argparse
import re
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from air.support.fields import (
    SettingError,
    add_flags,
    check_settings,
    from_config,
    setting,
    settings_of,
)
from air.support.model_settings import ModelSettings, is_activation


@dataclass(frozen=True)
class Example:
    """One setting of each type."""

    size: int = setting(3, "a count", low=1, short="-s")
    share: float = setting(0.5, "a share of 100 %", above=0, high=1)
    shift: float | None = setting(None, "any number (default: none)")
    kind: Literal["a", "b"] = setting("a", "one of two", key="sort")
    nets: tuple[int, ...] = setting((4,), "sizes", low=1)
    pair: tuple[int, ...] | None = setting(None, "two of them", low=0, length=(2, 2))
    on: bool = setting(False, "a switch", flag="--switch")
    hidden: int = setting(1, "no flag", flag="")

    def __post_init__(self) -> None:
        check_settings(self)


def parse(line: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_flags(parser, "example", Example)
    return vars(parser.parse_args(line.split()))


def by_name(name: str) -> Any:  # noqa: ANN401
    return next(spec for spec in settings_of(Example) if spec.name == name)


def test_text_becomes_numbers_within_bounds() -> None:
    assert parse("-s 1e4 --share 1e-9 --shift -2 --sort b --nets --pair 1 2 --no-switch") == {
        "size": 10_000, "share": 1e-9, "shift": -2.0, "sort": "b", "nets": [], "pair": [1, 2],
        "on": False,
    }  # fmt: skip
    for name, text, expected in [
        ("size", "0", "a whole number of at least 1"),
        ("size", "1.5", "a whole number"),
        ("share", "0", "a number above 0, at most 1"),
        ("share", "1.1", "a number above 0, at most 1"),
        ("shift", "nan", "a number"),
        ("shift", "inf", "a number"),
    ]:
        with pytest.raises(argparse.ArgumentTypeError, match=f"expected {expected}.*got '{text}'"):
            by_name(name).parse(text)


def test_a_flag_that_is_not_given_leaves_no_value() -> None:
    assert parse("") == {}
    assert from_config(Example, {}) == Example()
    assert by_name("nets").plain_default == [4]  # as JSON has it


def test_help_shows_meaning_and_default() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, "example", Example)
    text = parser.format_help()
    assert re.search(r"-s N, --size N +a count \(default: 3\)", text)
    assert "a share of 100 % (default: 0.5)" in text
    assert "(default: 4)" in text
    assert "None" not in text
    assert "hidden" not in text


@pytest.mark.parametrize(
    "config",
    [
        {}, {"size": 5}, {"sort": "b", "nets": [], "on": True}, {"pair": [1, 2]}, {"share": 1},
        {"pair": None, "shift": None, "unknown": object()},
    ],
)  # fmt: skip
def test_a_configuration_from_a_file_is_taken(config: dict[str, Any]) -> None:
    taken = vars(from_config(Example, config))
    for spec in settings_of(Example):
        assert taken[spec.name] == config.get(spec.key, spec.default)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", 0), ("size", "5"), ("size", [5]), ("size", None), ("size", True), ("size", 2.5),
        ("size", {}), ("share", float("nan")), ("share", 10**400), ("kind", "c"), ("nets", 4),
        ("nets", [0]), ("nets", ["x"]), ("on", 1), ("on", "yes"), ("pair", 3), ("pair", [1]),
        ("pair", [1, 2, 3]),
    ],
)  # fmt: skip
def test_a_value_that_a_setting_cannot_have_is_named(name: str, value: Any) -> None:  # noqa: ANN401
    with pytest.raises(SettingError, match=f"^{name}: expected .*, got ") as refused:
        from_config(Example, {by_name(name).key: value})
    assert refused.value.name == name


def test_activations_are_those_of_torch() -> None:
    assert ModelSettings(non_linearity="Tanh").non_linearity == "Tanh"
    for name in ("Linear", "relu", "__doc__", "MultiheadAttention"):
        assert not is_activation(name)
        with pytest.raises(SettingError, match="expected the name of an activation"):
            ModelSettings(non_linearity=name)
