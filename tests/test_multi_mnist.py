"""Scenes hold what the settings ask for, stay the same, and are never left half written."""

import random
import re
import signal
import subprocess
import sys
from dataclasses import fields, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, files, run, write_idx
from PIL import Image

from air import multi_mnist
from air.data.scenes import Array
from air.data.synthetic.digits import resize_digit
from air.data.synthetic.sprites import SHAPES
from air.data.user_images.sources import load_data
from air.multi_mnist import DataError, Scenes, SceneSettings, load_scenes

MNIST = ROOT.parent / "shared" / "mnist"
SMALL = partial(SceneSettings, num_scenes=300, num_test_scenes=40)
FEW = partial(SceneSettings, num_scenes=20, num_test_scenes=5)


def train(folder: Path, **settings: object) -> list[Array]:
    """The arrays x, counts, overlaps, labels and boxes of a few scenes."""
    scenes = load_scenes(SMALL(**settings), cache_dir=folder).train  # type: ignore[arg-type]
    return [array for array in scenes if array is not None]


def cut(image: Array) -> Array:
    """The part of an image [H, H] within the tight box of its light pixels."""
    ys, xs = (np.flatnonzero(image.any(axis)) for axis in (1, 0))
    return image[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]


def test_arrays_have_their_types_and_shapes_and_uniform_counts(tmp_path: Path) -> None:
    arrays = x, counts, _, labels, boxes = train(tmp_path, num_scenes=2000, counts=(0, 3, 1))
    assert [array.dtype.name for array in arrays] == ["uint8", *["int64"] * 3, "float32"]
    shapes = [(2000, 50, 50), (2000,), (2000,), (2000, 3), (2000, 3, 4)]
    assert [array.shape for array in arrays] == shapes
    found, numbers = np.unique(counts, return_counts=True)
    assert found.tolist() == [0, 1, 3]
    assert np.allclose(numbers / 2000, 1 / 3, atol=0.05)  # although crowded scenes are redrawn
    absent = np.arange(3) >= counts[:, None]
    assert np.array_equal(labels == -1, absent)
    assert np.array_equal(np.isnan(boxes).all(2), absent)
    assert not x[counts == 0].any()
    centres = boxes[counts == 1, 0].reshape(-1, 2, 2).mean(1)
    assert np.allclose(centres.mean(0), 25, atol=1.2)  # objects lie everywhere in the scene
    assert np.all((centres.min(0) < 13) & (centres.max(0) > 37))


def test_boxes_are_tight_and_enclose_all_pixels(tmp_path: Path) -> None:
    for image, count, _, _, boxes in zip(*train(tmp_path, counts=(1, 2)), strict=True):
        rest = image.copy()
        for left, top, right, bottom in boxes[:count].astype(int):
            part = image[top:bottom, left:right]
            assert all(edge.any() for edge in (part[0], part[-1], part[:, 0], part[:, -1]))
            rest[top:bottom, left:right] = 0
        assert not rest.any()


def test_digits_add_up_and_never_wrap_around(digits: list[Array]) -> None:
    settings = SMALL(counts=(2,), scale_mean=1.0, scale_sd=0.0)  # no digit is resized
    bank = [array[:1] for array in digits[:2]]
    x, held_out = (multi_mnist._draw(settings, test, *bank).x for test in (False, True))
    assert np.all(x.sum((1, 2), dtype=int) == 2 * bank[0].sum(dtype=int))
    assert not np.array_equal(x[:40], held_out)  # each split has its own random numbers


def test_overlaps_count_the_pixels_of_two_digits(tmp_path: Path) -> None:
    solid = np.full((1, 28, 28), 100, np.uint8), np.zeros(1, np.uint8)
    x, _, overlaps, *_ = multi_mnist._draw(SMALL(counts=(0, 1, 2)), False, *solid)
    assert np.array_equal(overlaps, (x == 200).sum((1, 2)))
    assert 0 < (overlaps > 0).mean() < 1 / 3


def test_min_gap_is_kept(tmp_path: Path) -> None:
    for gap in (0, 5.0):
        _, _, overlaps, _, boxes = train(
            tmp_path, counts=(3,), min_gap=gap, x_size=60, num_scenes=100
        )
        assert not overlaps.any()
        pairs = [pair for places in boxes for pair in combinations(places, 2)]
        gaps = [max(*(a[:2] - b[2:]), *(b[:2] - a[2:])) for a, b in pairs]
        assert gap <= min(gaps) < gap + 3


