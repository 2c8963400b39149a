"""A first hour: from a folder of pictures to the objects in them, by the commands of the README."""

import contextlib
import csv
import io
import json
import re
import shlex
import subprocess
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from helpers import ROOT, run
from PIL import Image

import air.detect
from air import multi_mnist

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text()


def run_command(line: str, folder: Path, environment: dict[str, str]) -> str:
    """Runs a command of the README, or those of a script, in this process; what it printed."""
    program, *words = shlex.split(line, comments=True)
    if program == "sh":
        script = (folder / words[0]).read_text()
        subprocess.run(["sh", "-n"], input=script.encode(), check=True)
        return "".join(run_command(each, folder, environment) for each in logical_lines(script))
    assert program == "python"
    if words[0] == "main.py":
        done = run(" ".join(words[1:]), folder, environment)
        assert done.returncode == 0, done.stderr
        return done.stdout
    main = {"multi_mnist.py": multi_mnist.main, "-m": air.detect.main}[words.pop(0)]
    if main == air.detect.main:
        assert words.pop(0) == "air.detect"
    with (
        contextlib.chdir(folder),
        mock.patch.dict("os.environ", environment),
        contextlib.redirect_stdout(io.StringIO()) as said,
    ):
        assert not main(words)
    return said.getvalue()


def logical_lines(script: str) -> list[str]:
    lines = script.replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def test_pictures_training_and_objects_in_three_commands(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    block = re.search(r"^<!-- pictures -->\n```sh\n(.*?)^```$", README, re.M | re.S)
    assert block
    subprocess.run(["sh", "-n"], input=block[1].encode(), check=True)
    script = block[1]
    for of_readme, smaller in (  # counts right from some 40 steps on
        ("--num-scenes 3000 --num-test-scenes 500", "--num-scenes 1000 --num-test-scenes 200"),
        ("-n 1000", "-n 80 -b 32"),
    ):
        assert of_readme in script
        script = script.replace(of_readme, smaller)
    commands = logical_lines(script)
    assert len(commands) == 3
    for command in commands:
        line, _, target = command.partition(" > ")
        said = run_command(line, tmp_path, environment)
        if target:
            (tmp_path / target).write_text(said)
    records = map(json.loads, (tmp_path / "runs/first/metrics.jsonl").read_text().splitlines())
    assert [r["accuracy_mode"] for r in records if "accuracy_mode" in r][-1] >= 0.9
    with (tmp_path / "pictures/counts.csv").open() as file:
        true = {row["name"]: int(row["count"]) for row in csv.DictReader(file)}
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    right = [true[each["image"].removeprefix("pictures/")] == each["count"] for each in found]
    assert len(right) == sum(name.startswith("test/") for name in true)
    assert np.mean(right) >= 0.9
    with Image.open(tmp_path / "found.png") as figure:
        assert figure.width > 500


def write_mixed_pictures(folder: Path, number: int) -> dict[str, int]:
    """Pictures in every format, colour and type, of 0 to 2 bright squares; their counts by name."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    counts = {}
    for k in range(number):
        pixels = np.zeros((24, 24), np.uint8)
        for left in (2, 14)[: k % 3]:
            top = rng.integers(16)
            pixels[top : top + 8, left : left + 8] = rng.integers(128, 256)
        grey = Image.fromarray(pixels)
        kind = ("png", "jpg", "tif", "bmp", "webp", "gif", "ppm", "p.png", "la.png", "16.png")[
            k % 10
        ]
        image = {
            "bmp": grey.convert("RGB"),
            "p.png": grey.convert("P"),
            "la.png": grey.convert("LA"),
            "16.png": Image.fromarray(pixels.astype(np.uint16) * 257),
        }.get(kind, grey)
        name = f"{k} {k % 3}.{kind}"
        options = {"quality": 95} if kind == "jpg" else {}
        image.save(folder / name, **options)
        counts[name] = k % 3
    return counts


def test_objects_in_five_hundred_pictures_of_mixed_formats_are_counted(
    tmp_path: Path, environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    counts = write_mixed_pictures(tmp_path / "pictures", 500)
    with (tmp_path / "pictures/counts.csv").open("w", newline="") as file:
        csv.writer(file).writerows(counts.items())
    line = (
        "--data pictures -n 100 -b 32 -lr 3e-3 --guide glimpse "
        "--window-size 10 --scale-prior-mean 2.4 --scale-prior-sd 0.5 --decoder-output-bias -3 "
        "--encoder-latent-size 5 --rnn-hidden-size 64 --encoder-net 64 --decoder-net 64 "
        "--predict-net 64 --output-dir run"
    )
    done = run(line, tmp_path, environment)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["x_size"], config["channels"]) == (24, 1)
    assert "50 held-out scenes" in done.stdout
    checkpoint = str(tmp_path / "run/checkpoint.pt")
    assert air.detect.main(["--load", checkpoint, str(tmp_path / "pictures")]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found_counts = {Path(each["image"]).name: each["count"] for each in found}
    assert found_counts.keys() == counts.keys()
    assert np.mean([found_counts[name] == count for name, count in counts.items()]) >= 0.9
