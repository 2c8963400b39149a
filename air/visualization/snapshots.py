"""What a model makes of its scenes at one step: taken, kept as a file, and read back for drawing.

A run's folder ``snapshots`` holds one file ``<step>.npz`` each, of plain arrays, so that all its
figures can be drawn again without the model, the scenes or a GPU.
"""

import io
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from air.air import AIR
from air.evaluation.metrics import HeldOut
from air.inference import infer, sample_prior
from air.priors import at_least_probs
from air.spatial_transformer import image_to_window
from air.storage.checkpoint import write_atomically

Array = NDArray[Any]

SCENES, DECOMPOSED_SCENES = 64, 8  # pictures in a snapshot


class SnapshotError(ValueError):
    """A file is no snapshot; the message is one line for the user."""


class InferredScenes(NamedTuple):
    """Scenes beside what was inferred in them; pictures are uint8, dark to bright."""

    images: Array  # [N, (C,) H, H]
    reconstructions: Array  # [N, (C,) H, H]
    boxes: Array  # (x0, y0, x1, y1) in pixels, [N, T, 4]; may lie outside the image
    counts: Array  # [N] steps in use: later boxes are not drawn
    true_counts: Array | None = None  # [N]

    def pick(self, index: slice | Array) -> "InferredScenes":
        return InferredScenes._make(None if field is None else field[index] for field in self)


class Snapshot(NamedTuple):
    """All that the pictures of a run show of one step."""

    step: int
    scenes: InferredScenes  # held out and always the same, those that are not empty first
    errors: InferredScenes  # of the last evaluation, those still counted wrongly
    samples: InferredScenes  # from the prior, see `sample_prior`; their own images
    windows: Array  # what each step attends to in the first of the scenes, [M, T, (C,) W, W] uint8
    objects: Array  # and what it paints, [M, T, (C,) H, H] uint8
    presence: Array  # with what probability, q(n >= t), [M, T]


def take_snapshot(
    air: AIR,
    held_out: HeldOut,
    step: int,
    seed: int,
    miscounted: Sequence[int] = (),
    number: int = SCENES,
    count_prior: Sequence[float] | None = None,
) -> Snapshot:
    """Looks at the first held-out scenes; draws no random numbers but in a generator of its own.

    Args:
        air: The model.
        held_out: The scenes, of which the first `number` are shown.
        step: The optimisation step it stands at.
        seed: Of the samples from the prior.
        miscounted: Indices of further scenes to show where they are still counted wrongly.
        number: Scenes, and samples, at the most.
        count_prior: As for `sample_prior`.
    """
    first = held_out.images[:number]
    empty = (first == 0).flatten(1).all(1)
    fixed = torch.argsort(empty.int(), stable=True)
    chosen = torch.cat((fixed, torch.tensor(miscounted, dtype=torch.long)))
    images = air.to_images(held_out.images[chosen].to(air.h_init.device))
    found = infer(air, images)
    true = None if held_out.counts is None else held_out.counts[chosen].cpu().numpy()
    scenes = InferredScenes(
        as_bytes(images),
        as_bytes(found.reconstructions),
        found.boxes.cpu().numpy(),
        found.counts.cpu().numpy(),
        true,
    )
    wrong = np.zeros(len(chosen), bool) if true is None else scenes.counts != true
    wrong[: len(fixed)] = False
    samples, boxes, counts = sample_prior(air, number, seed, count_prior)
    drawn = as_bytes(samples)
    apart = min(DECOMPOSED_SCENES, len(fixed))
    reached = at_least_probs(found.count_probs[:apart])
    return Snapshot(
        step,
        scenes.pick(slice(len(fixed))),
        scenes.pick(wrong),
        InferredScenes(drawn, drawn, boxes.cpu().numpy(), counts.cpu().numpy()),
        as_bytes(_windows(air, images[:apart], found.z_where[:apart], found.objects[:apart])),
        as_bytes(found.objects[:apart]),
        reached.cpu().numpy(),
    )


def _windows(air: AIR, images: Tensor, z_where: Tensor, objects: Tensor) -> Tensor:
    """What each step sees in its window of images [M, (C,) H, H]: [M, T, (C,) W, W]."""
    seen = images[:, None].expand_as(objects)
    if air.guide_input == "difference":  # less what the steps before have painted
        before = objects.unbind(1)[:-1]
        painted = accumulate(before, air.likelihood.add, initial=torch.zeros_like(images))
        seen = seen - torch.stack([*painted], 1)
    flat = seen.flatten(0, 1)
    windows = image_to_window(z_where.flatten(0, 1), air.window_size, air.x_size, flat)
    return windows.reshape(*seen.shape[:-2], air.window_size, air.window_size)


def as_bytes(intensities: Tensor) -> NDArray[np.uint8]:
    """Intensities as bytes: black for 0 and less or NaN, white for 1 and more."""
    levels = intensities.detach().nan_to_num().clamp(0, 1) * 255 + 0.5
    return np.asarray(levels.to(torch.uint8).cpu().numpy())


def save_snapshot(folder: Path, snapshot: Snapshot) -> None:
    """Writes ``<step>.npz`` into a run's folder of snapshots, made if missing."""
    arrays: dict[str, Any] = {}
    for name, field in snapshot._asdict().items():
        parts = field._asdict() if isinstance(field, InferredScenes) else {"": field}
        arrays |= {f"{name}.{part}": array for part, array in parts.items() if array is not None}
    folder.mkdir(exist_ok=True)
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    path = folder / f"{snapshot.step:08}.npz"
    write_atomically(path, lambda temporary: temporary.write_bytes(packed.getvalue()))


def snapshot_files(folder: Path) -> dict[int, Path]:
    """The snapshots in a folder by step, the first first."""
    found = {int(path.stem): path for path in folder.glob("*.npz") if path.stem.isdecimal()}
    return dict(sorted(found.items()))


def load_snapshot(path: Path) -> Snapshot:
    """Reads a file that `save_snapshot` wrote.

    Raises:
        SnapshotError: If it is none.
    """
    try:
        with path.open("rb") as file:
            arrays = dict(np.load(file, allow_pickle=False))
        fields: dict[str, Any] = {}
        for name in Snapshot._fields:
            if name in ("scenes", "errors", "samples"):
                *parts, _ = InferredScenes._fields
                known = {part: arrays[f"{name}.{part}"] for part in parts}
                true_counts = arrays.get(f"{name}.true_counts")
                fields[name] = InferredScenes(**known, true_counts=true_counts)
            else:
                fields[name] = arrays[f"{name}."]
        return Snapshot(**fields | {"step": int(fields["step"])})
    except Exception as error:  # NumPy and its zip files fail in many ways
        raise SnapshotError(f"{path} is no readable snapshot: {error}") from error