@pytest.mark.parametrize(("counts", "number"), [((0, 1, 2), 1200), ((3,), 100)])
def test_digits_of_recipe_apart_are_apart_along_both_axes(
    counts: tuple[int, ...], number: int
) -> None:
    solid = np.full((1, 28, 28), 100, np.uint8), np.zeros(1, np.uint8)  # as large as its square
    settings = SMALL(recipe="apart", counts=counts, num_scenes=number)
    x, found, overlaps, _, all_boxes, *_ = multi_mnist._draw(settings, False, *solid)
    boxes = np.asarray(all_boxes)
    assert np.nanmax(boxes) == 50  # up to the edges
    assert np.nanmin(boxes) == 0
    sides = boxes[..., 2:] - boxes[..., :2]
    assert np.all((sides == 24) | np.isnan(sides))
    assert set(np.asarray(found)) == set(counts)
    pairs = [pair for places in boxes for pair in combinations(places, 2)]
    steps = np.array([np.abs(a[:2] - b[:2]) for a, b in pairs if not np.isnan([a, b]).any()])
    assert len(steps) > 250
    assert steps.min(0).tolist() == [12, 12]
    assert np.asarray(overlaps).any()  # at the corners
    assert x.max() == 200


def test_recipe_apart_never_adds_up_to_more_than_255() -> None:
    light = np.full((1, 28, 28), 128, np.uint8), np.zeros(1, np.uint8)
    settings = SMALL(recipe="apart", counts=(2,), num_scenes=60)
    x, _, overlaps, *_ = multi_mnist._draw(settings, False, *light)
    assert not np.asarray(overlaps).any()  # such scenes are drawn again
    assert np.all(x.sum((1, 2), dtype=int) == 2 * 128 * 24**2)


def test_the_side_of_a_digit_follows_the_scale() -> None:
    bank, label = np.full((1, 28, 28), 200, np.uint8), np.zeros(1, np.uint8)
    for mean, sd, least, most in ((2.0, 0.0, 14, 14), (0.7, 0.0, 40, 40), (1.0, 7.0, 4, 49)):
        settings = SMALL(counts=(1,), scale_mean=mean, scale_sd=sd)
        boxes: Any = multi_mnist._draw(settings, False, bank, label).boxes
        sides = boxes[:, 0, 2] - boxes[:, 0, 0]
        assert (sides.min(), sides.max()) == (least, most)
    boxes = multi_mnist._draw(SMALL(counts=(1,), num_scenes=2000), False, bank, label).boxes
    assert (boxes.min(), boxes.max()) == (0, 50)  # edge to edge
    scales = 28 / (boxes[:, 0, 2] - boxes[:, 0, 0] + 0.5)
    assert [scales.mean(), scales.std()] == pytest.approx([1.3, 0.1], abs=0.01)


def test_sides_lie_within_their_bounds_and_positions_reach_the_edges(tmp_path: Path) -> None:
    one = {"recipe": "dsprites", "counts": (1,), "x_size": 40, "sides": (9, 18)}
    settings = SceneSettings(num_scenes=2000, num_test_scenes=2, rotation=180.0, **one)  # type: ignore[arg-type]
    boxes: Any = load_scenes(settings, cache_dir=tmp_path).train.boxes
    sides = (boxes[:, 0, 2:] - boxes[:, 0, :2]).max(1)
    assert 4 <= sides.min() < 8
    assert 15 < sides.max() <= 18
    assert (boxes[:, 0, :2].min(0) <= 1).all()
    assert (boxes[:, 0, 2:].max(0) >= 39).all()


@pytest.mark.parametrize("recipe", ["air", "dsprites"])
def test_binary_scenes_have_two_values_and_nothing_outside_the_boxes(
    recipe: str, tmp_path: Path
) -> None:
    small = {"x_size": 64, "sides": (9, 18), "counts": (0, 1, 6), "binary": True, "rotation": 90.0}
    x, counts, overlaps, labels, boxes = train(tmp_path, recipe=recipe, **small)
    assert set(np.unique(x)) == {0, 255}
    assert x.shape == ((300, 3, 64, 64) if recipe == "dsprites" else (300, 64, 64))
    ink = x.reshape(300, -1, 64, 64).any(1)
    inside = np.zeros_like(ink)
    for n, m in np.argwhere(labels >= 0):
        left, top, right, bottom = boxes[n, m].astype(int)
        inside[n, top:bottom, left:right] = True
    assert not (ink & ~inside).any()
    assert np.array_equal(counts, (labels >= 0).sum(1))
    assert (overlaps[counts < 2] == 0).all()
    assert (overlaps[counts == 6] > 0).any()


