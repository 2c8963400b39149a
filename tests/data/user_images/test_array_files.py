"""Arrays in .npy, .npz, HDF5 and .pt files are read as they are; no object is ever unpickled."""

import io
import os
import pickle
import re
import resource
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from helpers import assert_refused
from numpy.lib import format as npy

from air.data.scenes import Array
from air.data.user_images.array_files import read_arrays
from air.storage.files import MAX_BYTES

X = np.random.default_rng(0).integers(0, 256, (5, 9, 9), np.uint8)
COUNTS = np.arange(5)
NAMES = ("x", "counts", "test_x")


def write(path: Path, arrays: dict[str, Any]) -> Path:
    """Writes arrays in the format that the suffix says; an .npy file holds x alone."""
    if path.suffix == ".npy":
        np.save(path, arrays["x"])
    elif path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix in (".pt", ".pth"):
        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
    else:
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array
    return path


def refused(path: Path, problem: str) -> None:
    assert_refused(path, re.escape(problem), lambda: read_arrays(path, NAMES))


OF_SEVERAL = [".npz", ".h5", ".hdf5", ".pt", ".pth"]
SUFFIXES = pytest.mark.parametrize("suffix", [".npy", *OF_SEVERAL])


@pytest.mark.parametrize("suffix", OF_SEVERAL)
def test_arrays_are_read_by_name(suffix: str, tmp_path: Path) -> None:
    arrays = {"x": X, "counts": COUNTS, "mine": X / 255}
    found = read_arrays(write(tmp_path / f"a{suffix}", arrays), NAMES)
    assert found.keys() == {"x", "counts"}
    assert np.array_equal(found["x"], X)
    assert np.array_equal(found["counts"], COUNTS)
    upper = (tmp_path / f"a{suffix}").rename(tmp_path / f"B{suffix.upper()}")
    assert read_arrays(upper, ("x",)).keys() == {"x"}


def test_arrays_of_a_folder_are_memory_mapped(tmp_path: Path) -> None:
    for name, array in {"x": X, "counts": COUNTS, "mine": X}.items():
        np.save(tmp_path / f"{name}.npy", array)
    found = read_arrays(tmp_path, NAMES)
    assert found.keys() == {"x", "counts"}
    for name, array in {"x": X, "counts": COUNTS}.items():
        assert np.array_equal(found[name], array)
        assert isinstance(found[name].base, np.memmap)
    upper = (tmp_path / "x.npy").rename(tmp_path / "X.NPY")
    assert np.array_equal(read_arrays(upper, NAMES)["x"], X)


@pytest.mark.parametrize("suffix", OF_SEVERAL)
def test_a_single_array_is_x(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"a{suffix}", {"images": X})
    assert np.array_equal(read_arrays(path, NAMES)["x"], X)
    for arrays in ({"test_x": X}, {"counts": COUNTS, "images": X}, {}):
        held = ", ".join(arrays) or "no array"
        refused(write(path, arrays), f": expected images under the name x, got {held}")


