"""Scenes as arrays and as .npz files. No pickle is ever read or written."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np

from air.data.digits import Array, DataError, sha256

# Of each array its type, and a letter for each axis: axes of one letter are of one length.
FORM = dict(x="uint8 NCHH", counts="i8 N", overlaps="i8 N", labels="i8 NM", boxes="f4 NM4")


class Scenes(NamedTuple):
    """N scenes, H pixels a side, M objects at most; a box is tight around an object's pixels."""

    x: Array  # uint8 [N, H, H] or, with several channels, [N, C, H, H]
    counts: Array | None  # int64 [N]
    overlaps: Array | None  # int64 [N], pixels that an object shares with one put there before
    labels: Array | None  # int64 [N, M], -1 beyond the count
    boxes: Array | None  # float32 [N, M, (x0, y0, x1, y1)], x1, y1 exclusive, NaN beyond the count


class SceneSplits(NamedTuple):
    """Scenes to train on, held-out scenes, and the SHA-256 of all their arrays."""

    train: Scenes
    test: Scenes
    sha256: str


def write_scenes(path: Path, train: Scenes, test: Scenes) -> None:
    """Writes an .npz that is whole as soon as it has its name.

    Raises:
        DataError: If it cannot be written.
    """
    arrays = train._asdict() | {f"test_{name}": array for name, array in test._asdict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".scenes-", dir=path.parent) as folder:
            whole = Path(folder, "scenes.npz")
            with ZipFile(whole, "w", ZIP_DEFLATED, compresslevel=1) as archive:
                for name, array in arrays.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                        np.save(file, array, allow_pickle=False)
            whole.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error}); name another place") from error


def load_file(path: Path, *, hold_out_all: bool = False) -> SceneSplits:
    """Loads x and, if there, counts, ..., test_x, ... (else a tenth or all of x) of an .npz.

    Raises:
        DataError: If it holds no scenes; the message is one line for the user.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            train = read_split(archive, "", {"4": 4})
            channels = train.x.shape[1] if train.x.ndim == 4 else 1
            sizes = {"4": 4, "C": channels, "H": train.x.shape[-1]}
            test = read_split(archive, "test_", sizes) if "test_x" in archive else None
        if test is None:
            held = number_held_out(len(train.x), hold_out_all)
            test = Scenes._make(a if a is None else a[-held:] for a in train)
            train = Scenes._make(a if a is None else a[:-held] for a in train)
    except Exception as error:  # foreign bytes make zipfile and NumPy raise anything
        raise DataError(f"{path}: expected scenes, got {error}; if cached, delete it") from error
    return SceneSplits(train, test, sha256([*train, *test]))


def read_images(path: Path, side: int, channels: int) -> Array:
    """The array x of an .npz, uint8 [N, H, H] or, with several channels, [N, C, H, H].

    Raises:
        DataError: If it has none of that side and with so many channels.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            x = archive["x"]
    except Exception as error:  # foreign bytes make zipfile and NumPy raise anything
        raise DataError(f"{path}: expected images x, got {error}") from error
    form = (side, side) if channels == 1 else (channels, side, side)
    if channels == 1 and x.ndim == 4 and x.shape[1] == 1:
        x = x[:, 0]
    if x.dtype != np.uint8 or x.shape[1:] != form or not len(x):
        raise DataError(f"{path}: expected x uint8 (N, {str(form)[1:]}, got {x.dtype} {x.shape}")
    return x


def number_held_out(scenes: int, hold_out_all: bool) -> int:
    """How many, from the end on, of scenes of which none are said to be; 0 is -0: all."""
    return 0 if hold_out_all else min(max(scenes // 10, 1), 10_000)


def read_split(archive: Any, prefix: str, sizes: dict[str, int]) -> Scenes:  # noqa: ANN401
    """The arrays of this prefix, checked against `FORM` and the sizes of axes known already.

    Raises:
        ValueError: If one of them is of another form.
    """
    found: dict[str, Any] = dict.fromkeys(FORM)
    for name, form in FORM.items():
        if name == "x" or prefix + name in archive:
            a, (kind, axes) = archive[prefix + name], form.split()
            told = f"{prefix}{name} {a.dtype} {a.shape}, not {kind} {axes}, N > 1"
            if name == "x" and a.ndim == 3:  # NHH is one channel
                a = a[:, None]
            fits = a.ndim == len(axes) and len(a) > 1 and (name != "counts" or a.min() >= 0)
            fits = fits and (name != "x" or a.size > 0)
            fits = fits and np.can_cast(a.dtype, kind, "no" if name == "x" else "same_kind")
            if not fits or [*map(sizes.setdefault, axes, a.shape)] != [*a.shape]:
                raise ValueError(told)
            found[name] = a.astype(kind, copy=False)
    if found["x"].shape[1] == 1:
        found["x"] = found["x"][:, 0]
    return Scenes(**found)