def test_sprites_have_every_shape_and_bright_colours(tmp_path: Path) -> None:
    settings = {"recipe": "dsprites", "counts": (1,), "x_size": 32, "sides": (9, 18)}
    x, _, _, labels, _ = train(tmp_path, **settings)
    assert set(labels.flat) == set(range(len(SHAPES)))
    assert (x.max((1, 2, 3)) == 255).all()  # in at least one channel
    pure = x.max((2, 3)).astype(int)
    assert len({tuple(color) for color in pure}) > 250
    assert (np.abs(np.corrcoef(pure.T) - np.eye(3)) < 0.6).all()


def test_a_later_sprite_is_in_front(tmp_path: Path) -> None:
    pairs = {"recipe": "dsprites", "counts": (2,), "x_size": 24, "sides": (16, 16)}
    x, _, overlaps, _, boxes = train(tmp_path, **pairs)
    for n in np.flatnonzero(overlaps > 20)[:50]:
        x0, y0, x1, y1 = boxes[n, 1].astype(int)
        centre = x[n, :, (y0 + y1) // 2, (x0 + x1) // 2]
        assert centre.max() == 255  # not mixed with the sprite behind it


@pytest.mark.parametrize("recipe", ["air", "dsprites"])
@pytest.mark.parametrize("background", ["uniform", "noisy"])
def test_backgrounds_are_darker_than_objects_and_hidden_behind_sprites(
    recipe: str, background: str, tmp_path: Path
) -> None:
    settings = {"recipe": recipe, "counts": (0, 1), "x_size": 30, "background": background}
    x, counts, _, _, boxes = train(tmp_path, **settings)
    x = x.reshape(300, -1, 30, 30)
    empty = x[counts == 0]
    flat = (empty == empty[:, :, :1, :1]).all((1, 2, 3))
    assert flat.all() if background == "uniform" else not flat.any()
    levels = empty[:, 0, 0, 0]
    assert 30 < levels.mean() < 66
    assert levels.max() < 97
    assert x[counts == 1].max((1, 2, 3)).min() > 150  # objects stand out
    if recipe == "dsprites":  # no channel of the background shines through
        for image, box in zip(x[counts == 1], boxes[counts == 1, 0].astype(int), strict=True):
            ink = image[:, (box[1] + box[3]) // 2, (box[0] + box[2]) // 2]
            assert (ink == image[:, box[1] : box[3], box[0] : box[2]].max((1, 2))).any()
            assert ink.max() == 255


@pytest.mark.parametrize(
    ("settings", "side"),
    [({"x_size": 28, "scale_mean": 1.0, "scale_sd": 0.0}, 28), ({"recipe": "apart"}, 24)],
)
def test_each_split_shows_its_own_digits(
    settings: dict[str, Any], side: int, digits: list[Array], tmp_path: Path
) -> None:
    assert [np.bincount(labels).tolist() for labels in digits[1::2]] == [[400] * 10, [100] * 10]
    assert not {image.tobytes() for image in digits[0]} & {image.tobytes() for image in digits[2]}
    splits = load_scenes(SMALL(num_test_scenes=300, counts=(1,), **settings), cache_dir=tmp_path)
    for (x, _, _, labels, *_), bank in ((splits.train, digits[:2]), (splits.test, digits[2:])):
        small = [resize_digit(image, side) for image in bank[0]]
        known = {cut(image).tobytes(): label for image, label in zip(small, bank[1], strict=True)}
        assert [[known[cut(image).tobytes()]] for image in x] == np.asarray(labels).tolist()
        assert len({image.tobytes() for image in x}) > 200


@pytest.mark.slow
def test_same_settings_give_the_same_bytes(tmp_path: Path) -> None:
    before = str(np.random.get_state()), random.getstate()  # noqa: NPY002
    train(tmp_path / "one", counts=(2, 0, 1))
    assert (str(np.random.get_state()), random.getstate()) == before  # noqa: NPY002
    line = "--num-scenes 3e2 --num-test-scenes 40 --cache-dir two --out"
    words = [sys.executable, str(ROOT / "multi_mnist.py"), *line.split()]
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with (
        subprocess.Popen([*words, "a.npz"], cwd=tmp_path, **pipes) as first,
        subprocess.Popen([*words, "b.npz"], cwd=tmp_path, **pipes) as second,
    ):
        assert [each.communicate(timeout=60)[1] for each in (first, second)] == ["", ""]
    assert files(tmp_path / "one") == files(tmp_path / "two")
    paths = [*tmp_path.glob("*/scenes-*.npz"), *tmp_path.glob("?.npz")]
    assert [len(paths), len({path.read_bytes() for path in paths})] == [4, 1]
    assert paths[0].read_bytes()[10:14] == b"\0\0\x21\0"  # the date in the zip file is 1980


@pytest.mark.parametrize(
    ("settings", "sha256"),
    [
        ({}, "2770e9a9fb51"),
        ({"counts": (0, 1, 3), "scale_sd": 0.2, "min_gap": 1.0}, "0cdd7791c71a"),
        ({"recipe": "apart"}, "4f3587381121"),
    ],
)
def test_scenes_are_the_same_on_every_machine(
    settings: dict[str, Any], sha256: str, tmp_path: Path
) -> None:
    """And in every version: otherwise results could not be compared."""
    assert load_scenes(SMALL(**settings), cache_dir=tmp_path).sha256.startswith(sha256)


def test_other_settings_give_other_scenes(tmp_path: Path) -> None:
    one = load_scenes(FEW(), cache_dir=tmp_path)
    changes: list[dict[str, Any]] = [
        *({"seed": 1}, {"counts": (0, 1)}, {"x_size": 51}, {"scale_sd": 0.2}, {"min_gap": 3.0}),
        *({"rotation": 9.0}, {"sides": (9, 18)}, {"binary": True}, {"recipe": "dsprites"}),
        *({"background": "noisy"}, {"background": "uniform"}),
    ]
    others = {load_scenes(FEW(**change), cache_dir=tmp_path).sha256 for change in changes}
    assert len({one.sha256, *others}) == len(files(tmp_path)) == 12


def pyro_scene(images: Array, rng: np.random.RandomState, method: Image.Resampling) -> Array:
    """A second implementation of Pyro's recipe: digits are padded to the size of the scene."""
    count, total = rng.randint(3), np.full((50, 50), 256)
    while total.max() > 255:
        total = np.zeros((50, 50), int)
        for _ in range(count):
            image = Image.fromarray(images[rng.randint(len(images))])
            side = int(28 / (0.1 * rng.randn() + 1.3))
            above, before = rng.randint(0, 50 - side), rng.randint(0, 50 - side)
            margins = ((above, 50 - side - above), (before, 50 - side - before))
            total += np.pad(np.asarray(image.resize((side, side), method)), margins)
    return total


@pytest.mark.parametrize("name", ["nearest", "bicubic"])
def test_a_pyro_recipe_draws_the_scenes_of_pyros_example(
    name: str, digits: list[Array], tmp_path: Path
) -> None:
    settings, rng = SceneSettings(recipe=f"pyro-{name}"), np.random.RandomState(681307)
    object.__setattr__(settings, "num_scenes", 200)  # which SceneSettings refuses
    expected = [pyro_scene(digits[0], rng, Image.Resampling[name.upper()]) for _ in range(200)]
    assert np.array_equal(multi_mnist._draw(settings, False, *digits[:2]).x, expected)
    with pytest.raises(DataError, match=f"expected MNIST for recipe pyro-{name}, got other digits"):
        load_scenes(settings, cache_dir=tmp_path, mnist_dir=write_idx(tmp_path / "idx", digits))


@pytest.mark.benchmark  # 70,000 scenes each
@pytest.mark.slow
@pytest.mark.skipif(not MNIST.is_dir(), reason=f"needs full MNIST in {MNIST}")
@pytest.mark.parametrize(("name", "total"), [("nearest", 883_114_919), ("bicubic", 894_575_454)])
def test_pyro_sets_have_their_published_pixel_sums(name: str, total: int, tmp_path: Path) -> None:
    splits = load_scenes(SceneSettings(recipe=f"pyro-{name}"), cache_dir=tmp_path, mnist_dir=MNIST)
    assert (splits.train.x.shape, len(splits.test.x)) == ((60_000, 50, 50), 10_000)
    assert splits.train.x.sum(dtype=np.int64) == total


@pytest.mark.parametrize(
    ("name", "expected", "values"),
    [
        ("digits", "embedded or mnist", ["emnist"]),
        ("recipe", "air or apart or dsprites or solids or table-top or .*", ["pyro", None]),
        (
            "counts",
            "a list of values, each .* at least 0, at most 50",
            [(), (0, -1), (1.5,), (51,)],
        ),
        ("x_size", "a whole number of at least 8, at most 1000", [7, 50.0, "50", None]),
        ("num_scenes", "a whole number of at least 2, at most", [1, 10**9]),
        ("scale_mean", "a number of at least 0.01, at most 7", [0, float("nan"), None]),
        ("scale_mean", "28 / x_size or more", [0.4]),
        ("sides", "a list of 2, each .* at least 4, at most 1000", [(3, 9), (9,), (9.5, 12), ()]),
        ("sides", "the minimum first", [(12, 9)]),
        ("binary", "yes or no", [2, "yes"]),
        ("background", "black or uniform or gradient or grid or", ["white", None]),
        ("min_gap", "a number of at least 0, at most 1000", [-1, float("inf")]),
    ],
)
def test_a_setting_out_of_bounds_is_named(name: str, expected: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"^{name}: expected {expected}.*, got "):
            SceneSettings(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"recipe": "pyro-nearest", "x_size": 60}, "x_size: expected 50, which pyro-nearest fixes"),
        ({"recipe": "pyro-bicubic", "background": "noisy"}, "background: expected black, which py"),
        ({"binary": True, "background": "noisy"}, "background: expected black for binary scenes"),
        ({"object_levels": (0, 0)}, "object_levels: expected a level above 0 on black, got 0 0"),
        ({"background_levels": (0, 9)}, "background_levels: expected .* for a black background"),
        ({"recipe": "dsprites", "digits": "mnist"}, "digits: expected embedded for recipe dsprite"),
        ({"sides": (9, 51)}, "x_size: expected at least the maximum side, 51, got 50"),
        ({"recipe": "apart", "x_size": 23}, "x_size: expected at least the maximum side, 24, got"),
        ({"recipe": "apart", "sides": (9, 18)}, r"sides: expected \(24, 24\), which apart fixes"),
        ({"recipe": "apart", "scale_mean": 1.2}, "scale_mean: expected 1.16.*, which apart fixes"),
    ],
    ids=str,
)
def test_settings_that_exclude_each_other_are_refused(
    settings: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=f"^{problem}"):
        SceneSettings(**settings)


