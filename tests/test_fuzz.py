"""Whatever is given, the program succeeds or says in one line, with exit code 2, what is wrong.

About 1,600 cases: flags, files of scenes and folders of them, pictures, files of digits,
checkpoints. Of training, only one step is taken.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from helpers import capture_only, exit_code, run, small_air
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import main
from air import multi_mnist
from air.cli.config import Config, resolve_config
from air.cli.recorder import Recorder
from air.data.scenes import LABELS, DataError
from air.data.synthetic.digits import MNIST_FILES
from air.data.user_images.preparation import ImageSettings
from air.data.user_images.sources import load_data
from air.evaluation.metrics import HeldOut, evaluate
from air.storage.checkpoint import CheckpointError, read_weights
from air.training.events import SnapshotDue
from air.training.trainer import Trainer

pytestmark = pytest.mark.slow

TINY = (
    "-b 4 --rnn-hidden-size 6 --encoder-latent-size 3 --encoder-net 4 --decoder-net 4 "
    "--predict-net 4 --bl-predict-net 4 --window-size 6 -n 2"
)


def cases(number: int) -> settings:
    return settings(
        max_examples=number,
        deadline=None,
        database=None,
        derandomize=True,  # the same cases in every run of the suite
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """An intact file of scenes: [30, 12, 12], with counts and boxes."""
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 3, 30)
    boxes = rng.uniform(0, 12, (30, 2, 4)).astype(np.float32)
    x = rng.integers(0, 255, (30, 12, 12), np.uint8)
    np.savez(tmp_path / "mine.npz", x=x, counts=counts, boxes=boxes)
    return tmp_path / "mine.npz"


@pytest.fixture
def program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[[list[str]], int]]:
    """Runs the program up to training; gives its exit code, and looks at what it says."""
    number = iter(range(10**9))

    def answer(arguments: list[str]) -> int:
        folder = tmp_path / f"out{next(number)}"
        monkeypatch.chdir(tmp_path)
        place = [] if "--resume" in arguments else ["--output-dir", str(folder)]
        code = exit_code(main.main, [*arguments, *place], compiler=capture_only)
        said = capsys.readouterr()
        assert code in (0, 2), (arguments, said)
        if code == 2:
            assert said.err.count("\n") == 1, (arguments, said.err)
            assert said.err.startswith(("main.py: error: ", "pytest: error: ", "-c: error: ")) or (
                ": error: " in said.err
            )
        return code

    with monkeypatch.context() as patch:
        patch.setattr(main, "train", take_a_step)
        patch.setattr(main, "finish", lambda *_: 0)
        yield answer


def take_a_step(_: Config, trainer: Trainer, recorder: Recorder, signals: object) -> None:
    """In place of training."""
    if not trainer.finished:
        trainer._take_step()
    recorder.handle(SnapshotDue(trainer.step))


def options() -> list[str]:
    """Every flag but those that write elsewhere, ask servers, or ask for more memory than is."""
    found = []
    for action in main.build_parser()._actions:
        names = {"help", "help_all", "output_dir", "viz", "save", "mnist_dir", "resume"}
        sizes = {"num_scenes", "num_test_scenes"}
        if action.dest not in names | sizes:
            found += [name for name in action.option_strings if name.startswith("--")]
    return found


words = st.one_of(
    st.integers(-3, 40).map(str),
    st.floats(-2, 2).map(str),
    st.sampled_from(["nan", "inf", "-inf", "1e400", "1e-400", "0x10", "1_0", "", " ", "-", "--"]),
    st.sampled_from(["ReLU", "cosine", "marginal", "cpu", "cuda:9", "none", "mine.npz", "."]),
    st.text(st.characters(codec="utf-8"), max_size=8),
)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@cases(75)
@given(st.lists(st.tuples(st.sampled_from(options()), st.lists(words, max_size=2)), max_size=3))
def test_flags(
    scenes: Path, program: Callable[[list[str]], int], asked: list[tuple[str, list[str]]]
) -> None:
    line = [word for name, values in asked for word in (name, *values)]
    program([*TINY.split(), "--data", str(scenes), *line])


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """Bytes like these with some changed, cut out or put in."""
    place = st.integers(0, len(whole))
    change = st.tuples(place, st.integers(0, 30), st.binary(max_size=30))

    def apply(changes: list[tuple[int, int, bytes]]) -> bytes:
        found = whole
        for start, length, new in changes:
            found = found[:start] + new + found[start + length :]
        return found

    return st.lists(change, min_size=1, max_size=4).map(apply)


def use(path: Path) -> None:
    """Loads a file of scenes as the program does, and evaluates on them."""
    try:
        found = main.load_scenes(resolve_config({"data": str(path), "num_steps": 1}))
        held_out = HeldOut(
            found.test.x,
            counts=found.test.counts,
            boxes=found.test.boxes,
            overlaps=found.test.overlaps,
        )
    except ValueError:
        return
    if found.x_size == 12 and found.channels < 5:
        with contextlib.suppress(ValueError):  # a box that is not finite
            evaluate(small_air(channels=found.channels), held_out)


@cases(200)
@given(st.data())
def test_damaged_files_and_folders_of_scenes(scenes: Path, data: st.DataObject) -> None:
    folder = scenes.with_name("folder")
    folder.mkdir(exist_ok=True)
    with np.load(scenes) as file:
        for name in file:
            np.save(folder / f"{name}.npy", file[name])
    npz = folder.with_name("damaged.npz")
    npz.write_bytes(scenes.read_bytes())
    path = data.draw(st.sampled_from([npz, npz, npz, *sorted(folder.iterdir())]))
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    use(npz if path == npz else data.draw(st.sampled_from([folder, folder / "x.npy"])))


numbers = st.one_of(st.integers(-5, 5), st.floats(width=32), st.integers(-(2**60), 2**60))
types = st.sampled_from(["uint8", "int8", "int64", "float32", "float64", "bool", "U3", "complex64"])


@cases(75)
@given(st.data())
def test_files_of_other_arrays(scenes: Path, data: st.DataObject) -> None:
    with np.load(scenes) as file:
        arrays = dict(file)
    for name in data.draw(st.sets(st.sampled_from(["x", *LABELS]), max_size=2)):
        shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 4, 12, 30]), max_size=4))
        if name in arrays and data.draw(st.booleans()):
            array = arrays[name].copy()
            array.flat[data.draw(st.integers(0, array.size - 1))] = data.draw(st.integers(0, 99))
        else:
            with np.errstate(all="ignore"), contextlib.suppress(OverflowError):
                kind = data.draw(types)
                array = np.full(shape, data.draw(numbers)).astype(kind)
        arrays[data.draw(st.sampled_from(["", "test_"])) + name] = array
    path = scenes.with_name("other.npz")
    np.savez(path, **arrays)
    use(path)


@pytest.fixture
def whole_files(tmp_path: Path) -> dict[str, bytes]:
    """The bytes of intact files of images by their suffix."""
    x = np.random.default_rng(0).integers(0, 255, (2, 12, 12), np.uint8)
    first, second = map(Image.fromarray, x)
    pages: dict[str, Any] = {"save_all": True, "append_images": [second]}
    options = {"tif": pages | {"compression": "tiff_lzw"}, "tiff": pages, "gif": pages}
    options |= {"webp": pages, "png": pages}
    for suffix in ("png", "jpg", "bmp", "pgm", *options):
        first.save(tmp_path / f"whole.{suffix}", **options.get(suffix, {}))
    torch.save({"x": torch.from_numpy(x)}, tmp_path / "whole.pt")
    torch.save(torch.from_numpy(x), tmp_path / "whole.pth", _use_new_zipfile_serialization=False)
    with h5py.File(tmp_path / "whole.h5", "w") as file:
        file.create_dataset("x", data=x, compression="gzip")
    return {path.suffix: path.read_bytes() for path in tmp_path.glob("whole.*")}


@pytest.mark.parametrize(
    ("suffixes", "number"),
    [(".png .jpg .bmp .pgm .tif .tiff .gif .webp", 200), (".pt .pth", 100), (".h5", 100)],
)
def test_damaged_files_of_images(
    suffixes: str, number: int, whole_files: dict[str, bytes], tmp_path: Path
) -> None:
    @cases(number)
    @given(st.data())
    def load(data: st.DataObject) -> None:
        suffix = data.draw(st.sampled_from(suffixes.split()))
        path = tmp_path / f"damaged{suffix}"
        path.write_bytes(data.draw(damaged(whole_files[suffix])))
        try:
            found = load_data(path, ImageSettings(x_size=12, crop=False), hold_out_all=True)
        except DataError as error:
            assert str(error).startswith(str(path))  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert found.test.x.shape[-2:] == (12, 12)

    load()


@cases(150)
@given(st.data())
def test_damaged_idx_files(tmp_path: Path, data: st.DataObject) -> None:
    images = np.full((20, 28, 28), 9, np.uint8)
    whole = {
        "images-idx3": b"\0\0\x08\x03" + np.array(images.shape, ">u4").tobytes() + images.tobytes(),
        "labels-idx1": b"\0\0\x08\x01" + np.array([20], ">u4").tobytes() + bytes(20),
    }
    for part in ("train", "t10k"):
        for kind, content in whole.items():
            (tmp_path / f"{part}-{kind}-ubyte").write_bytes(content)
    name = data.draw(st.sampled_from(sorted(MNIST_FILES)))
    (tmp_path / name).write_bytes(data.draw(damaged((tmp_path / name).read_bytes())))
    wanted = multi_mnist.SceneSettings(digits="mnist", num_scenes=2, num_test_scenes=2)
    with contextlib.suppress(ValueError):
        multi_mnist.load_scenes(wanted, cache_dir=tmp_path / "cache", mnist_dir=tmp_path)


@pytest.fixture
def checkpoint(scenes: Path, tmp_path: Path) -> Path:
    """The checkpoint of a small run."""
    line = f"{TINY} --data {scenes} --output-dir run"
    assert run(line, tmp_path, {}).returncode == 0
    return tmp_path / "run" / "checkpoint.pt"


@cases(50)
@given(st.data())
def test_damaged_checkpoints(checkpoint: Path, tmp_path: Path, data: st.DataObject) -> None:
    other = tmp_path / "damaged.pt"
    other.write_bytes(data.draw(damaged(checkpoint.read_bytes())))
    with contextlib.suppress(CheckpointError):
        read_weights(other)


values = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.floats(), st.text(max_size=4),
    st.lists(st.integers(0, 3), max_size=2), st.just({}), st.just(torch.zeros(3)),
    st.just(torch.tensor(7)),
)  # fmt: skip


@cases(50)
@given(
    st.sampled_from(["", "config", "model", "optimizer", "tally"]),
    st.integers(0, 10**6),
    st.one_of(st.just("nothing"), values),
)
def test_checkpoints_of_other_content(
    checkpoint: Path,
    program: Callable[[list[str]], int],
    tmp_path: Path,
    inner: str,
    place: int,
    value: Any,  # noqa: ANN401
) -> None:
    state = torch.load(checkpoint, weights_only=True)
    target = dict(state[inner] if inner else state)
    name = sorted(target)[place % len(target)]
    if (inner, name) in (("config", "rnn_hidden_size"), ("config", "model_steps")):
        return  # may ask for more memory than there is
    target[name] = value
    if isinstance(value, str) and value == "nothing":
        del target[name]
    folder = tmp_path / f"other{len(list(tmp_path.glob('other*')))}"
    folder.mkdir()
    torch.save({**state, inner: target} if inner else target, folder / "checkpoint.pt")
    program(["--resume", str(folder), "--no-viz"])
