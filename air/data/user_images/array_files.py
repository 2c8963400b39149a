"""Files of arrays: .npy, .npz, HDF5 and torch's .pt. No object in them is ever unpickled.

An .npy file is memory-mapped, so that it may be larger than memory. Other files are read.
"""

import mmap
import pickle
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from air.data.scenes import LARGE_BYTES, Array, DataError
from air.data.user_images.preparation import check_size
from air.storage.files import UnusableFileError, check_unpacked_size

Arrays = Mapping[str, Any]  # array by name; some are read only when they are asked for


class _ReadLater(dict[str, Any]):
    """Arrays by name, each read by the function that is stored when it is asked for."""

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401
        return super().__getitem__(name)()


def holds_arrays(path: Path) -> bool:
    """Whether a path is a file of arrays, or a folder with x.npy."""
    return (path / "x.npy").exists() if path.is_dir() else path.suffix.lower() in READERS


def read_arrays(path: Path, names: Collection[str]) -> dict[str, Array]:
    """Reads the arrays of these names that a file, or a folder of .npy files, has.

    If a file has a single array, under none of these names, it is x.

    Args:
        path: A path of which `holds_arrays` is true.
        names: The arrays to read, x among them.

    Raises:
        DataError: If a file is damaged or of another kind, or has no x, or an array is too large.
    """
    if (path / "x.npy").exists():  # a folder
        files = {name: path / f"{name}.npy" for name in names}
        return {
            name: read_arrays(file, ("x",))["x"] for name, file in files.items() if file.exists()
        }
    suffix = path.suffix.lower()
    try:
        with path.open("rb"):  # the system says best why a file cannot be opened
            pass
        check_unpacked_size(path)
        with READERS[suffix](path) as arrays:
            stored = {name: name for name in names if name in arrays}
            if "x" not in stored:
                if len(arrays) != 1 or stored:
                    held = ", ".join(list(arrays)[:8]) or "no array"
                    raise DataError(f"expected images under the name x, got {held}")
                stored["x"] = next(iter(arrays))
            found = {name: np.asarray(arrays[place]) for name, place in stored.items()}
        for name, array in found.items():  # views of a few bytes may pretend to be huge
            if suffix != ".npy":
                check_size(name, array.nbytes)
        return found
    except UnusableFileError as error:  # it names the path
        raise DataError(str(error)) from error
    except (DataError, ModuleNotFoundError) as error:
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


@contextmanager
def _open_npy(path: Path) -> Iterator[Arrays]:
    # Read-only: the system would refuse a copy-on-write map that is larger than memory.
    array: Any = np.lib.format.open_memmap(path, mode="r")
    if array.nbytes > LARGE_BYTES and array.dtype == np.uint8 and hasattr(mmap, "MADV_RANDOM"):
        array._mmap.madvise(mmap.MADV_RANDOM)  # else each row that is drawn reads megabytes around
    yield {"x": array}


@contextmanager
def _open_npz(path: Path) -> Iterator[Arrays]:
    if not zipfile.is_zipfile(path):  # NumPy would take it for a pickle
        raise DataError("damaged, or not an .npz file")
    with np.load(path, allow_pickle=False) as archive:
        yield archive


@contextmanager
def _open_hdf5(path: Path) -> Iterator[Arrays]:
    try:
        import h5py  # an extra
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("HDF5 files need h5py: pip install h5py") from error
    with h5py.File(path, "r") as file:
        datasets = _ReadLater()

        def read(dataset: Any) -> Any:  # noqa: ANN401
            check_size(dataset.name, dataset.nbytes)
            _check_sources(dataset, path.parent)
            return dataset[()]

        def add(name: str, item: object) -> None:
            if isinstance(item, h5py.Dataset):
                datasets[name] = partial(read, item)

        file.visititems(add)
        yield datasets


def _check_sources(dataset: Any, folder: Path) -> None:  # noqa: ANN401
    """Refuses what HDF5 would take from other files: raw bytes, or zeros if a file is missing."""
    if dataset.external:
        raise DataError(f"{dataset.name} refers to raw bytes in other files, which are not read")
    for source in dataset.virtual_sources() if dataset.is_virtual else ():
        name = source.file_name
        if name != "." and not (Path(name).exists() or (folder / name).exists()):
            raise DataError(f"{dataset.name} refers to the file {name}, which does not exist")


@contextmanager
def _open_pt(path: Path) -> Iterator[Arrays]:
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

    def read(name: str, tensor: torch.Tensor) -> Array:
        check_size(name, tensor.nbytes)
        if tensor.dtype == torch.bfloat16:  # a type that NumPy lacks
            tensor = tensor.float()
        return tensor.numpy(force=True)  # even if it requires a gradient

    tensors = {str(name): each for name, each in held.items() if isinstance(each, torch.Tensor)}
    yield _ReadLater({name: partial(read, name, tensor) for name, tensor in tensors.items()})


READERS: dict[str, Callable[[Path], AbstractContextManager[Arrays]]] = {
    ".npy": _open_npy,
    ".npz": _open_npz,
    ".h5": _open_hdf5,
    ".hdf5": _open_hdf5,
    ".pt": _open_pt,
    ".pth": _open_pt,
}
