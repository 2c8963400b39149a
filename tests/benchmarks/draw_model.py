"""Draws AIR's model and guide for the README, with the names of the Pyro sites and of the nets.

python tests/benchmarks/draw_model.py        writes .github/model.png
"""

import io
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Line
from PIL import Image

PICTURE = Path(__file__).parents[2] / ".github/model.png"
SIZE = 10.0, 6.7  # of the picture in inches, and of the coordinates below
INK, GREY, OBSERVED, NET, OPERATION = "#1f2933", "#7b8794", "#d5dae0", "#d6e6fa", "#fbeacb"
BOX_HEIGHT, SITE_SIZE = 0.42, (1.28, 0.56)

Point = tuple[float, float]


def write(axes: Axes, at: Point, text: str, **options: Any) -> None:  # noqa: ANN401
    """Text, centred unless the options say otherwise."""
    style: dict[str, Any] = {
        "ha": "center",
        "va": "center",
        "fontsize": 10,
        "color": INK,
        **options,
    }
    axes.text(*at, text, **style)


def site(axes: Axes, at: Point, name: str, observed: bool = False) -> None:
    """A random variable: an ellipse, grey if it is observed."""
    axes.add_patch(Ellipse(at, *SITE_SIZE, fc=OBSERVED if observed else "white", ec=INK, lw=1.3))
    write(axes, at, name, family="monospace")


def box(axes: Axes, at: Point, name: str, colour: str, width: float) -> None:
    """A net, or an operation without parameters."""
    frame(axes, at, (width, BOX_HEIGHT), fc=colour, ec=INK, lw=1.1)
    write(axes, at, name, family="monospace")


def frame(axes: Axes, centre: Point, size: Point, **options: Any) -> None:  # noqa: ANN401
    """A rectangle with round corners."""
    corner = centre[0] - size[0] / 2, centre[1] - size[1] / 2
    axes.add_patch(FancyBboxPatch(corner, *size, "round,pad=0,rounding_size=0.12", **options))


def plate(axes: Axes, centre: Point, size: Point, name: str) -> None:
    """A frame around everything that is repeated, with its name in the lower right corner."""
    frame(axes, centre, size, fc="none", ec=GREY, lw=1.0)
    corner = centre[0] + size[0] / 2 - 0.12, centre[1] - size[1] / 2 + 0.1
    write(axes, corner, name, ha="right", va="bottom", color=GREY)


def arrow(axes: Axes, *points: Point, next_step: bool = False) -> None:
    """An arrow through the points, dashed if it leads from one step to the next."""
    colour = GREY if next_step else INK
    axes.add_patch(
        FancyArrowPatch(
            path=Line(points),
            arrowstyle="-|>,head_length=0.35,head_width=0.18",
            mutation_scale=14,
            color=colour,
            ls=(0, (4, 2)) if next_step else "-",
            lw=1.2,
            joinstyle="miter",
        )
    )


def draw_model(axes: Axes) -> None:
    """The generative model."""
    write(axes, (2.45, 6.45), "model:  p(z) p(x | z)", fontsize=13, weight="bold")
    plate(axes, (2.45, 3.45), (4.7, 5.5), 'plate "data"')
    plate(axes, (2.55, 4.15), (4.1, 3.8), "t = 0, ..., T - 1")
    site(axes, (1.45, 5.5), "z_pres_{t}")
    site(axes, (2.35, 4.5), "z_where_{t}")
    site(axes, (3.8, 4.5), "z_what_{t}")
    box(axes, (3.8, 3.65), "decode", NET, 0.9)
    box(axes, (2.55, 2.75), "window_to_image", OPERATION, 1.6)
    box(axes, (2.55, 1.8), "canvas", OPERATION, 0.9)
    site(axes, (2.55, 1.05), "obs", observed=True)
    arrow(axes, (0.2, 5.5), (0.81, 5.5), next_step=True)
    arrow(axes, (1.69, 5.24), (2.1, 4.76))
    arrow(axes, (2.02, 5.37), (3.45, 4.74))
    arrow(axes, (3.8, 4.22), (3.8, 3.86))
    arrow(axes, (2.35, 4.22), (2.35, 2.96))
    arrow(axes, (3.8, 3.44), (3.8, 2.75), (3.35, 2.75))
    arrow(axes, (2.55, 2.54), (2.55, 2.01))
    arrow(axes, (1.2, 5.24), (1.2, 1.8), (2.1, 1.8))
    arrow(axes, (2.55, 1.59), (2.55, 1.33))


