"""Printing never ends a run, whatever is wrong with its standard output and standard error."""

import argparse
import contextlib
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast
from unittest import mock

import pytest
import torch
from helpers import ROOT, SMALL, broken_pipe
from tqdm import tqdm

import main
from air import viz
from air.terminal.streams import steady_streams

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")


@contextlib.contextmanager
def redirected(stdout: io.TextIOBase | None, stderr: io.TextIOBase | None) -> Iterator[None]:
    """Sets both streams; None as where they were closed when the program began."""
    with mock.patch("sys.stdout", stdout), mock.patch("sys.stderr", stderr):
        yield


def test_characters_that_an_encoding_lacks_are_replaced() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", newline="\n")
    with redirected(stream, None):
        with steady_streams():
            print("1 ± 2")
            assert (sys.stdout.encoding, sys.stdout.isatty()) == ("ascii", False)
        assert sys.stdout is stream
        for program in (main, viz):
            with pytest.raises(SystemExit) as ended:
                program.main(["--help"])
            assert ended.value.code == 0
    printed = cast(io.BytesIO, stream.buffer).getvalue().decode("ascii")
    assert printed.startswith("1 ? 2\n")
    assert printed.count("usage: ") == 2


@linux
@pytest.mark.parametrize("kind", ["full", "pipe", "closed"])
def test_no_failure_of_printing_is_raised(kind: str) -> None:
    with broken_pipe() as pipe, open("/dev/full", "w", buffering=1) as full:
        stream = {"pipe": pipe, "full": full, "closed": None}[kind]
        with redirected(stream, stream), steady_streams():
            print("text", flush=True)
            parser = argparse.ArgumentParser()
            parser.print_help()
            with pytest.raises(SystemExit) as ended:
                parser.parse_args(["--no-such-flag"])
            assert ended.value.code == 2
            handler = logging.StreamHandler()
            handler.emit(logging.makeLogRecord({"msg": "text"}))
            with tqdm(total=2, disable=False, dynamic_ncols=True) as bar:
                bar.write("text")
                bar.update(2)
            assert tqdm(disable=None).disable  # no terminal


def test_printing_continues_when_the_disk_has_room_again() -> None:
    class Disk(io.StringIO):
        is_full = True

        def write(self, text: str) -> int:
            if self.is_full:
                raise OSError(28, "No space left on device")
            return super().write(text)

    with redirected(disk := Disk(), None), steady_streams():
        print("lost")
        disk.is_full = False
        print("kept")
    assert disk.getvalue() == "kept\n"


@linux
@pytest.mark.parametrize("redirections", ["| true", ">/dev/full 2>/dev/full"])
@pytest.mark.parametrize("product", [False, True])
def test_the_flush_at_exit_does_not_fail(redirections: str, product: bool, tmp_path: Path) -> None:
    code = (
        "import sys, time, air.terminal.streams\n"
        f"with air.terminal.streams.steady_streams(stdout_may_fail={product}):\n"
        "    time.sleep(0.2)\n"
        "    print('text', file=sys.stderr)\n"
        "    try: print('text' * 3000, flush=True)\n"
        "    except OSError as error: sys.exit(3)\n"
        "    print('the end')\n"  # not flushed
    )
    done = subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$0" -c "$1" {redirections}', sys.executable, code],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == (3 if product else 0), done.stderr
    assert set(done.stderr.splitlines()) <= {"text"}


@pytest.mark.slow
@linux
def test_a_run_is_saved_whatever_its_output_leads_to(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    line = f"{SMALL} --eval-every 2 --no-compile --output-dir \u03b1"
    with (
        contextlib.chdir(tmp_path),
        mock.patch.dict(os.environ, environment),
        mock.patch.object(viz, "DPI", 50),
        broken_pipe() as stdout,
        open("/dev/full", "w", encoding="ascii", buffering=1) as stderr,
        redirected(stdout, stderr),
    ):
        assert main.main(line.split()) == 0
    run = tmp_path / "\u03b1"
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == 4
    records = (run / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(record)["step"] for record in records)
    assert (run / "figures" / "curves.png").exists()
