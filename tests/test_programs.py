"""Programs started by fork behave as those that `subprocess` starts."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import programs
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]

CODES = [
    "import sys; print(sys.argv, sys.stdin.read()); sys.exit(3)",
    "import sys; sys.exit('a message')",
    "import os; print(os.getcwd(), os.environ['A'], 'B' in os.environ)",
    "import os; print(os.getpgid(0) == os.getpid())",
    "import atexit; atexit.register(print, 'the end'); print('x' * 200_000)",
    "import sys; print('to the pipe', flush=True); print('x' * 200_000, file=sys.stderr)",
    "import os; os.kill(os.getpid(), 9)",
    "import signal; print([signal.getsignal(n) for n in (1, 2, 13, 15)])",
    "import time; print('sleeps', flush=True); time.sleep(0.2); print('awakes')",
    "print(__name__); import __main__; print(__main__.__name__)",
]


@pytest.mark.parametrize("code", CODES)
def test_a_program_ends_and_prints_as_a_new_process(code: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"cwd": tmp_path, "env": {"A": "é"}, "capture_output": True}
    options |= {"text": True, "start_new_session": True, "stdin": subprocess.DEVNULL}
    command = [sys.executable, "-c", code, "one", "2 3"]
    forked, new = (run(command, **options) for run in (programs.run, subprocess.run))
    assert (forked.returncode, forked.stdout) == (new.returncode, new.stdout)
    assert forked.stderr == new.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_and_timeouts(number: int) -> None:
    command = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(100)"]
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background
    try:
        with programs.start(command, stdout=-1, stderr=-3) as program:
            assert program.stdout is not None
            assert program.stdout.readline() == b"1\n"
            assert program.poll() is None
            with pytest.raises(subprocess.TimeoutExpired):
                program.wait(0.1)
            os.kill(program.pid, 0)
            program.send_signal(number)
            assert program.wait(20) == program.poll() == -number
    finally:
        signal.signal(signal.SIGINT, former)


@pytest.mark.parametrize(
    ("script", "code", "printed"),
    [
        ("echo 7 | python -c 'print(input(), end=str())'", 0, "7"),
        ("exec python -c 'import os, signal; os.kill(os.getpid(), 15)'", -15, ""),
        ("python -c 'import sys; sys.exit(4 + (sys.stdout is None))' >&-", 5, ""),
        ("python -m air.detect --help | head -c 5", 0, "usage"),
        ("python -c 'import time; time.sleep(9)' & kill -USR1 $!; wait $!", 138, ""),
    ],
)
def test_a_shell_script_starts_programs(
    script: str, code: int, printed: str, tmp_path: Path
) -> None:
    own = {**os.environ, **programs.stand_in(tmp_path)}
    done = subprocess.run(["bash", "-c", script], env=own, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, printed), done.stderr
