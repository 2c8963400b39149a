"""The device that a command line names."""

import torch


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device of that name; "auto" is CUDA if available, and otherwise the CPU.

    Args:
        name: A device.
        local_rank: Under torchrun, the number of this process on its machine. The process takes
            the GPU of the same number.

    Returns:
        The device. A GPU becomes the current one of this process, as a CUDA graph needs it.

    Raises:
        ValueError: If this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if local_rank is not None and name.startswith("cuda"):
        if name != "cuda":
            raise ValueError(f"--device: each process takes a GPU of its own; use cuda, not {name}")
        name = f"cuda:{local_rank}"
    if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
        expected = "expected auto, cpu, cuda, cuda:1, ... or mps"
        raise ValueError(f"--device: cannot use {name!r}: {expected}")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:  # NotImplementedError is a RuntimeError
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device: cannot use {name!r} on this machine: {reason}") from error
    return device
