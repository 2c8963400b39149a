"""Makes the tutorial's page, README.md: `python -m air.tutorial.render` runs it, in minutes.

The tutorial is a Python file in the percent format of notebooks: a line "# %% [markdown]" begins a
cell of text, "# %%" a cell of code.
"""

import contextlib
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent
SOURCE, PAGE = FOLDER / "air_step_by_step.py", FOLDER / "README.md"
NOTE = "<!-- Made of air_step_by_step.py by `python -m air.tutorial.render`. Edit that file. -->"
_SHOW = re.compile(r'^ *show\("(\w+)"\)', re.MULTILINE)


class Cell(NamedTuple):
    """A cell of the tutorial: text in Markdown, or code."""

    is_text: bool
    body: str
    line: int  # of the file, where the body begins


def split_cells(source: str) -> list[Cell]:
    """The cells of a file in percent format."""
    cells = []
    for found in re.finditer(r"^# %%(.*)\n((?:(?!# %%).*\n)*)", source, re.MULTILINE):
        is_text, body = found[1].strip() == "[markdown]", found[2]
        if is_text:
            body = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
        cells.append(Cell(is_text, body.strip("\n"), source[: found.start(2)].count("\n") + 1))
    return cells


def run_cells(cells: Sequence[Cell]) -> tuple[dict[str, Any], list[str]]:
    """Runs all cells of code in one namespace.

    Returns:
        The namespace, and what each cell printed; nothing for cells of text.
    """
    namespace: dict[str, Any] = {"__name__": "tutorial"}
    outputs = []
    for cell in cells:
        printed = io.StringIO()
        if not cell.is_text:
            padding = "\n" * (cell.line - 1)  # so that errors name the line of the file
            with contextlib.redirect_stdout(printed):
                exec(compile(padding + cell.body, SOURCE, "exec"), namespace)
        outputs.append(printed.getvalue())
    return namespace, outputs


def pictures_of(cell: Cell) -> list[str]:
    """The names of the pictures that a cell shows."""
    return [] if cell.is_text else _SHOW.findall(cell.body)


def render_page(cells: Sequence[Cell], outputs: Sequence[str]) -> str:
    """The page in Markdown: text, code, what the code printed, and its pictures."""
    parts = [NOTE]
    for cell, output in zip(cells, outputs, strict=True):
        parts.append(cell.body if cell.is_text else f"```python\n{cell.body}\n```")
        if output:
            parts.append(f"```text\n{output.rstrip()}\n```")
        parts += [f"![{name.replace('_', ' ')}]({name}.png)" for name in pictures_of(cell)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Runs the tutorial, and writes its page and its pictures beside it."""
    os.environ["AIR_TUTORIAL_FOLDER"] = str(FOLDER)
    cells = split_cells(SOURCE.read_text("utf-8"))
    _, outputs = run_cells(cells)
    PAGE.write_text(render_page(cells, outputs), "utf-8")


if __name__ == "__main__":
    main()
