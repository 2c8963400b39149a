"""Signals end a run in order; a second one of the same kind ends it at once."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import programs
import pytest
import torch
from helpers import SMALL, capture_only, run

from air.storage.run_folder import RunFolder
from air.terminal.signals import ENDING, exit_code, interrupt_on_signals
from main import main

pytestmark = pytest.mark.usefixtures("default_signals")

ALL = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
LINE = f"{SMALL} -t 1 -n 4 --progress-every 1 --no-compile --output-dir run"


@pytest.fixture(autouse=True)
def _handlers_are_restored(default_signals: None) -> Iterator[None]:
    before = [signal.getsignal(number) for number in ALL]
    yield
    assert [signal.getsignal(number) for number in ALL] == before


@pytest.mark.parametrize("number", ALL)
def test_a_signal_asks_to_stop_and_a_second_one_interrupts(number: int) -> None:
    stops: list[bool] = []
    with interrupt_on_signals() as signals:
        with pytest.raises(KeyboardInterrupt) as ended:
            signal.raise_signal(number)
        assert exit_code(ended.value) == 128 + number
        signals.ask_by(lambda: stops.append(True))
        signal.raise_signal(number)
        assert stops == [True]
        assert signals.first() == number
        other = next(each for each in ALL if each != number)
        signal.raise_signal(other)  # while the run is saved
        assert signals.first() == number
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert exit_code(KeyboardInterrupt()) == 130


@pytest.mark.parametrize("own_comes_first", [True, False])
def test_under_torchrun_a_repeated_signal_has_no_effect(own_comes_first: bool) -> None:
    with interrupt_on_signals() as signals:
        signals.ask_by(lambda: None, ignore_repeated=True)
        if own_comes_first:
            signal.raise_signal(signal.SIGTERM)
        assert signals.first() == (signal.SIGTERM if own_comes_first else None)
        signal.raise_signal(signal.SIGTERM)  # another rank was the first to receive it
        signal.raise_signal(signal.SIGTERM)


def test_after_training_a_signal_interrupts() -> None:
    with interrupt_on_signals() as signals:
        signals.ask_by(lambda: None)
        assert signals.first() is None
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.skipif(os.name != "posix", reason="needs SIGHUP")
def test_signals_that_are_ignored_or_not_pythons_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    getsignal, foreign = signal.getsignal, signal.SIGUSR2
    with monkeypatch.context() as patch:
        patch.setattr(signal, "getsignal", lambda n: None if n == foreign else getsignal(n))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with interrupt_on_signals():
            assert getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert getsignal(foreign) is signal.SIG_DFL
            assert getsignal(signal.SIGUSR1) is not signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def saved_step(folder: Path) -> int:
    return int(torch.load(folder / "run" / "checkpoint.pt", weights_only=True)["step"])


@pytest.mark.slow
@pytest.mark.parametrize("second", ["SIGTERM", "SIGINT"])
def test_a_signal_in_training_saves_the_run_and_the_same_one_then_ends_it(
    second: str, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log, save = RunFolder.log, RunFolder.save

    def log_and_signal(self: RunFolder, record: Mapping[str, object]) -> None:
        log(self, record)
        signal.raise_signal(signal.SIGINT)

    def signal_and_save(self: RunFolder, state: Mapping[str, object]) -> None:
        signal.raise_signal(getattr(signal, second))
        save(self, state)

    monkeypatch.setattr(RunFolder, "log", log_and_signal)
    monkeypatch.setattr(RunFolder, "save", signal_and_save)
    done = run(LINE, tmp_path, environment)
    assert done.returncode == 130
    if second == "SIGTERM":
        assert "Interrupted, and saved at step 1 of 4. Resume with: " in done.stdout
        assert done.stderr == ""
        assert saved_step(tmp_path) == 1
    else:
        assert done.stderr.endswith("interrupted. No checkpoint was written yet\n")


@pytest.mark.slow
def test_the_program_runs_in_a_thread(tmp_path: Path, environment: dict[str, str]) -> None:
    line = f"{SMALL} -t 1 -n 2 --compile --output-dir"
    codes = []

    def helper() -> None:
        for words in (f"{line} thread", "--learning-rate 0"):
            done = run(words, tmp_path, environment, compiler=capture_only)
            codes.append(done.returncode)

    thread = threading.Thread(target=helper)
    thread.start()
    thread.join()
    codes.append(run(f"{line} main", tmp_path, environment, compiler=capture_only).returncode)
    assert codes == [0, 2, 0]
    in_thread, in_main = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"]
        for name in ("thread", "main")
    )
    assert all(torch.equal(in_thread[name], in_main[name]) for name in in_main)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a pseudo-terminal")
def test_a_terminal_that_is_closed_loses_no_run(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    import termios  # Unix alone has it

    own, terminal = os.openpty()
    termios.tcsetwinsize(own, (24, 100))
    options = {"folder": tmp_path, "environment": environment}
    process = programs.start(main_in_terminal, os.ttyname(terminal), **options)
    shown = b""
    while b"held-out scenes" not in shown:  # it trains
        shown += os.read(own, 1000)
    os.close(terminal)
    os.close(own)
    process.join(100)
    assert b"step/s" in shown, shown  # the bar
    assert process.exitcode == 129
    assert 5 <= saved_step(tmp_path) < 60


@pytest.mark.slow
def test_signals_end_programs_where_pytest_ignores_them(tmp_path: Path) -> None:
    """As it does in the background of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    program = programs.start(count_ignored, folder=tmp_path)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    program.join(60)
    assert program.exitcode == 0


def count_ignored() -> int:
    return sum(signal.getsignal(number) is signal.SIG_IGN for number in programs.SIGNALS)


def main_in_terminal(terminal: str) -> int:
    """Runs the program in a session of its own, whose terminal is the first that it opens."""
    os.setsid()
    opened = os.open(terminal, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(opened, descriptor)
    os.close(opened)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    return main(f"{SMALL} -n 60 --no-compile --eval-every 5 --output-dir run".split())
