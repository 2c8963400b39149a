"""The README keeps its promises: its commands, flags, links and programs work as written."""

import contextlib
import csv
import json
import re
import runpy
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import programs
import pytest
import torch
from helpers import ROOT, SMALL, Run, run
from PIL import Image

import air.detect
from air import multi_mnist
from air.cli.flags import build_parser
from air.storage.checkpoint import load_air
from air.storage.run_folder import RunFolder

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "tests/benchmarks/README.md"
FLAGS_OF_OTHER_PROGRAMS = {
    "--nproc-per-node", "--out", "--figure", "--gif", "--help", "--drop-cut", "--crops", "--codes",
    "--tile", "--kinds",
}  # fmt: skip


def block(before: str, language: str) -> str:
    """The first fenced block of that language after some text."""
    found = re.search(rf"^```{language}\n(.*?)^```$", README.split(before, 1)[1], re.M | re.S)
    assert found, f"no {language} block after {before!r}"
    return found[1]


def start(program: Path, line: str, environment: dict[str, str]) -> dict[str, Any]:
    """Runs a program in this process, which has imported torch and Pyro."""
    with (
        contextlib.chdir(program.parent),
        mock.patch.dict("os.environ", environment),
        mock.patch("sys.argv", [program.name, *line.split()]),
        mock.patch("sys.exit") as ended,
        programs.draw_no_figures(),
    ):
        names = runpy.run_path(str(program), run_name="__main__")
    assert ended.call_args in (None, mock.call(0))
    return names


def test_the_readme_is_short() -> None:
    assert len(README.encode()) <= 10_000


@pytest.mark.parametrize("marker", ["look", "train", "test", "pictures"])
def test_the_commands_are_valid_shell(marker: str) -> None:
    assert re.search(rf"^<!-- {marker} -->\n```sh$", README, re.M)
    commands = block(f"<!-- {marker} -->", "sh")
    subprocess.run(["bash", "-n"], input=commands.encode(), check=True)


def test_the_first_command_finds_objects(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = re.findall(r"^python -m air\.detect (.*)$", block("<!-- look -->", "sh"), re.M)
    line = line.replace("found.png", str(tmp_path / "found.png"))
    with contextlib.chdir(ROOT):
        assert air.detect.main(line.split()) == 0
    printed = capsys.readouterr()
    found = [json.loads(each)["count"] for each in printed.out.splitlines()]
    assert len(found) == 8
    assert max(found) > 5
    assert "WARNING" not in printed.err
    assert (tmp_path / "found.png").exists()


def test_three_commands_find_objects_in_pictures(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    script = block("<!-- pictures -->", "sh").replace("\\\n", " ")
    for of_readme, smaller in (  # counts right from some 40 steps on
        ("--num-scenes 3000", "--num-scenes 1000"),
        ("--num-test-scenes 500", "--num-test-scenes 200"),
        ("-n 1000", "-n 80 -b 32"),
    ):
        assert of_readme in script
        script = script.replace(of_readme, smaller)
    mains = {
        "multi_mnist.py": multi_mnist.main,
        "main.py": None,
        "-m air.detect": air.detect.main,
    }
    commands = [each for each in script.splitlines() if shlex.split(each, comments=True)]
    for command, (program, main) in zip(commands, mains.items(), strict=True):
        line, _, target = command.partition(" > ")
        flags = " ".join(shlex.split(line, comments=True)).removeprefix(f"python {program} ")
        done = run(flags, tmp_path, environment, main)
        assert done.returncode == 0, done.stderr
        if target:
            (tmp_path / target).write_text(done.stdout)
    records = RunFolder(tmp_path / "runs/first").read_metrics()
    assert [r["accuracy_mode"] for r in records if "accuracy_mode" in r][-1] >= 0.9
    with (tmp_path / "pictures/counts.csv").open() as file:
        true = {row["name"]: int(row["count"]) for row in csv.DictReader(file)}
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    right = [true[each["image"].removeprefix("pictures/")] == each["count"] for each in found]
    assert len(right) == sum(name.startswith("test/") for name in true)
    assert np.mean(right) >= 0.9
    with Image.open(tmp_path / "found.png") as figure:
        assert figure.width > 500


def test_every_command_of_main_parses() -> None:
    lines = re.findall(r"(?:python|torchrun [^`\n]*?) main\.py([^`>\n]*)", README)
    lines += re.findall(r"^\| `main\.py([^`]*)`", README, re.M)
    assert len(lines) >= 8
    for line in lines:
        build_parser().parse_args(shlex.split(line, comments=True))


def test_every_flag_exists() -> None:
    known = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", build_parser().format_help()))
    named = set(re.findall(r"(?<![\w!<-])--[a-z][a-z-]*", README))
    named |= set(re.findall(r"`(-[a-z]+)[ `]", README))
    assert named - FLAGS_OF_OTHER_PROGRAMS <= known


@pytest.mark.parametrize("page", [ROOT / "README.md", RESULTS], ids=["front", "results"])
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text())
    assert links
    for name, anchor in links:
        target = page.parent / name if name else page
        assert target.exists(), name
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]


def test_every_file_of_the_reading_order_exists() -> None:
    named = re.findall(r"`([\w/]+\.(?:py|txt))`", README)
    assert len(named) > 10
    assert all((ROOT / name).exists() for name in named)


def test_the_python_example_runs(tmp_path: Path, environment: dict[str, str]) -> None:
    program = tmp_path / "example.py"
    check = "\nassert len(found.counts) == 10 and loss == loss and len(z[0]) == 3\n"
    code = block("## From Python", "python")
    assert "SceneSettings()" in code  # of which the scenes take long to draw
    program.write_text(code.replace("SceneSettings()", "SceneSettings(num_scenes=500)") + check)
    start(program, "", environment)


def test_the_example_of_a_user_defined_net_trains_resumes_and_detects(
    tmp_path: Path, environment: dict[str, str], succeeds: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "my_air.py"
    program.write_text(block("## Your own net", "python"))
    flags = f"{SMALL} --estimator score --output-dir run"
    my_air = SimpleNamespace(**start(program, flags, environment))
    succeeds("--resume run -n 6", nets=my_air.nets)

    checkpoint = tmp_path / "run/checkpoint.pt"
    model = load_air(checkpoint, nets=my_air.nets)
    assert isinstance(model.encode, my_air.ConvEncoder)
    images = np.zeros((2, 50, 50), np.uint8)
    found = air.detect.detect(model, torch.from_numpy(images))
    np.savez(tmp_path / "scenes.npz", x=images)
    capsys.readouterr()
    arguments = ["--load", str(checkpoint), str(tmp_path / "scenes.npz")]
    assert air.detect.main(arguments, nets=my_air.nets) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [image["count"] for image in printed] == [each.count for each in found]
