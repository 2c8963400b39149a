"""Signals end a run in order; a second one ends it at once."""

import signal

import pytest

from air.cli.signals import exit_code, stop_on_signals, terminate_like_interrupt


def test_a_signal_asks_to_stop_and_a_second_one_interrupts() -> None:
    stops: list[bool] = []
    with terminate_like_interrupt(), stop_on_signals(lambda: stops.append(True)) as received:
        signal.raise_signal(signal.SIGTERM)
        assert stops == [True]
        assert received == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt) as ended:
            signal.raise_signal(signal.SIGTERM)
        assert exit_code(ended.value) == 143
    assert exit_code(KeyboardInterrupt()) == 130
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_under_torchrun_a_second_signal_asks_again() -> None:
    stops: list[bool] = []
    with stop_on_signals(lambda: stops.append(True), ignore_second=True) as received:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
    assert len(stops) == len(received) == 2
