"""Trains AIR on solids with a renderer whose gradients are finite differences, as AIR's paper does.

    python tests/benchmarks/finite_differences.py -- --recipe solids --data-seed 6

Words behind ``--`` are passed to ``main.py``. The program never differentiates the renderer, which
may be any program that draws: each step draws every solid eight times more, a little larger or
smaller, moved or turned. With ``--hard``, edges are sharp, so that exact gradients would miss the
silhouettes; what is loaded from such a run has soft edges again.
"""

import argparse
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, this is not a package
import main as program
from air.solids import renderer
from air.solids.renderer import Renderer

STEP = 0.04  # of sizes, places and angles: somewhat less than a pixel at 32 x 32
HARD_EDGE = 1e-3

draw = Renderer.forward


class DrawBlackBox(torch.autograd.Function):
    """`Renderer.forward`, with central differences in place of its gradients."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        drawer: Renderer,
        size: Tensor,
        place: Tensor,
        turns: Tensor,
    ) -> tuple[Tensor, Tensor]:
        patches, pixels = draw(drawer, size, place, turns)
        ctx.drawer = drawer
        ctx.save_for_backward(size, place, turns, pixels)
        ctx.mark_non_differentiable(pixels)
        return patches, pixels

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        size, place, turns, pixels = ctx.saved_tensors
        tangent = torch.stack((-turns[..., 1], turns[..., 0]), -1)  # of a turn by a small angle
        x, y = STEP * torch.eye(2).to(place)

        def along(of_size: float, of_place: Tensor, of_angle: float) -> Tensor:
            """The derivative of the loss, for each solid and kind, [n, 3]."""
            sides = [
                draw(
                    ctx.drawer,
                    size + s * of_size,
                    place + s * of_place,
                    turns + s * of_angle * tangent,
                )
                for s in (1, -1)
            ]
            return (gradients[0] * (sides[0][0] - sides[1][0])).sum((2, 3)) / (2 * STEP)

        # A patch must stay where it is, so that the same pixels are compared.
        with mock.patch.object(Renderer, "_pixels", return_value=pixels):
            by_size = along(STEP, torch.zeros_like(x), 0).sum(1)
            by_place = torch.stack([along(0, step, 0).sum(1) for step in (x, y)], 1)
            # The cube and the cylinder are turned at once: each is drawn alone.
            by_angle = along(0, torch.zeros_like(x), STEP)[:, ::2]
        return None, by_size, by_place, by_angle[..., None] * tangent


def draw_black_box(
    drawer: Renderer, size: Tensor, place: Tensor, turns: Tensor
) -> tuple[Tensor, Tensor]:
    """`Renderer.forward` by `DrawBlackBox`."""
    drawn: tuple[Tensor, Tensor] = DrawBlackBox.apply(drawer, size, place, turns)  # type: ignore[no-untyped-call]
    return drawn


def main() -> int:
    """Trains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hard", action="store_true", help="draw sharp edges")
    parser.add_argument("flags", nargs="*", help="behind --: flags of main.py")
    args = parser.parse_args()
    if args.hard:
        renderer.EDGE = renderer.FACE_EDGE = renderer.SEAM = HARD_EDGE
    with mock.patch.object(Renderer, "forward", draw_black_box):
        return program.main(args.flags)


if __name__ == "__main__":
    sys.exit(main())
