"""Starts Python programs by fork, from a server process that has imported what they need.

A new process spends several seconds of CPU time on importing torch, Pyro and matplotlib; a fork
takes milliseconds. `start` and `run` take the arguments of `subprocess.Popen` and
`subprocess.run`; the first word of a command is ``sys.executable``. Such a program has its own
process ID, arguments, folder, environment, standard streams and module ``__main__``, receives
signals, runs its functions of `atexit` and has its exit code. It differs from a new process in what
is imported already, and in its figures, which are laid out but not painted: painting takes two
thirds of the time of a short run.

Each test process has a server of its own, started by the first program.
"""

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, NoReturn, Self
from unittest import mock

ROOT = Path(__file__).parent.parent
# Ignored where pytest runs in the background or by nohup.
SIGNALS = [
    getattr(signal, name)
    for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]


def default_signals() -> None:
    """Gives signals the handlers that they have in a program started from a terminal."""
    for number in SIGNALS:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default)


def paint_no_figures() -> contextlib.AbstractContextManager[object]:
    """In this context, figures are blank and small; all their parts are made."""
    import viz

    patches = contextlib.ExitStack()
    patches.enter_context(mock.patch.object(viz, "DPI", 50))
    patches.enter_context(mock.patch.object(viz.Figure, "draw"))
    return patches


def start(command: Sequence[str | Path], **options: Any) -> "Program | subprocess.Popen[Any]":  # noqa: ANN401
    """Starts a program as `subprocess.Popen` does."""
    if hasattr(os, "fork"):
        return Program(command, **options)
    return subprocess.Popen(command, **options)


def run(
    command: Sequence[str | Path],
    *,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **options: Any,  # noqa: ANN401
) -> "subprocess.CompletedProcess[Any]":
    """Runs a program to its end as `subprocess.run` does."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start(command, **options) as program:
        said, complained = program.communicate(timeout=timeout)
    done = subprocess.CompletedProcess(command, program.wait(), said, complained)
    if check:
        done.check_returncode()
    return done


class Program:
    """A forked program, with those attributes and methods of `subprocess.Popen` that tests use.

    It is killed if the process that started it ends first.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        cwd: Path | str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        text: bool = False,
        start_new_session: bool = False,
        address: str | None = None,
    ) -> None:
        self.args, self.returncode = command, None
        with contextlib.ExitStack() as to_close:
            streams, pipes = _streams([stdin, stdout, stderr], to_close)
            self._connection = socket.socket(socket.AF_UNIX)
            self._connection.connect(address or server_address())
            request = Request(
                words=[str(word) for word in command[1:]],
                folder=str(Path(cwd or Path.cwd()).resolve()),
                environment=dict(os.environ if env is None else env),
                streams=[*streams],
                new_session=start_new_session,
            )
            socket.send_fds(self._connection, [b"\n"], [*streams.values()])
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        with self._connection.makefile() as answer:
            self.pid = int(answer.readline() or self._no_server())
        modes = ("w", "r", "r") if text else ("wb", "rb", "rb")
        self.stdin, self.stdout, self.stderr = (
            None if k not in pipes else os.fdopen(pipes[k], mode) for k, mode in enumerate(modes)
        )

    def _no_server(self) -> str:
        raise RuntimeError("the server of programs has ended; see its standard error")

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end; returns the exit code, or the negative number of a signal."""
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self.returncode = int(self._connection.recv(16) or self._no_server())
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        """The exit code, or None while the program runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal, if the program still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Sends SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        """Waits for the end; returns what was read from the pipes, None where there is none."""
        if self.stdin:
            self.stdin.close()
        readers = ThreadPoolExecutor(2)  # a program would wait for us when one pipe is full
        said = [pipe and readers.submit(pipe.read) for pipe in (self.stdout, self.stderr)]
        readers.shutdown(wait=False)
        try:
            output, complaint = (each and each.result(timeout) for each in said)
        except TimeoutError:
            raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
        self.wait(timeout)
        return output, complaint

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error:  # a test that failed waits for nothing
            self.kill()
        for pipe in (self.stdin, self.stdout, self.stderr):
            if pipe:
                pipe.close()
        self.wait()


class Request(NamedTuple):
    """What a program is started with."""

    words: list[str]  # of the command line, without the interpreter
    folder: str
    environment: dict[str, str]
    streams: list[int]  # those of 0, 1 and 2 that are open; their descriptors are sent beside
    new_session: bool


def _streams(
    wanted: list[int | IO[Any] | None], to_close: contextlib.ExitStack
) -> tuple[dict[int, int], dict[int, int]]:
    """Descriptors for the program by number, and our ends of its pipes by number."""
    streams: dict[int, int] = {}
    pipes: dict[int, int] = {}
    inherited = [number for number in range(3) if _is_open(number)]  # before a new one is
    for number, stream in enumerate(wanted):
        if stream is None:
            if number in inherited:
                streams[number] = os.dup(number)
        elif stream == subprocess.PIPE:
            ends = os.pipe()
            streams[number], pipes[number] = ends if number == 0 else ends[::-1]
        elif stream == subprocess.DEVNULL:
            streams[number] = os.open(os.devnull, os.O_RDWR)
        elif stream == subprocess.STDOUT:
            streams[number] = os.dup(streams[1])
        else:
            streams[number] = os.dup(stream if isinstance(stream, int) else stream.fileno())
        if number in streams:
            to_close.callback(os.close, streams[number])
    return streams, pipes


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


