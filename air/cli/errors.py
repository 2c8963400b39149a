"""Errors in one line for the user, and the exit code."""

from types import TracebackType

import torch

from air.cli.flags import Parser
from air.data.scenes import DataError
from air.storage.files import quoted
from air.storage.run_folder import RunFolder
from air.terminal.signals import exit_code


class ExplainedErrors:
    """A context manager that ends the program with one line if there is an error.

    The exit code is 2 for input that cannot be used, 1 for a failure of the run, and 128 + the
    signal for an interruption. A defect of the program keeps its traceback.

    Args:
        parser: Prints the line.
    """

    def __init__(self, parser: Parser) -> None:
        self._parser = parser
        self._is_prepared = False
        self._run: RunFolder | None = None

    def run_begins(self, run: RunFolder | None) -> None:
        """All input was usable; errors from now on end a run, which can be resumed from `run`."""
        self._is_prepared, self._run = True, run

    def __enter__(self) -> "ExplainedErrors":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            hint = self._run.resume_hint() if self._run else "Training had not begun"
            self._parser.fail(exit_code(error), f"interrupted. {hint}")
        if not self._is_prepared and isinstance(error, ValueError | OSError | ModuleNotFoundError):
            self._parser.error(str(error))
        if isinstance(error, Exception) and (line := explain(error, self._run)):
            self._parser.fail(1, f"error: {line}")


def explain(error: Exception, run: RunFolder | None) -> str | None:
    """The cause of an error and its remedy in one line; None for a defect of the program.

    Args:
        error: The error.
        run: The run that it ended; None before the run began.
    """
    if isinstance(error, FloatingPointError):
        weights = f", from its weights by --load {quoted(run.checkpoint)}" if run else ""
        return (
            f"{error}. The run is saved as it is; begin a new run with a lower --learning-rate"
            f"{weights}"
        )
    if isinstance(error, DataError | ConnectionError):  # the latter: another process has exited
        cause = str(error)
    elif isinstance(error, OSError):
        cause = f"cannot write: {error}"
    elif _is_out_of_memory(error):
        flags = "--batch-size, --x-size, --model-steps or the sizes of the nets"
        cause = f"out of memory; lower {flags}"
    else:
        return None
    return f"{cause}. {run.resume_hint()}" if run else cause


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    texts = "can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED"
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
