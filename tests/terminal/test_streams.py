"""Printing never ends a program, whatever is wrong with its standard output and standard error."""

import argparse
import contextlib
import io
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO, cast
from unittest import mock

import pytest
import torch
from helpers import ROOT, SMALL
from tqdm import tqdm

import main
import viz
from air.process.streams import steady_streams


@pytest.mark.parametrize(
    ("encoding", "errors", "printed"),
    [
        ("ascii", "strict", b"1 +- 2 ? ? ?\n"),
        ("ascii", "backslashreplace", b"1 +- 2 ? ? ?\n"),
        ("cp1252", "strict", b"1 \xb1 2 ? \xe9 ?\n"),
        ("utf-8", "strict", "1 ± 2 ∝ é ?\n".encode()),
        ("utf-8", "surrogateescape", "1 ± 2 ∝ é ".encode() + b"\xff\n"),
        ("ascii", "surrogateescape", b"1 +- 2 ? ? \xff\n"),
    ],
)
def test_characters_that_an_encoding_lacks_are_replaced(
    encoding: str, errors: str, printed: bytes
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding, errors, newline="\n")
    with contextlib.redirect_stdout(stream), steady_streams():
        assert sys.stdout.encoding == encoding
        print("1 ± 2 ∝ é \udcff")  # the last of an undecodable file name
    stream.flush()
    assert cast(io.BytesIO, stream.buffer).getvalue() == printed


class Notebook:
    """A stream with little more than `write`."""

    def __init__(self, fails: Callable[[], bool] = lambda: False) -> None:
        self.text, self.fails = "", fails

    def write(self, text: str) -> int:
        if self.fails():
            raise OSError(5, "Input/output error")
        text.encode("ascii")  # its encoding, which it does not tell
        self.text += text
        return len(text)


def test_streams_of_notebooks_do() -> None:
    notebook, former = Notebook(), sys.stderr
    with contextlib.redirect_stdout(cast(TextIO, notebook)):
        with steady_streams():
            print("one ± two ∝")
            assert not sys.stdout.isatty()
            sys.stdout.writelines(["three", "four\n"])
        assert sys.stdout is notebook
        with contextlib.redirect_stdout(io.StringIO()) as own, steady_streams():
            print("é \udcff", flush=True)
    assert notebook.text == "one +- two ?\nthreefour\n"
    assert own.getvalue() == "é ?\n"
    assert sys.stderr is former


def closed() -> TextIO:
    stream = io.StringIO()
    stream.close()
    return stream


def failing() -> TextIO:
    return cast(TextIO, Notebook(lambda: True))


@pytest.mark.parametrize("broken", [closed, failing, lambda: None])
def test_no_failure_of_printing_is_raised(
    broken: Callable[[], TextIO | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", broken())
    monkeypatch.setattr(sys, "stderr", broken())
    former = sys.stdout, sys.stderr
    with steady_streams():
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
    assert (sys.stdout, sys.stderr) == former
    handler.emit(logging.makeLogRecord({"msg": "text"}))  # it outlives the block


def test_printing_goes_on_when_the_disk_has_room_again() -> None:
    failures = iter([True, False, False])
    stream = Notebook(lambda: next(failures))
    with contextlib.redirect_stdout(cast(TextIO, stream)), steady_streams():
        sys.stdout.write("lost")
        sys.stdout.write("kept")
    assert stream.text == "kept"


@pytest.mark.parametrize("broken", [closed, failing, lambda: None])
def test_a_failure_of_standard_output_is_raised_where_that_is_the_product(
    broken: Callable[[], TextIO | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", broken())
    monkeypatch.setattr(sys, "stderr", broken())
    with steady_streams(stdout_may_fail=True):
        with pytest.raises((OSError, ValueError)):
            print("text")
        print("text", file=sys.stderr)


def test_a_stream_that_another_thread_has_set_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    other = io.StringIO()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with steady_streams():
        sys.stdout = other
    assert sys.stdout is other


def python(code: str, redirections: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Runs code by Python, started by a shell with these redirections."""
    code = f"import os, sys, warnings, air.process.streams\n{code}"
    shell = f'"$0" -c "$1" {redirections}'
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {shell}", sys.executable, code],
        cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_no_file_gets_the_descriptor_of_a_closed_stream(tmp_path: Path) -> None:
    code = (
        "with air.process.streams.steady_streams():\n"
        "    with open('file', 'w') as file:\n"
        "        assert file.fileno() > 2\n"
        "        for descriptor in (1, 2):\n"
        "            os.write(descriptor, b'a message of C code')\n"
        "        os.system('echo a message of a child; echo another >&2')\n"
        "        print('text'); print('text', file=sys.stderr); warnings.warn('text')\n"
        "        file.write('mine')\n"
        "assert sys.stdout is sys.stderr is None\n"
    )
    done = python(code, "0<&- 1>&- 2>&-", tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("redirections", ["| true", ">/dev/full 2>/dev/full", "| head -1"])
@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
def test_the_flush_at_exit_does_not_fail(redirections: str, tmp_path: Path) -> None:
    code = (
        "import time\n"
        "with air.process.streams.steady_streams():\n"
        "    for k in range(3000):\n"
        "        print('text', k)\n"
        "        print('text', file=sys.stderr) if k % 1000 == 0 else None\n"
        "    time.sleep(0.2)\n"
        "    print('the end')\n"  # not flushed
    )
    done = python(code, redirections, tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(done.stderr.splitlines()) <= {"text"}


@pytest.mark.parametrize(
    ("redirections", "reason"), [("| true", "Broken pipe"), (">/dev/full", "No space left")]
)
@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
def test_a_product_that_is_lost_ends_the_program_in_its_own_words(
    redirections: str, reason: str, tmp_path: Path
) -> None:
    code = (
        "import time\n"
        "with air.process.streams.steady_streams(stdout_may_fail=True):\n"
        "    time.sleep(0.2)\n"
        "    print('text')\n"
        "    try: sys.stdout.flush()\n"
        "    except OSError as error: sys.exit(error.strerror)\n"
    )
    done = python(code, redirections, tmp_path)
    assert done.returncode == 1
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_the_programs_print_in_any_encoding(
    encoding: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    line = f"{SMALL} --evaluate --iwae-samples 2 --iwae-scenes 20 --output-dir \u03b1"
    with (
        contextlib.chdir(tmp_path),
        mock.patch.dict("os.environ", environment),
        mock.patch("sys.stdout", stream),
    ):
        assert main.main(line.split()) == 0
        assert viz.main(["\u03b1"]) == 0
        for program in (main, viz):
            with pytest.raises(SystemExit) as ended:
                program.main(["--help"])
            assert ended.value.code == 0
    stream.flush()
    printed = cast(io.BytesIO, stream.buffer).getvalue().decode(encoding)
    assert "log p(x) is at least" in printed
    assert (" +- " if encoding == "ascii" else " \xb1 ") in printed
    assert "p(n) ? k^n" in printed
    assert "in ?/figures" in printed.replace("\\", "/")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize("redirections", ["0<&- 1>&- 2>&-", "2>/dev/full | head -1"])
def test_a_run_is_saved_whatever_its_output_leads_to(
    redirections: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    words = f"{sys.executable} {ROOT / 'main.py'} {SMALL} -n 30 --eval-every 2 --output-dir run"
    command = f"set -o pipefail; {words} --no-compile {redirections}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 30
    records = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(record)["step"] for record in records)
    assert (tmp_path / "run" / "figures" / "curves.png").exists()