# The server.


@functools.cache
def server_address() -> str:
    """Starts this process's server; returns the path of its socket.

    The server ends when its standard input does, that is, with this process.
    """
    folder = tempfile.TemporaryDirectory()  # a short path: a socket's may have 100 characters
    address = f"{folder.name}/programs"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(100)
        server = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, str(listener.fileno())],
            stdin=subprocess.PIPE, pass_fds=[listener.fileno()], start_new_session=True, cwd=ROOT,
            # A fork must not meet threads of OpenMP.
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
    atexit.register(folder.cleanup)
    atexit.register(server.communicate)  # first: last in, first out
    return address


def stand_in(folder: Path) -> dict[str, str]:
    """Writes an executable `python` into a folder, which starts programs here, for shell scripts.

    Returns:
        The variable PATH, with that folder first.
    """
    path = folder / "python"
    words = [sys.executable, "-S", "-E", __file__, server_address()]
    path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    path.chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def be_stand_in(address: str, words: list[str]) -> None:
    """Starts a program with the streams of this process, passes signals on, and ends as it does."""
    program = Program([sys.executable, *words], address=address)
    for number in SIGNALS:
        signal.signal(number, lambda received, _: os.kill(program.pid, received))
    code = program.wait()
    if code < 0:
        default_signals()
        os.kill(os.getpid(), -code)
    sys.exit(code)


def serve(listener: socket.socket) -> Request | None:
    """Forks a program for each connection; returns its request in the fork, None at the end."""
    default_signals()
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if listener not in ready:
            return None
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return keep(connection)
        connection.close()


def keep(connection: socket.socket) -> Request:
    """Forks the program and returns its request there; here, waits for its end and reports it."""
    descriptors = socket.recv_fds(connection, 1, 3)[1]
    with connection.makefile() as line:
        request = Request(*json.loads(line.readline()))
    process = os.fork()
    if process == 0:
        connection.close()
        become(request, descriptors)
        return request
    for descriptor in descriptors:
        os.close(descriptor)
    connection.sendall(f"{process}\n".encode())

    def kill_if_abandoned() -> None:
        connection.recv(1)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)

    threading.Thread(target=kill_if_abandoned, daemon=True).start()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(str(status).encode())
    os._exit(0)


def become(request: Request, descriptors: list[int]) -> None:
    """Takes on the streams, folder, environment and session of a program."""
    if request.new_session:
        os.setsid()
    for number in range(3):
        with contextlib.suppress(OSError):
            os.close(number)
    for number, descriptor in zip(request.streams, descriptors, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    unbuffered = bool(request.environment.get("PYTHONUNBUFFERED"))
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, errors=errors, closefd=False) if number in request.streams else None
        for number, mode, errors in ((0, "r", None), (1, "w", None), (2, "w", "backslashreplace"))
    )
    if sys.stdout and (unbuffered or sys.stdout.isatty()):
        sys.stdout.reconfigure(line_buffering=True)
    if sys.stderr:
        sys.stderr.reconfigure(line_buffering=True)


def live(words: list[str], path: str) -> NoReturn:
    """Runs a command line, and ends as an interpreter does.

    But the modules are not taken down, which would take half a second.
    """
    code: object = None
    try:
        execute(words, path)
    except SystemExit as ended:
        code = ended.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            if stream:
                stream.flush()
    except OSError:
        code = 120
    os._exit(int(code or 0))  # type: ignore[call-overload]


def execute(words: list[str], path: str) -> None:
    """Runs a command line of Python: a script, ``-m`` and a module, or ``-c`` and code."""
    kind, *rest = words
    places = [place for place in path.split(os.pathsep) if place]
    if kind == "-c":
        code, *sys.argv[1:] = rest
        sys.argv[0], sys.path[:1] = "-c", ["", *places]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__", "__doc__": None})
    elif kind == "-m":
        name, *sys.argv[1:] = rest
        sys.path[:1] = [os.getcwd(), *places]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:1] = words, [str(Path(kind).parent), *places]
        runpy.run_path(kind, run_name="__main__")


def main() -> None:
    """Serves programs at the socket of a descriptor, or stands in for one at an address."""
    place, *words = sys.argv[1:]
    if not place.isdecimal():
        be_stand_in(place, words)
    sys.path[0] = str(ROOT)  # until a program sets its own
    # Torch and the program import the others when they first need them.
    import scipy.optimize  # noqa: F401
    import torch._dynamo  # noqa: F401
    import visdom.server.run_server  # noqa: F401

    import air.detect  # noqa: F401
    import main  # noqa: F401

    gc.freeze()  # so that collecting garbage in a fork copies no memory of this process
    with paint_no_figures():
        with socket.socket(fileno=int(place)) as listener:
            request = serve(listener)
        if request:
            live(request.words, request.environment.get("PYTHONPATH", ""))


if __name__ == "__main__":
    main()
