"""Files of arrays: .npy, .npz, HDF5 and torch's .pt. No object in them is ever unpickled.

An .npy file is memory-mapped, so that it may be larger than memory. Other files are read.
"""

import mmap
import os
import pickle
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from air.data.scenes import LARGE_BYTES, Array, DataError
from air.data.user_images.preparation import check_size
from air.storage.files import UnusableFileError, check_unpacked_size


def holds_arrays(path: Path) -> bool:
    """Whether a path is a file of arrays, or a folder with x.npy."""
    if os.path.isdir(path):
        return os.path.exists(path / "x.npy")
    return path.suffix.lower() in READERS


def read_arrays(path: Path, names: Collection[str]) -> dict[str, Array]:
    """Reads the arrays of these names that a file, or a folder of .npy files, has.

    If a file has a single array, under none of these names, it is x.

    Args:
        path: A path of which `holds_arrays` is true.
        names: The arrays to read, x among them.

    Raises:
        DataError: If a file is damaged or of another kind, or has no x, or an array is too large.
    """
    if path.is_dir() and (path / "x.npy").exists():
        files = {file.stem: file for file in path.glob("*.npy")}
        return {
            name: _read_file(files[key], ("x",))["x"] for name, key in _choose(files, names).items()
        }
    return _read_file(path, names)


def _read_file(path: Path, names: Collection[str]) -> dict[str, Array]:
    suffix = path.suffix.lower()
    try:
        with path.open("rb"):  # the system says best why a file cannot be opened
            pass
        check_unpacked_size(path)
        return READERS[suffix](path, names)
    except UnusableFileError as error:  # it names the path
        raise DataError(str(error)) from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except OSError as error:
        reason = error.strerror or f"damaged, or not a {suffix} file"
        raise DataError(f"{path}: {reason}") from error
    except Exception as error:  # the libraries raise errors of many types for foreign bytes
        reason = " ".join(str(error).split())
        if "Object arrays" in reason or "Python objects" in reason:
            reason = "it contains Python objects, which are never read"
        else:
            reason = f"damaged, or not a {suffix} file ({reason})"
        raise DataError(f"{path}: {reason}") from error


def _choose(held: Collection[str], names: Collection[str]) -> dict[str, str]:
    """The names under which a file holds the arrays to read, by the names to read.

    These may be written in other letters, such as Counts.
    """
    found = {key.lower(): key for key in sorted(held, key=str.islower) if key.lower() in names}
    if "x" in found:
        return found
    if len(held) != 1 or found:
        listed = ", ".join(list(held)[:8]) or "no array"
        raise DataError(f"expected images under the name x, got {listed}")
    return {"x": next(iter(held))}


def _read_npy(path: Path, names: Collection[str]) -> dict[str, Array]:
    # Read-only: the system would refuse a copy-on-write map that is larger than memory.
    array: Any = np.lib.format.open_memmap(path, mode="r")
    if array.nbytes > LARGE_BYTES and array.dtype == np.uint8 and hasattr(mmap, "MADV_RANDOM"):
        array._mmap.madvise(mmap.MADV_RANDOM)  # else each row that is drawn reads megabytes around
    return {"x": np.asarray(array)}


def _read_npz(path: Path, names: Collection[str]) -> dict[str, Array]:
    if not zipfile.is_zipfile(path):  # NumPy would take it for a pickle
        raise DataError("damaged, or not an .npz file")
    with np.load(path, allow_pickle=False) as held:
        return {name: np.asarray(held[key]) for name, key in _choose(held, names).items()}


def _read_hdf5(path: Path, names: Collection[str]) -> dict[str, Array]:
    try:
        import h5py  # an extra
    except ModuleNotFoundError as error:
        raise DataError("HDF5 files need h5py: pip install h5py") from error
    held: dict[str, Any] = {}

    def add(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            held[name] = item

    def read(dataset: Any) -> Array:  # noqa: ANN401
        check_size(dataset.name, dataset.nbytes)
        if dataset.external:
            raise DataError(f"{dataset.name} refers to raw bytes in other files, never read")
        for source in dataset.virtual_sources() if dataset.is_virtual else ():
            places = Path(source.file_name), path.parent / source.file_name
            if source.file_name != "." and not any(place.exists() for place in places):
                # HDF5 would read zeros.
                raise DataError(f"{dataset.name} refers to {source.file_name}, which is missing")
        return np.asarray(dataset[()])

    with h5py.File(path, "r") as file:
        file.visititems(add)
        return {name: read(held[key]) for name, key in _choose(held, names).items()}


def _read_pt(path: Path, names: Collection[str]) -> dict[str, Array]:
    import torch  # here, because scenes are made without torch

    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch would advise to run the code in the file
        raise DataError("it holds more than tensors, or is not a .pt file") from error
    if isinstance(held, torch.Tensor):
        held = {"x": held}
    if not isinstance(held, dict):
        raise DataError(f"expected a tensor or tensors by name, got a {type(held).__name__}")
    if {"format", "model"} <= held.keys():
        raise DataError("expected images, got the checkpoint of a model, which --load takes")
    tensors = {str(name): each for name, each in held.items() if isinstance(each, torch.Tensor)}
    found = {}
    for name, key in _choose(tensors, names).items():
        tensor = tensors[key]
        check_size(key, tensor.nbytes)  # a view of a few bytes may pretend to be huge
        if tensor.dtype == torch.bfloat16:  # a type that NumPy lacks
            tensor = tensor.float()
        found[name] = tensor.numpy(force=True)  # even if it requires a gradient
    return found


READERS: dict[str, Callable[[Path, Collection[str]], dict[str, Array]]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".h5": _read_hdf5,
    ".hdf5": _read_hdf5,
    ".pt": _read_pt,
    ".pth": _read_pt,
}
