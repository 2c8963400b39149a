"""The house: imports run downwards only, type-only imports included.

From the ground up: a module may import those of the floors below its own, and of its own package.
"""

import ast
import functools
from pathlib import Path

import pytest
from helpers import ROOT

SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("air/**/*.py")])
FLOORS = (
    {"modules", "air.terminal", "air.support"},
    {"air"},  # air/*.py: the paper
    {"air.storage"},
    {"air.data", "air.evaluation"},
    {"air.training", "air.visualization"},
    {"multi_mnist"},
    {"air.cli", "air.tutorial"},
    {"air.detect", "viz"},
    {"main"},
)
ROOMS = set.union(*FLOORS)


def room_of(module: str) -> str:
    """The package or file of ours that a module belongs to; empty for a foreign one."""
    parts = module.split(".")
    for size in (2, 1):
        if (name := ".".join(parts[:size])) in ROOMS:
            return name
    return ""


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; those beside `air` by their own names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            # `from air.cli import flags` imports a module, `from air.air import AIR` does not.
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in inner if is_module(name)]
            names |= {*modules} or {node.module or ""}
    beside = {f"air.{path.stem}": path.stem for path in ROOT.glob("*.py")}
    return {beside.get(name, name) for name in names}


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    files = (path.with_suffix(".py"), path / "__init__.py", ROOT / path.with_suffix(".py").name)
    return any(file.is_file() for file in files)


def floor(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_run_downwards(path: Path) -> None:
    own = room_of(module_of(path))
    assert own, f"{path} is on no floor"
    if module_of(path) == "air":
        return  # the face of the package names what is below it
    for module in imports(path):
        room = room_of(module)
        if room and room != own:
            assert floor(room) < floor(own), f"{path.relative_to(ROOT)} imports {module}"


def test_no_circle() -> None:
    below = {module_of(path): imports(path) & {module_of(p) for p in SOURCES} for path in SOURCES}
    below = {name: names - {name} for name, names in below.items() if name != "air"}
    while leaves := {name for name, names in below.items() if not names & below.keys()}:
        below = {name: names for name, names in below.items() if name not in leaves}
    assert not below, f"a circle among {sorted(below)}"
