"""The trained models in ``air/pretrained``, which are loaded by name.

Each is NAME.pt, a checkpoint with its weights in half precision and without its optimiser, and
NAME.json, its card: how it was trained, what it reaches on held-out scenes, what it is for and
where it fails. `tests/benchmarks/pretrained.py` makes both.
"""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "pretrained"


def names() -> list[str]:
    """The names of the models."""
    return sorted(path.stem for path in FOLDER.glob("*.pt"))


def card(name: str) -> dict[str, Any]:
    """The card of a model."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def find_weights(path: Path | str) -> Path:
    """The file that a path or the name of a model means; a file of that name comes first."""
    path = Path(path)
    return FOLDER / f"{path}.pt" if str(path) in names() and not path.is_file() else path


def explain(path: Path | str) -> str:
    """One line for the user of what the name of a model means; empty for any other path."""
    if str(path) not in names():
        return ""
    if find_weights(path) == Path(path):
        return f"--load {path} is the file here, not the pretrained model of that name."
    return f"--load {path} is a pretrained model; its card is {FOLDER / f'{path}.json'}."
