"""Sums of scenes have the objects of both; a guide takes the objects that it is given."""

import pytest
import torch
from helpers import small_air
from pyro import poutine
from torch import Tensor

from air import AIR
from air.spatial_transformer import centre_of, where_at
from air.training import known_objects
from air.training.known_objects import DISTANCES, GivenObjects, KnownObjects, make_sums

SIDE = 12
SCALE = 4.0


def dots(*places: tuple[int, int]) -> Tensor:
    """A scene with a bright pixel at each place (row, column), [H, H]."""
    scene = torch.zeros(SIDE, SIDE)
    for y, x in places:
        scene[y, x] = 0.8
    return scene


def known_dots(images: Tensor, num_steps: int = 4) -> KnownObjects:
    """The bright pixels of images as objects."""
    n = len(images)
    where = torch.zeros(n, num_steps, 3) + torch.tensor([SCALE, 0, 0])
    present = torch.zeros(n, num_steps)
    for i, image in enumerate(images):
        y, x = image.nonzero().t()[:, :num_steps]
        centres = (2 * torch.stack((x, y), 1) + 1) / SIDE - 1
        where[i, : len(x)] = where_at(centres, torch.full((len(x), 1), SCALE))
        present[i, : len(x)] = 1
    return KnownObjects(present, where, torch.ones(n, dtype=torch.bool))


def sums(air: AIR, images: Tensor, unsure: tuple[int, ...] = ()) -> tuple[Tensor, KnownObjects]:
    known = known_dots(images)
    known.sure[[*unsure]] = False
    return make_sums(air.likelihood, images, images, known, max(1, len(images) // 4))


def scenes(counts: list[int]) -> Tensor:
    """Scenes of so many dots, of which none is at the border."""
    places = [torch.randperm((SIDE - 4) ** 2)[:n].tolist() for n in counts]
    return torch.stack(
        [dots(*(divmod(k, SIDE - 4) for k in each)).roll((2, 2), (0, 1)) for each in places]
    )


@pytest.mark.parametrize("likelihood", ["normal", "bernoulli"])
@pytest.mark.parametrize("moved", [0.0, 1.0])
def test_a_sum_has_the_pixels_and_the_objects_of_two_scenes(
    likelihood: str, moved: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_objects, "MOVED", moved)
    torch.manual_seed(0)
    air = small_air(num_steps=4, likelihood=likelihood)
    images = scenes(torch.randint(0, 4, (40,)).tolist())
    images = air.likelihood.prepare(images)
    made, known = sums(air, images)
    assert len(made) == 40 // 4
    assert known.sure.any()
    assert made.max() <= 1
    assert all(2 <= int((image > 0).sum()) <= 3 for image in made[known.sure])
    expected = known_dots(made[known.sure])
    assert torch.equal(known.counts[known.sure], expected.counts)
    for given, right, n in zip(
        known.where[known.sure], expected.where, expected.counts.tolist(), strict=True
    ):
        ours, theirs = centre_of(given)[:n], centre_of(right)[:n]
        assert (ours[:, 0].diff() >= 0).all(), "from left to right"
        gaps = torch.cdist(ours, theirs)
        assert gaps.amin(0).max() < 1e-5
        assert gaps.amin(1).max() < 1e-5
        near = torch.pdist(theirs).min() * SCALE / 2  # in the sum of half sides
        assert moved == 0 or near <= DISTANCES[1] + 2 * SCALE / SIDE  # of a pixel


def test_scenes_that_cannot_be_added_are_not_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_objects, "MOVED", 0)
    air = small_air()
    one = [dots((3, i)) for i in range(8)]
    two = [dots((5, i), (9, i)) for i in range(8)]
    assert sums(air, torch.stack(one[:4] + two[4:]))[1].sure.any()
    assert not sums(air, torch.stack(one))[1].sure.any(), "no scene has two objects"
    assert not sums(air, torch.stack(two))[1].sure.any(), "too many objects"
    empty = torch.zeros(4, SIDE, SIDE)
    assert not sums(air, torch.cat((torch.stack(two[:4]), empty)))[1].sure.any(), "an empty scene"
    many = torch.stack([dots((i // 12, i % 12)) for i in range(60)] + two[:2])
    assert not sums(air, many)[1].sure.any(), "hardly any scene has two objects"
    same = torch.stack([dots((3, 3))] * 7 + two[:1])
    assert not sums(air, same)[1].sure.any(), "one object hides the other"
    assert not sums(air, torch.stack(one[:4] + two[4:]), tuple(range(8)))[1].sure.any()


def test_scenes_that_are_not_sure_are_in_no_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_objects, "MOVED", 0)
    air = small_air(num_steps=4)
    images = torch.stack([*[dots((3, i)) for i in range(8)], *[dots((9, i)) for i in range(8)]])
    images = torch.cat((images, torch.stack([dots((6, i), (7, i)) for i in range(4)])))
    made, known = sums(air, images, unsure=tuple(range(8, 16)))
    assert known.sure.any()
    assert not made[known.sure][:, 9].any()


def test_objects_that_would_leave_the_image_are_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_objects, "MOVED", 1)
    corner = torch.stack([dots((0, 0)), dots((0, 0)), dots((5, 5), (6, 8))] * 8)
    made, known = sums(small_air(), corner)
    for image in made[known.sure]:
        assert int((image > 0).sum()) == 2


@pytest.mark.parametrize("n", [1, 2, 3])
def test_small_batches_make_a_sum_or_none(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_objects, "MOVED", 0)
    images = torch.stack([dots((3, i)) for i in range(n - 1)] + [dots((5, 1), (7, 1))])
    made, known = sums(small_air(), images)
    assert made.shape == (1, SIDE, SIDE)
    assert known.sure.any() == (n == 3)


def test_each_step_takes_the_closest_object_that_is_left() -> None:
    air = small_air(num_steps=3, x_size=SIDE)
    where = torch.tensor([[[3.0, 2.0, 0.0], [3.0, -2.0, 0.0], [3.0, 0.1, 0.0]]])
    known = KnownObjects(torch.ones(1, 3), where, torch.ones(1, dtype=torch.bool))
    given = GivenObjects(known, nearest=True)
    with poutine.block(), given:
        air.guide(torch.zeros(1, SIDE, SIDE))
    taken = [given.values[f"z_where_{t}"][0, 1].item() for t in range(3)]
    assert sorted(taken) == pytest.approx([-2.0, 0.1, 2.0])
    assert taken[0] == pytest.approx(0.1)  # an untrained guide looks at the middle