def test_scenes_that_cannot_be_made_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multi_mnist, "MAX_ATTEMPTS", 100)
    for impossible in ({"counts": (9,), "x_size": 30}, {"counts": (4,), "recipe": "apart"}):
        with pytest.raises(
            ValueError, match=r"counts: \d objects do not fit into a scene; use fewer"
        ):
            train(tmp_path, **impossible)
    with pytest.raises(ValueError, match=r"mnist_dir: expected only with .*, got"):
        load_scenes(SMALL(), cache_dir=tmp_path, mnist_dir=tmp_path)
    assert not files(tmp_path)


def test_settings_of_recipe_apart_can_be_changed_by_replace() -> None:
    settings = SceneSettings(recipe="apart", sides=(24, 24))
    assert settings == SceneSettings(recipe="apart")
    assert replace(settings, seed=1) == SceneSettings(recipe="apart", seed=1)


def test_a_second_load_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(folder := tmp_path / ".cache" / "air")
    monkeypatch.delattr(multi_mnist, "_draw")
    assert [a.tobytes() for a in train(folder)] == [a.tobytes() for a in first]
    places = {"AIR_CACHE": folder, "HOME": tmp_path}
    for variable, place in places.items():  # HOME counts if AIR_CACHE is not set
        monkeypatch.setenv(variable, str(place))
        load_scenes(SMALL())
        monkeypatch.delenv(variable)