def test_tensors_of_every_kind_are_read(tmp_path: Path) -> None:
    tensor = torch.from_numpy(X)
    expected: list[tuple[object, Array]] = [
        (tensor, X),
        ((tensor // 2).to(torch.bfloat16), X // 2),  # 7 bits are exact
        (torch.nn.Parameter(tensor.float()), X),
        ({"x": tensor.double().requires_grad_()}, X),
        (tensor.permute(1, 2, 0), X.transpose(1, 2, 0)),
        ({"x": tensor, "else": torch.eye(3).to_sparse(), "word": "a"}, X),
    ]
    for held, array in expected:
        torch.save(held, tmp_path / "a.pt")
        assert np.array_equal(read_arrays(tmp_path / "a.pt", NAMES)["x"], array)
    torch.save(tensor, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert np.array_equal(read_arrays(tmp_path / "old.pt", NAMES)["x"], X)


@pytest.mark.parametrize(
    ("held", "problem"),
    [
        ([1, 2], "expected a tensor or tensors by name, got a list"),
        ({"format": 3, "model": {}}, "got the checkpoint of a model, which --load takes"),
        ({"a.weight": torch.ones(3), "a.bias": torch.ones(3)}, "got a.weight, a.bias"),
        ({"a": 1}, "got no array"),
        (torch.eye(9).to_sparse(), "damaged, or not a .pt file"),
        (torch.ones(1, device="meta"), "damaged, or not a .pt file"),
        (torch.zeros(1).expand(1 << 40), f"more than the limit of {MAX_BYTES:,}"),
        (torch.zeros(1, dtype=torch.bfloat16).expand(1 << 40), "x takes 2,199,0"),
    ],
    ids=str,
)
def test_pt_files_of_other_content_are_refused(held: object, problem: str, tmp_path: Path) -> None:
    torch.save(held, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", problem)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_no_object_is_unpickled(tmp_path: Path) -> None:
    trap = Trap(tmp_path / "sprung")
    objects = np.array([trap, trap], object)
    np.savez(tmp_path / "objects.npz", x=objects)
    refused(tmp_path / "objects.npz", ": it contains Python objects, which are never read")
    np.savez(tmp_path / "structured.npz", x=np.array([(1, trap)], "i4,O"))
    refused(tmp_path / "structured.npz", ": it contains Python objects, which are never read")
    np.save(tmp_path / "objects.npy", objects)
    refused(tmp_path / "objects.npy", ": it contains Python objects, which are never read")
    for suffix in ("npy", "npz", "h5", "pt"):
        (tmp_path / f"raw.{suffix}").write_bytes(pickle.dumps(trap))
        refused(tmp_path / f"raw.{suffix}", "")
        shutil.copy(tmp_path / "objects.npy", tmp_path / f"npy.{suffix}")
        refused(tmp_path / f"npy.{suffix}", "")
    for new in (True, False):
        torch.save({"x": trap}, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
        refused(tmp_path / "a.pt", ": it holds more than tensors, or is not a .pt file")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=np.void(pickle.dumps(trap)))
    assert read_arrays(tmp_path / "a.h5", NAMES)["x"].dtype.kind == "V"
    assert not (tmp_path / "sprung").exists()


@SUFFIXES
def test_foreign_and_damaged_files_are_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a b[1]{suffix}"
    refused(path, ": No such file or directory")
    intact = write(path, {"x": X}).read_bytes()
    if os.geteuid():  # root may read everything
        path.chmod(0)
        refused(path, ": Permission denied")
        path.chmod(0o600)
    for content in (b"", b"no arrays", intact[: len(intact) // 2], b"\x93NUMPY", b"PK"):
        path.write_bytes(content)
        refused(path, "")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<>")
        archive.writestr("x.xml", "<>")
    refused(path, "")
    path.unlink()
    path.mkdir()
    refused(path, ": Is a directory")


def test_hdf5_without_h5py_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.h5", {"x": X})
    monkeypatch.setitem(sys.modules, "h5py", None)
    refused(tmp_path / "a.h5", ": HDF5 files need h5py: pip install h5py")


def test_datasets_of_other_kinds_are_left_to_the_check_of_images(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = h5py.Empty("f4")
        file["words"] = ["a", "b"]
        file["data/counts"] = COUNTS
        file["loop"] = h5py.SoftLink("/")
        file["away"] = h5py.ExternalLink("/etc/passwd", "/")
    assert read_arrays(tmp_path / "a.h5", NAMES).keys() == {"x"}
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["data/x"], file["data/y"] = X, X
    refused(tmp_path / "a.h5", ": expected images under the name x, got data/x, data/y")


def test_datasets_in_other_files_are_read_or_named(tmp_path: Path) -> None:
    write(tmp_path / "part.h5", {"x": X})
    layout = h5py.VirtualLayout(X.shape, X.dtype)
    layout[:] = h5py.VirtualSource("part.h5", "x", X.shape)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_virtual_dataset("x", layout)
    assert np.array_equal(read_arrays(tmp_path / "a.h5", NAMES)["x"], X)
    (tmp_path / "part.h5").unlink()  # HDF5 would read zeros
    refused(tmp_path / "a.h5", ": /x refers to part.h5, which is missing")
    secret = [(str(tmp_path / "secret"), 0, h5py.h5f.UNLIMITED)]
    (tmp_path / "secret").write_bytes(bytes(500))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", X.shape, X.dtype, external=secret)
    refused(tmp_path / "a.h5", ": /x refers to raw bytes in other files, never read")


def npy_header(shape: tuple[int, ...], kind: str = "|u1") -> bytes:
    """The head of a .npy file that declares a shape."""
    head = io.BytesIO()
    npy.write_array_header_1_0(head, {"descr": kind, "fortran_order": False, "shape": shape})
    return head.getvalue()


def huge_files(folder: Path) -> list[Path]:
    """Small files that declare huge arrays."""
    with zipfile.ZipFile(folder / "declared.npz", "w") as archive:
        archive.writestr("x.npy", npy_header((1 << 22, 1 << 20)) + bytes(99))
    with zipfile.ZipFile(folder / "deflated.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", npy_header((1 << 40,)) + bytes(1 << 20))
    content = bytearray((folder / "deflated.npz").read_bytes())
    at = content.rindex(b"PK\x01\x02")  # the table of contents lies about the size
    content[at + 24 : at + 28] = (2**32 - 2).to_bytes(4, "little")
    (folder / "deflated.npz").write_bytes(content)
    with zipfile.ZipFile(folder / "three.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(3):
            archive.writestr(f"{i}", b"")
        for info in archive.infolist():
            info.file_size = 2**32 - 2
    with h5py.File(folder / "chunks.h5", "w") as file:
        file.create_dataset("x", (1 << 20, 1 << 20), "u1", chunks=(1, 1 << 20), compression="gzip")
    return sorted(folder.iterdir())


def test_a_small_file_that_declares_a_huge_array_takes_no_memory(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in huge_files(tmp_path):
        refused(path, "")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 100_000  # KiB
    refused(tmp_path / "chunks.h5", f"more than the limit of {MAX_BYTES:,}; save the images")
    refused(tmp_path / "three.npz", " unpacks to 12,884,901,882 bytes, more than the ")
