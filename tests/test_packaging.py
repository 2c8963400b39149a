"""The package that ``pip install .`` makes: complete, with its requirements, usable elsewhere."""

import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
from helpers import ROOT
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOWER_BOUNDS = {">=", ">", "~=", "=="}
LOAD_COMMANDS = """
import runpy, sys
from importlib.metadata import distribution
from air import AIR
for command in distribution("air").entry_points:
    function = command.load()
    assert callable(function)
    print(command.name, sys.modules[function.__module__].__file__)
print({"visdom", "matplotlib.pyplot"} & set(sys.modules))
del sys.modules["air.detect"]  # as if it was never imported, for which Python warns otherwise
sys.argv = ["air.detect", "--help"]
runpy.run_module("air.detect", run_name="__main__", alter_sys=True)  # as `python -m` does
"""


def requirements(name: str) -> set[Requirement]:
    lines = [line.split(" #")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return {Requirement(line) for line in lines if line and not line.startswith(("#", "-r"))}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed package, built from a copy: building writes into its sources."""
    sources, target = (tmp_path_factory.mktemp(name) for name in ("sources", "target"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, sources)
    shutil.copytree(ROOT / "air", sources / "air", ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target"]
    command = [sys.executable, "-m", "pip", "install", *options, str(target), str(sources)]
    subprocess.run(command, check=True)
    return target


@pytest.fixture
def distribution(installed: Path) -> PathDistribution:
    (folder,) = installed.glob("air-*.dist-info")
    return PathDistribution(folder)


def elsewhere(installed: Path, folder: Path, code: str) -> str:
    """The output of Python in another folder, where only the installed copy can be imported.

    The backend of matplotlib is one that is not installed, as in the shell of a notebook.
    """
    environment = {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PATH": "",
        "HOME": str(folder),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PYTHONPATH": str(installed), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_and_pretrained_model_is_installed(installed: Path) -> None:
    found = *ROOT.glob("*.py"), *(ROOT / "air").rglob("*.py"), *ROOT.glob("air/pretrained/*.*")
    ours = {path.relative_to(ROOT) for path in found}
    assert {path for path in ours if not (installed / path).is_file()} == set()


def test_the_metadata_is_complete(distribution: PathDistribution) -> None:
    metadata = distribution.metadata
    for key, field in (("name", "Name"), ("version", "Version"), ("description", "Summary")):
        assert metadata[field] == PROJECT[key]
    assert metadata["License-Expression"] == PROJECT["license"] == "Apache-2.0"
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert distribution.read_text("licenses/LICENSE") == (ROOT / "LICENSE").read_text()


def test_the_package_requires_what_requirements_txt_lists(distribution: PathDistribution) -> None:
    required = {Requirement(line) for line in distribution.requires or ()}
    extras = {each for each in required if "extra ==" in str(each.marker)}
    assert required - extras == requirements("requirements.txt")
    named = {(each.name, str(each.specifier)) for each in extras}
    dev = {(each.name, str(each.specifier)) for each in requirements("requirements-dev.txt")}
    assert named == {("h5py", ">=3.8")} <= dev


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_every_requirement_has_a_lower_bound(name: str) -> None:
    listed = requirements(name)
    assert listed
    for requirement in listed:
        assert {bound.operator for bound in requirement.specifier} & LOWER_BOUNDS, requirement


def test_the_package_and_its_commands_work_in_another_folder_without_slow_imports(
    installed: Path, tmp_path: Path
) -> None:
    """In one process, for each takes seconds to import torch and Pyro."""
    scripts = PROJECT["scripts"]
    lines = elsewhere(installed, tmp_path, LOAD_COMMANDS).splitlines()
    homes = dict(line.split(" ", 1) for line in lines[: len(scripts)])
    assert homes.keys() == scripts.keys()
    for name, home in homes.items():
        module = scripts[name].split(":")[0]
        beside = ROOT / f"{module.removeprefix('air.')}.py"  # such files lie beside the package
        place = beside.name if beside.exists() else f"{module.replace('.', '/')}.py"
        assert Path(home) == installed / place
    imported, *shown = lines[len(scripts) :]
    assert imported == "set()"  # neither visdom nor pyplot
    assert shown[0].startswith("usage: ")
    assert "--load" in "".join(shown)


def test_files_with_the_names_of_ours_are_never_taken_for_ours(
    installed: Path, tmp_path: Path
) -> None:
    """Also where the program imports its own first."""
    names = [path.stem for path in ROOT.glob("*.py")]
    for name in names:
        (tmp_path / f"{name}.py").write_text("OWN = True\n")
    own = f"import {', '.join(names)}\n"
    code = f"""{own}from air import AIR
import pickle, runpy, sys
from air.main import main
from air.multi_mnist import load_scenes
assert all(sys.modules[name].OWN for name in {names!r})
air = AIR(num_steps=1, x_size=8, window_size=4, z_what_size=2, rnn_hidden_size=4)
assert type(pickle.loads(pickle.dumps(air)).encode) is type(air.encode)
for run in (lambda: main(["--help"]), lambda: runpy.run_module("air.detect", run_name="__main__")):
    sys.argv = ["air", "--help"]
    try:
        run()
    except SystemExit as ended:
        print("ended", ended.code)"""
    printed = elsewhere(installed, tmp_path, code).splitlines()
    assert printed.count("ended 0") == 2


def test_the_citation_has_the_version_and_licence_of_the_package() -> None:
    fields = dict(re.findall(r"^(\w+): (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M))
    assert (fields["version"], fields["license"]) == (PROJECT["version"], PROJECT["license"])