def test_a_damaged_cache_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    train(tmp_path)
    path = next(tmp_path.iterdir())
    middle = len(whole := path.read_bytes()) // 2
    for damaged in (whole[:middle], whole[:middle] + b"damage" + whole[middle + 6 :], b""):
        path.write_bytes(damaged)
        with pytest.raises(
            DataError, match=f"^{path}: .*; delete the file to make the scenes again$"
        ):
            train(tmp_path)
        assert path.read_bytes() == damaged
    with pytest.raises(DataError, match=r"scenes-\w+.npz: cannot be written .*another path"):
        train(path)  # a file, not a folder


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_process_killed_while_writing_leaves_no_file(end: signal.Signals, tmp_path: Path) -> None:
    code = f"""import signal, sys, time; sys.path.insert(0, {str(ROOT)!r})
import numpy
from air import multi_mnist
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
numpy.save = lambda file, array, allow_pickle: print(file.write(b"x"), flush=True) or time.sleep(60)
multi_mnist.main("--out out.npz --cache-dir . --num-scenes 300 --num-test-scenes 40".split())"""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, **pipes) as process:
        assert process.stdout.readline() == "1\n"  # one byte of the file is written
        process.send_signal(end)
        process.communicate(timeout=60)
    assert process.returncode == (130 if end == signal.SIGINT else -end)
    assert not list(tmp_path.glob("*.npz"))
    assert end == signal.SIGKILL or not files(tmp_path)
    assert len(train(tmp_path)[0]) == 300


