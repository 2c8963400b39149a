"""Signals end a run in order; a second one of the same kind ends it at once."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SMALL, capture_only, run
from torch import fx

import main
from air.process.signals import ENDING, exit_code, interrupt_on_signals
from air.storage.run_folder import RunFolder

ALL = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
LINE = f"{SMALL} -t 1 -n 6 --compile --output-dir run"


@pytest.fixture(autouse=True)
def _handlers_are_restored(_ordinary_signals: None) -> Iterator[None]:
    before = [signal.getsignal(number) for number in ALL]
    yield
    assert [signal.getsignal(number) for number in ALL] == before


def alone(numbers: list[int]) -> list[list[int]]:
    """What `all_gather` of a single process returns."""
    return [numbers]


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
        assert signals.first(alone) == number
        other = next(each for each in ALL if each != number)
        signal.raise_signal(other)  # while the run is saved
        assert signals.first(alone) == number
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert exit_code(KeyboardInterrupt()) == 130


def test_under_torchrun_a_second_signal_asks_again() -> None:
    with interrupt_on_signals() as signals:
        signals.ask_by(lambda: None, ignore_repeated=True)
        assert signals.first(lambda own: [own, [signal.SIGTERM]]) == signal.SIGTERM
        for _ in range(2):  # another rank was the first to receive it
            signal.raise_signal(signal.SIGTERM)


def test_after_training_a_signal_interrupts() -> None:
    with interrupt_on_signals() as signals:
        signals.ask_by(lambda: None)
        assert signals.first(alone) is None
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signals.ask_by(lambda: None)

        def late(numbers: list[int]) -> list[list[int]]:
            signal.raise_signal(signal.SIGTERM)
            return [numbers]

        with pytest.raises(KeyboardInterrupt):
            signals.first(late)
        signals.ignore()
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.skipif(os.name != "posix", reason="needs SIGHUP")
def test_signals_that_are_ignored_or_not_pythons_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupt_on_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, former)
    getsignal = signal.getsignal
    with monkeypatch.context() as patch:
        foreign = signal.SIGUSR2
        patch.setattr(signal, "getsignal", lambda n: None if n == foreign else getsignal(n))
        with interrupt_on_signals():
            assert getsignal(foreign) is signal.SIG_DFL
            assert getsignal(signal.SIGUSR1) is not signal.SIG_DFL


def raising(number: int) -> Callable[[fx.GraphModule], fx.GraphModule]:
    """A compiler, which runs in the first step, that receives a signal."""

    def compiler(graph: fx.GraphModule) -> fx.GraphModule:
        signal.raise_signal(number)
        return graph

    return compiler


def saved_step(folder: Path) -> int:
    return int(torch.load(folder / "run" / "checkpoint.pt", weights_only=True)["step"])


@pytest.mark.slow
@pytest.mark.parametrize("number", [ALL[0], *ALL[2:4]])
def test_a_signal_in_training_saves_the_run(
    number: int, tmp_path: Path, environment: dict[str, str]
) -> None:
    done = run(LINE, tmp_path, environment, compiler=raising(number))
    assert done.returncode == 128 + number, done.stderr
    assert "Interrupted, and saved at step 1 of 6. Resume with: " in done.stdout
    assert done.stderr == ""
    assert saved_step(tmp_path) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", ALL)
def test_a_signal_before_training_ends_in_one_line(
    number: int, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "build_trainer", lambda *_: signal.raise_signal(number))
    done = run(LINE, tmp_path, environment)
    assert done.returncode == 128 + number
    assert done.stderr.endswith(": interrupted. Training had not begun\n")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs SIGUSR1")
@pytest.mark.parametrize("second", ["SIGTERM", "SIGUSR1"])
def test_another_signal_while_the_run_is_saved_loses_nothing(
    second: str, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = RunFolder.save

    def interrupted_save(self: RunFolder, state: dict[str, object]) -> None:
        signal.raise_signal(getattr(signal, second))
        save(self, state)

    monkeypatch.setattr(RunFolder, "save", interrupted_save)
    done = run(LINE, tmp_path, environment, compiler=raising(signal.SIGUSR1))
    assert done.returncode == 128 + signal.SIGUSR1
    if second == "SIGTERM":
        assert "Interrupted, and saved at step 1 of 6" in done.stdout
        assert saved_step(tmp_path) == 1
    else:
        assert done.stderr.endswith("interrupted. No checkpoint was written yet\n")


@pytest.mark.slow
def test_the_program_runs_in_a_thread(tmp_path: Path, environment: dict[str, str]) -> None:
    lines = [
        LINE,
        f"{LINE}2 --viz-log pages.log",
        f"{LINE}3 --no-compile --likelihood-sd 1e-30 -n 40",
    ]
    codes: list[int | str] = []

    def helper() -> None:
        for line in lines:
            done = run(line, tmp_path, environment, compiler=capture_only)
            codes.append(done.returncode if done.returncode < 2 else done.stderr)

    thread = threading.Thread(target=helper)
    thread.start()
    thread.join()
    assert codes == [0, 0, 1]
    done = run(f"{LINE}4", tmp_path, environment, compiler=capture_only)
    assert done.returncode == 0
    whole, other = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"]
        for name in ("run", "run4")
    )
    assert all(torch.equal(whole[name], other[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_is_closed_loses_no_run(
    nohup: bool, tmp_path: Path, environment: dict[str, str]
) -> None:
    line = f"{SMALL} -n 60 --no-compile --eval-every 2 --eval-scenes 4 --output-dir run"
    import termios  # Unix alone has it

    own, terminal = os.openpty()
    termios.tcsetwinsize(own, (24, 100))
    # In a session of its own, the first terminal that is opened becomes that of the session.
    ignoring = "trap '' HUP; " if nohup else ""
    start = f'{ignoring}exec "$@" <>{os.ttyname(terminal)} 1>&0 2>&0'
    words = ["bash", "-c", start, "bash", sys.executable, str(ROOT / "main.py"), *line.split()]
    with subprocess.Popen(words, cwd=tmp_path, env=environment, start_new_session=True) as process:
        shown = b""
        while b"held-out scenes" not in shown:  # it trains
            shown += os.read(own, 1000)
        os.close(terminal)
        os.close(own)
        code = process.wait(timeout=100)
    assert b"step/s" in shown, shown  # the bar
    assert code == (0 if nohup else 129)
    assert (saved_step(tmp_path) == 60) == nohup
