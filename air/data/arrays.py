"""Shared by all sources of scenes: the type of an array, the error for bad data, a hash."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class DataError(ValueError):
    """Data are missing, damaged or of the wrong kind, or cannot be written; one line."""


def sha256(arrays: Sequence[Array | None]) -> str:
    """The SHA-256 of the shapes and bytes of arrays; None counts as no bytes."""
    digest = hashlib.sha256()
    for array in arrays:
        if array is not None:
            digest.update(str(array.shape).encode() + array.tobytes())
    return digest.hexdigest()