def test_command_line_writes_a_file_once_and_has_a_flag_for_every_setting(tmp_path: Path) -> None:
    line = "--out s.npz --data-seed 1e1 --counts 0 2 --scale-sd 0.2 --num-scenes 9 --sides 9 12"
    line += " --num-test-scenes 2 --binary --recipe dsprites --min-gap 1 --x-size 40 --cache-dir c"
    made = run(f"{line} --rotation 9", tmp_path, program=multi_mnist.main)
    settings = SceneSettings(
        seed=10, counts=(0, 2), scale_sd=0.2, num_scenes=9, sides=(9, 12), num_test_scenes=2,
        binary=True, recipe="dsprites", min_gap=1.0, x_size=40, rotation=9.0,
    )  # fmt: skip
    before = (tmp_path / "s.npz").read_bytes()
    assert (made.returncode, made.stdout.count("\n"), made.stderr) == (0, 1, "")
    for part in ("s.npz", str(settings), load_data(tmp_path / "s.npz").sha256):
        assert part in made.stdout
    again = run("--out s.npz --seed 4", tmp_path, program=multi_mnist.main)
    assert (again.returncode, again.stdout) == (2, "")
    problem = "multi_mnist.py: error: --out: expected a new file or folder, got s.npz"
    assert again.stderr.startswith(problem)
    assert (tmp_path / "s.npz").read_bytes() == before
    shown = run("--help", tmp_path, program=multi_mnist.main).stdout
    assert "(default: 60000)" in shown
    for field in fields(SceneSettings):
        assert f"--{field.name.replace('_', '-')}" in shown


@pytest.mark.parametrize("recipe", ["air", "dsprites"])
def test_command_line_writes_a_folder_of_pictures(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = f"--num-scenes 12 --num-test-scenes 3 --x-size 40 --recipe {recipe} --cache-dir c --out"
    for out in ("pictures", "a.npz"):
        multi_mnist.main([*line.split(), out])
    assert files(tmp_path / "pictures") == [f"{i:05}.png" for i in range(12)] + [
        "counts.csv",
        "test",
    ]
    pictures, arrays = load_data("pictures"), load_data("a.npz")
    for ours, its in zip(pictures[:2], arrays[:2], strict=True):
        assert isinstance(ours, Scenes)
        assert isinstance(its, Scenes)
        assert np.array_equal(ours.x, its.x)
        assert np.array_equal(np.asarray(ours.counts), np.asarray(its.counts))
    with pytest.raises(SystemExit):
        multi_mnist.main([*line.split(), "pictures"])


def test_command_line_errors_are_one_line(tmp_path: Path) -> None:
    x_size = "argument --x-size: expected a whole number of at least 8, at most 1000"
    for line, problem in (
        ("", "--out"),
        ("--out s.npz --x-size big", f"{x_size}, got 'big'"),
        ("--out s.npz --recipe pyro", "argument --recipe: invalid choice: 'pyro'"),
        ("--out s.npz --digits mnist --mnist-dir none", "No such file"),
    ):
        done = run(line, tmp_path, program=multi_mnist.main)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert re.match(f"multi_mnist.py: error: .*{problem}", done.stderr)
