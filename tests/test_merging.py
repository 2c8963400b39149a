"""Merging of two windows, against windows that are tried one by one."""

import itertools
import math
from typing import Any

import pyro
import pytest
import torch
from helpers import small_air
from torch import Tensor
from torch.nn.functional import grid_sample

from air import AIR, merging, window_boxes, window_to_image
from air.merging import SHIFT, ZOOM, closest_windows, merge


def centre_and_side(where: Tensor, size: int) -> tuple[float, float, float]:
    """The centre of a window and its side in pixels, by the box that is drawn around it."""
    x0, y0, x1, y1 = window_boxes(where[None, None], size)[0, 0].tolist()
    return (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0


def test_the_closest_windows_are_those_of_a_search_pair_by_pair() -> None:
    torch.manual_seed(0)
    where = torch.randn(40, 4, 3)
    where[..., 0] = where[..., 0].abs() + 1
    counts = torch.arange(40) % 5
    distances, pairs = closest_windows(where, counts)
    for i, n in enumerate(counts.tolist()):
        boxes = [centre_and_side(where[i, t], 30) for t in range(n)]
        # One side is that of the window whose scale is the mean of both.
        found = {
            (s, t): math.dist(boxes[s][:2], boxes[t][:2]) * (1 / boxes[s][2] + 1 / boxes[t][2]) / 2
            for s, t in itertools.combinations(range(n), 2)
        }
        assert float(distances[i]) == pytest.approx(min(found.values(), default=math.inf), rel=1e-4)
        assert not found or tuple(pairs[i].tolist()) == min(found, key=found.__getitem__)


def test_a_model_of_one_step_has_no_two_windows() -> None:
    distances, pairs = closest_windows(torch.ones(2, 1, 3), torch.tensor([0, 1]))
    assert distances.tolist() == [math.inf] * 2
    assert pairs.shape == (2, 2)


@pytest.mark.parametrize(
    "options",
    [{}, {"likelihood": "bernoulli"}, {"channels": 3}, {"guide_input": "difference"}],
    ids=str,
)
def test_the_best_of_all_windows_is_kept(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every window is cut out by PyTorch's own sampler and painted by itself."""
    pyro.set_rng_seed(2)
    air = small_air(**options).double().requires_grad_(False)
    shape = (12, 12) if air.channels == 1 else (air.channels, 12, 12)
    images = air.likelihood.prepare(torch.rand(6, *shape, dtype=torch.float64))
    where, what = torch.randn(6, 3, 3).double() / 3, torch.randn(6, 3, 5).double()
    where[..., 0] += 2
    counts = torch.tensor([2, 3, 3, 2, 3, 3])
    near, pairs = closest_windows(where, counts)
    assert len({tuple(pair) for pair in pairs.tolist()}) > 1
    merged = merge(air, images, where, what, counts)
    residuals = []  # of one and of both, where what the others leave counts as 1
    for i, (n, (first, second)) in enumerate(zip(counts.tolist(), pairs.tolist(), strict=True)):
        middle = sum(-where[i, t, 1:] / where[i, t, 0] for t in (first, second)) / 2
        scale = (where[i, first, 0] + where[i, second, 0]) / 2
        others = [(where[i, t], what[i, t]) for t in range(n) if t not in (first, second)]
        both = [(where[i, t], what[i, t]) for t in (first, second)]
        behind = canvas_of(air, others)
        left = (images[i] - behind).square().sum()
        tried = []
        for zoom, dx, dy in itertools.product((ZOOM, (1 + ZOOM) / 2, 1), *[(-SHIFT, 0, SHIFT)] * 2):
            centre, s = middle + torch.tensor([dx, dy]) / scale, zoom * scale
            window = torch.cat((s[None], -centre * s))
            seen = images[i] - behind if air.guide_input == "difference" else images[i]
            code = air.encode(cut_out(air, seen, centre, s))[0][0]
            canvas = canvas_of(air, [*others, (window, code)])
            tried.append((float((images[i] - canvas).square().sum()), window, code, canvas))
        error, window, code, canvas = min(tried, key=lambda each: each[0])
        of_both = (images[i] - canvas_of(air, [*others, *both])).square().sum()
        residuals.append([error / float(left), float(of_both / left)])
        torch.testing.assert_close(merged.canvas[i], canvas)
        expected = [(window, code) if t == first else (where[i, t], what[i, t]) for t in range(n)]
        expected[second] = expected[-1]
        for t, (w, z) in enumerate(expected[:-1]):
            torch.testing.assert_close(merged.where[i, t], w)
            torch.testing.assert_close(merged.what[i, t], z)

    one, two = torch.tensor(residuals).unbind(1)
    conditions = {"CLOSE": near, "ONE_OBJECT": one, "WORSE": one - two}
    for name, values in conditions.items():  # each bound alone decides, over half of the scenes
        with monkeypatch.context() as patch:
            for bound in conditions:
                patch.setattr(merging, bound, math.inf)
            middle = values.sort().values[2:4].mean()
            patch.setattr(merging, name, float(middle))
            are_one = merge(air, images, where, what, counts).are_one
            assert torch.equal(are_one, values < middle)


def canvas_of(air: AIR, objects: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The canvas of one scene."""
    shape = (12, 12) if air.channels == 1 else (air.channels, 12, 12)
    canvas = torch.zeros(1, *shape, dtype=torch.float64)
    for where, what in objects:
        painted = window_to_image(where[None], 7, 12, air.decode(what[None]))
        canvas = air.likelihood.add(canvas, painted.view_as(canvas))
    return canvas[0]


def cut_out(air: AIR, image: Tensor, centre: Tensor, scale: Tensor) -> Tensor:
    """The flat window of an image."""
    side = (2 * torch.arange(7, dtype=torch.float64) + 1) / 7 - 1
    y, x = torch.meshgrid(side, side, indexing="ij")
    places = torch.stack((x, y), -1) / scale + centre
    return grid_sample(
        image.view(1, air.channels, 12, 12), places[None], align_corners=False
    ).flatten(1)
