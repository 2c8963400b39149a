"""Programs that tests start: signals end them, and they import little."""

import os
import signal
import sys
from pathlib import Path

import programs
import pytest

pytestmark = pytest.mark.slow


def tell() -> int:
    print(os.getcwd(), os.environ["A"], len(os.environ), "torch._dynamo" in sys.modules)
    print([signal.getsignal(number) is signal.SIG_IGN for number in programs.SIGNALS])
    return 3


def test_a_program_has_its_own_folder_environment_and_signals(tmp_path: Path) -> None:
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background
    try:
        (tmp_path / "here").mkdir()
        options = {"folder": tmp_path / "here", "output": tmp_path / "log"}
        program = programs.start(tell, environment={"A": "é"}, **options)
        program.join(60)
        assert program.exitcode == 3
        handlers = [False] * len(programs.SIGNALS)
        expected = f"{tmp_path / 'here'} é 1 {programs.FORKS}\n{handlers}\n"
        assert (tmp_path / "log").read_text() == expected
    finally:
        signal.signal(signal.SIGINT, former)
