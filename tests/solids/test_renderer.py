"""The differentiable renderer against the one with hard edges, geometry and finite differences."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from air.data.synthetic.solids import RAYS, cast
from air.solids.renderer import Renderer
from air.solids.world import CAMERA, HALF_HEIGHT, HALF_SIDE, KINDS, SYMMETRY

SIDE = 48
POSES = [(1.0, 0.1, 0.2, 0.3), (0.9, -0.6, -0.5, 1.1), (1.1, 0.5, 0.7, 2.9)]  # size, x, y, angle


def rendered(renderer: Renderer, kind: int, pose: tuple[float, ...]) -> Tensor:
    """Colours times coverage, and coverage, [4, H, H]."""
    size, x, y, angle = torch.tensor(pose)
    turn = torch.stack((angle.cos(), angle.sin())).expand(1, 2, 2)
    patches, pixels = renderer(size[None], torch.stack((x, y))[None], turn)
    return renderer.put(patches[:, kind], pixels)[0]


@pytest.mark.parametrize("pose", POSES)
@pytest.mark.parametrize("kind", range(3), ids=KINDS)
def test_agrees_with_the_renderer_of_the_scenes(kind: int, pose: tuple[float, ...]) -> None:
    size, x, y, angle = pose
    rays = CAMERA.rays(SIDE * RAYS)
    depth, colour = cast(KINDS[kind], size, np.array([x, y]), angle, rays)
    shape = SIDE, RAYS, SIDE, RAYS, -1
    covered = np.isfinite(depth)[..., None].reshape(shape).mean((1, 3))
    expected = np.concatenate((colour.reshape(shape).mean((1, 3)), covered), 2).transpose(2, 0, 1)
    ours = rendered(Renderer(SIDE), kind, pose).numpy()
    solid = covered[..., 0] > 0
    assert 20 < solid.sum() < 400
    assert abs(ours[3].sum() / covered.sum() - 1) < 0.06  # area
    assert np.abs(ours - expected)[:, solid].mean() < 0.06
    assert np.abs(ours - expected)[:, ~solid].mean() < 0.005


def test_sphere_has_the_outline_of_a_sphere() -> None:
    """A ray hits a sphere if the angle to its centre has a sine of at most radius / distance."""
    size, x, y = 1.1, 0.3, -0.2
    coverage = rendered(Renderer(SIDE), KINDS.index("sphere"), (size, x, y, 0.0))[3].numpy()
    radius = size * HALF_SIDE["sphere"]
    towards = np.array([x, y, radius]) - CAMERA.position
    rays = CAMERA.rays(SIDE)
    sines = np.linalg.norm(np.cross(rays, towards), axis=2) / np.linalg.norm(rays, axis=2)
    clear = np.abs(sines - radius) > 0.03  # not at the edge, which is soft
    assert ((coverage > 0.5) == (sines < radius))[clear].all()


def test_nearest_point_of_a_cube_is_at_its_depth() -> None:
    """The ray to the middle of a cube's top hits it at the depth of that point."""
    top = np.array([0.2, 0.1, 2 * HALF_HEIGHT["cube"]])
    depth = (top - CAMERA.position) @ CAMERA.axes[2]
    ray = (top - CAMERA.position) / depth
    found, _ = cast("cube", 1.0, top[:2], 0.4, ray[None])
    assert found[0] == pytest.approx(depth)
    assert float(Renderer(SIDE).double().depth(torch.tensor([[0.2, 0.1]]).double())) == (
        pytest.approx(depth + top[2] * float(-CAMERA.axes[2, 2]))
    )


@pytest.mark.parametrize("kind", range(3), ids=KINDS)
def test_a_symmetric_turn_changes_nothing(kind: int) -> None:
    turn = 2 * math.pi / (SYMMETRY[KINDS[kind]] or 7)
    renderer = Renderer(SIDE).double()
    with torch.random.fork_rng():
        torch.set_default_dtype(torch.double)
        try:
            one = rendered(renderer, kind, (1.0, 0.2, 0.1, 0.4))
            other = rendered(renderer, kind, (1.0, 0.2, 0.1, 0.4 + turn))
            half = rendered(renderer, kind, (1.0, 0.2, 0.1, 0.4 + turn / 2))
        finally:
            torch.set_default_dtype(torch.float)
    torch.testing.assert_close(one, other)
    if SYMMETRY[KINDS[kind]]:
        assert (one - half).abs().max() > 0.1


def test_gradients_equal_finite_differences() -> None:
    renderer = Renderer(24).double()
    size = torch.tensor([0.9, 1.1], dtype=torch.double, requires_grad=True)
    place = torch.tensor([[0.11, -0.2], [-0.4, 0.52]], dtype=torch.double, requires_grad=True)
    turns = torch.tensor([[0.3, 2.0], [1.3, -0.4]], dtype=torch.double, requires_grad=True)
    weights = torch.rand(
        2, 3, 4, 144, dtype=torch.double, generator=torch.Generator().manual_seed(0)
    )

    def weighted(size: Tensor, place: Tensor, turns: Tensor) -> Tensor:
        patches, _ = renderer(size, place, torch.stack((turns.cos(), turns.sin()), -1))
        return (weights * patches).sum((2, 3))

    assert torch.autograd.gradcheck(weighted, (size, place, turns))


def test_places_and_outlines_are_inverse() -> None:
    renderer = Renderer(SIDE).double()
    place = torch.tensor([[0.3, -0.7], [-0.8, 0.6]], dtype=torch.double)
    centre, half = renderer.outlines(torch.ones(2, dtype=torch.double), place)
    torch.testing.assert_close(renderer.places_at(centre), place)
    assert (half > 0.2).all()
    assert (half < 0.5).all()  # the patch shows all of a solid


@pytest.mark.parametrize("kind", range(3), ids=KINDS)
def test_the_square_around_a_solid_holds_it(kind: int) -> None:
    renderer = Renderer(SIDE)
    for pose in POSES:
        centre, half = renderer.outlines(torch.tensor([pose[0]]), torch.tensor([pose[1:3]]))
        rows, columns = (rendered(renderer, kind, pose)[3] > 0.5).nonzero().T
        for pixels, middle in ((columns, centre[0, 0]), (rows, centre[0, 1])):
            places = (2 * pixels + 1) / SIDE - 1
            assert (places - middle).abs().max() < half[0, 0]
