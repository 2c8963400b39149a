"""The house: imports run downhill only, files and functions stay short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("air/*.py")])
OURS = {"air", "main", "modules", "multi_mnist", "viz"}
ALLOWED = {
    "modules": set(),
    "multi_mnist": {"air"},  # of it only what needs no torch
    "viz": {"air"},
    "air": {"air", "modules"},
    "main": OURS - {"main"},
}


def imports(path: Path) -> set[str]:
    """Top-level names of all that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: write absolute imports"
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


def place(path: Path) -> str:
    return "air" if path.parent.name == "air" else path.stem


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_imports_run_downhill(path: Path) -> None:
    uphill = imports(path) & OURS - ALLOWED[place(path)]
    assert not uphill, f"{path.name} imports {', '.join(sorted(uphill))}"


def test_scenes_are_made_without_torch() -> None:
    code = "import sys, multi_mnist; sys.exit('torch' in sys.modules or 'pyro' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name != "__init__":
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 50, f"{path.name}: {node.name} has {length} lines"


def test_every_source_has_its_tests() -> None:
    tests = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    for path in SOURCES:
        if path.stem != "__init__":
            assert f"test_{path.stem}" in tests, f"nothing tests {path.name}"
