"""Errors in one line for the user."""

import torch

from air.data.scenes import DataError
from air.storage.files import quoted
from air.storage.run_folder import RunFolder
from air.training.compiled_svi import RecordingError
from air.training.parallel import RankLostError


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
    if isinstance(error, DataError | RecordingError | RankLostError):
        cause = str(error)
    elif isinstance(error, OSError):
        cause = f"cannot write: {error}"
    elif _is_out_of_memory(error):
        flags = "--batch-size, --x-size, --eval-scenes, --model-steps or the nets' sizes"
        cause = f"out of memory; lower {flags}"
    else:
        return None
    return f"{cause}. {run.resume_hint()}" if run else cause


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    texts = "can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED"
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
