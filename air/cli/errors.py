"""Errors in one line for the user, and the exit code."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from air.cli.flags import Parser
from air.data.scenes import DataError
from air.storage.files import quoted
from air.storage.run_folder import RunFolder
from air.terminal.signals import exit_code


@contextmanager
def explained_errors(parser: Parser) -> Iterator[Callable[[RunFolder | None], None]]:
    """Ends the program with one line if there is an error in the block.

    The exit code is 2 for input that cannot be used, 1 for a failure of the run, and 128 + the
    signal for an interruption. A defect of the program keeps its traceback.

    Yields:
        A function to call when all input was usable: later errors end a run, its argument.
    """
    has_begun, run = False, None

    def begin(begun: RunFolder | None) -> None:
        nonlocal has_begun, run
        has_begun, run = True, begun

    try:
        yield begin
    except KeyboardInterrupt as interrupt:
        hint = run.resume_hint() if run else "" if has_begun else "Training had not begun"
        parser.fail(exit_code(interrupt), f"interrupted. {hint}".rstrip())
    except Exception as error:
        if not has_begun and isinstance(error, ValueError | OSError | ModuleNotFoundError):
            parser.error(str(error))
        if line := explain(error, run):
            parser.fail(1, f"error: {line}")
        raise


def explain(error: Exception, run: RunFolder | None) -> str | None:
    """The cause of an error and its remedy in one line; None for a defect of the program.

    `run` is the run that it ended; None before the run began.
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