def draw_guide(axes: Axes) -> None:
    """The inference network."""
    write(axes, (7.5, 6.45), "guide:  q(z | x)", fontsize=13, weight="bold")
    plate(axes, (7.5, 3.45), (4.8, 5.5), 'plate "data"')
    plate(axes, (7.6, 3.4), (4.4, 3.7), "t = 0, ..., T - 1")
    box(axes, (6.85, 5.75), "image", OBSERVED, 0.9)
    box(axes, (6.85, 4.8), "rnn", NET, 0.7)
    box(axes, (6.85, 3.95), "predict", NET, 1.0)
    site(axes, (6.15, 2.85), "z_pres_{t}")
    site(axes, (7.65, 2.85), "z_where_{t}")
    box(axes, (8.9, 3.95), "image_to_window", OPERATION, 1.6)
    box(axes, (8.9, 3.25), "encode", NET, 0.9)
    site(axes, (8.9, 2.35), "z_what_{t}")
    write(axes, (7.1, 1.15), "rnn of step t + 1", color=GREY)
    arrow(axes, (6.85, 5.54), (6.85, 5.01))
    arrow(axes, (7.3, 5.75), (8.9, 5.75), (8.9, 4.16))
    arrow(axes, (5.2, 4.8), (6.5, 4.8), next_step=True)
    write(axes, (5.98, 4.97), "h, z of t - 1", color=GREY, fontsize=9)
    arrow(axes, (6.85, 4.59), (6.85, 4.16))
    write(axes, (7.02, 4.38), "h", style="italic")
    arrow(axes, (6.65, 3.74), (6.28, 3.13))
    arrow(axes, (7.05, 3.74), (7.45, 3.12))
    arrow(axes, (6.79, 2.85), (7.01, 2.85))
    arrow(axes, (6.62, 2.66), (8.28, 2.42))
    arrow(axes, (7.98, 3.09), (8.5, 3.74))
    arrow(axes, (8.9, 3.74), (8.9, 3.46))
    arrow(axes, (8.9, 3.04), (8.9, 2.63))
    arrow(axes, (6.28, 2.57), (6.8, 1.32), next_step=True)
    arrow(axes, (7.57, 2.57), (7.15, 1.32), next_step=True)
    arrow(axes, (8.42, 2.16), (7.5, 1.32), next_step=True)


def draw_legend(axes: Axes) -> None:
    """The meanings of shapes and colours."""
    axes.add_patch(Ellipse((0.4, 0.3), 0.5, 0.26, fc="white", ec=INK, lw=1.2))
    write(axes, (0.75, 0.3), "Pyro site (grey: observed)", ha="left")
    for x, colour, meaning in (
        (3.35, NET, "net, an attribute of AIR"),
        (5.95, OPERATION, "no parameters"),
    ):
        frame(axes, (x, 0.3), (0.42, 0.24), fc=colour, ec=INK, lw=1.1)
        write(axes, (x + 0.32, 0.3), meaning, ha="left")
    arrow(axes, (7.65, 0.3), (8.2, 0.3), next_step=True)
    write(axes, (8.3, 0.3), "from step to step", ha="left")


def main() -> None:
    """Writes the picture."""
    figure = Figure(SIZE, dpi=140)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, SIZE[0]), ylim=(0, SIZE[1]))
    axes.axis("off")
    draw_model(axes)
    draw_guide(axes)
    draw_legend(axes)
    drawn = io.BytesIO()
    figure.savefig(drawn)
    picture = Image.open(drawn).convert("RGB")
    picture.quantize(32).save(PICTURE, optimize=True)  # a third of the size


if __name__ == "__main__":
    main()
