"""Backgrounds: that the bytes of each kind never change, that objects cover it."""

import hashlib
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from numpy.random import PCG64, Generator

from air import multi_mnist
from air.data.synthetic.backgrounds import BackgroundKind, draw_background
from air.multi_mnist import SceneSettings, load_scenes

KINDS = get_args(BackgroundKind)


def draw(
    kind: BackgroundKind, channels: int = 2, side: int = 30, low: int = 20, high: int = 220
) -> Any:  # noqa: ANN401
    random = Generator(PCG64(3))
    many = [draw_background(kind, random, channels, side, (low, high)) for _ in range(40)]
    return np.stack(many).astype(int)


def test_black_is_black_and_equal_bounds_give_one_level() -> None:
    assert not draw("black").any()
    assert all((draw(kind, low=70, high=70) == 70).all() for kind in KINDS[1:])


@pytest.mark.parametrize(
    ("kind", "sha256"),
    [
        ("uniform", "737e958e9956"),
        ("gradient", "aad97eb87dda"),
        ("grid", "59eaa4617bf6"),
        ("textured", "d2981261acdc"),
        ("noisy", "efcad3156a99"),
    ],
)
def test_backgrounds_are_the_same_on_every_machine(kind: BackgroundKind, sha256: str) -> None:
    """And in every version: otherwise results could not be compared."""
    assert hashlib.sha256(draw(kind).astype("<u2").tobytes()).hexdigest().startswith(sha256)


def scenes(cache: Path, **settings: Any) -> Any:  # noqa: ANN401
    sizes = {"num_scenes": 60, "num_test_scenes": 2, "x_size": 40}
    return load_scenes(SceneSettings(**sizes, **settings), cache_dir=cache).train  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", ["air", "dsprites"])
@pytest.mark.parametrize("level", [0, 60, 255])
def test_objects_cover_the_background(recipe: str, level: int, tmp_path: Path) -> None:
    """Of the same random numbers, scenes on black and on a level give the coverage."""
    common = {"recipe": recipe, "counts": (1,), "background": "uniform"}
    white, black, mixed = (
        scenes(tmp_path, **common, background_levels=(behind, behind), object_levels=(ink, ink))
        for behind, ink in ((0, 255), (255, 0), (130, level))
    )
    bright = [part.x.reshape(60, -1, 40, 40).astype(float) for part in (white, black, mixed)]
    np.testing.assert_array_equal(white.boxes, mixed.boxes)
    coverage = 1 - bright[1].min(1) / 255  # black objects on white
    ink = bright[0] / 255 * (level / 255)  # the colours, multiplied by the coverage
    expected = 130 * (1 - coverage)[:, None] + 255 * ink
    assert abs(bright[2] - expected).max() <= 3, "rounding"
    assert (bright[2][(coverage == 0)[:, None].repeat(bright[2].shape[1], 1)] == 130).all()


def test_objects_have_levels_of_their_own(tmp_path: Path) -> None:
    found = scenes(tmp_path, object_levels=(90, 200), counts=(1,))
    brightest = found.x.max((1, 2))
    assert brightest.min() >= 60  # a thin digit may not reach its level
    assert brightest.max() <= 200
    assert len(set(brightest.tolist())) > 25


def test_grey_digits_whose_sum_is_above_255_are_drawn_again() -> None:
    """As on black, though they cover each other."""
    settings = SceneSettings(num_scenes=60, num_test_scenes=2, counts=(2,), background="uniform")
    for level, may_overlap in ((127, True), (128, False)):
        digit = np.full((1, 28, 28), level, np.uint8), np.zeros(1, np.uint8)
        overlaps = multi_mnist._draw(settings, False, *digit).overlaps
        assert np.asarray(overlaps).any() == may_overlap
