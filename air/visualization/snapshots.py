"""Snapshots: scenes and the latents inferred in them at one step, as arrays and as files.

The folder ``snapshots`` of a run holds one file ``<step>.npz`` per snapshot, so that `viz` can draw
the run again without the model, the scenes or a GPU.
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
from air.data.scenes import Array
from air.evaluation.metrics import HeldOut
from air.inference import Inference, infer, sample_prior
from air.priors import at_least_probs
from air.spatial_transformer import image_to_window
from air.storage.files import write_atomically
from air.support.handlers import closed

SCENES = 64  # in a snapshot
DECOMPOSED_SCENES = 8  # of them, with the window and the object of each step


class SnapshotError(ValueError):
    """A snapshot is missing or unreadable; the message is one line for the user."""


class InferredScenes(NamedTuple):
    """Scenes with their inferred boxes and counts; images are uint8, 255 is bright."""

    images: Array  # [N, (C,) H, H]
    reconstructions: Array  # [N, (C,) H, H]
    boxes: Array  # (x0, y0, x1, y1) in pixels, [N, T, 4]; may lie outside the image
    counts: Array  # [N], number of steps used; later boxes mean nothing
    true_counts: Array | None = None  # [N]
    backgrounds: Array | None = None  # [N, (C,) H, H], with a model of the background

    def pick(self, index: slice | Array) -> "InferredScenes":
        """The scenes of a slice, a mask or indices."""
        return InferredScenes._make(None if field is None else field[index] for field in self)


class Snapshot(NamedTuple):
    """All that the pictures of a run show at one step."""

    step: int
    scenes: InferredScenes  # always the same held-out scenes, empty ones last
    errors: InferredScenes  # scenes counted wrongly in the last evaluation, and still now
    samples: InferredScenes  # from `sample_prior`; images and reconstructions are equal
    windows: Array  # of each step in the first M scenes, [M, T, (C,) W, W] uint8
    objects: Array  # of each step, as painted, [M, T, (C,) H, H] uint8
    presence: Array  # the probability q(n >= t) that step t is used, [M, T]


def take_snapshot(
    air: AIR,
    held_out: HeldOut,
    step: int,
    seed: int,
    miscounted: Sequence[int] = (),
    num_scenes: int = SCENES,
    count_prior: Sequence[float] | None = None,
) -> Snapshot:
    """Infers held-out scenes and samples the prior; leaves the global random numbers alone.

    Args:
        air: The model.
        held_out: The first `num_scenes` of its scenes are shown.
        step: The optimisation step of the model.
        seed: Seed of the samples from the prior.
        miscounted: Indices of further scenes; those still counted wrongly become `errors`.
        num_scenes: The largest number of scenes, and of samples.
        count_prior: As for `sample_prior`.
    """
    is_empty = (held_out.images[:num_scenes] == 0).flatten(1).all(1)
    first = torch.argsort(is_empty.int(), stable=True)
    chosen = torch.cat((first.cpu(), torch.tensor(miscounted, dtype=torch.long)))
    images = air.to_images(held_out.images[chosen].to(air.h_init.device))
    inference = infer(air, images)
    true_counts = None if held_out.counts is None else held_out.counts[chosen].cpu().numpy()
    inferred = InferredScenes(
        as_bytes(images),
        as_bytes(inference.reconstructions),
        inference.boxes.cpu().numpy(),
        inference.counts.cpu().numpy(),
        true_counts,
        None if air.background is None else as_bytes(inference.backgrounds),
    )
    further = inferred.pick(slice(len(first), None))
    is_error = further.counts != further.true_counts if true_counts is not None else slice(0)
    canvases, boxes, counts = sample_prior(air, num_scenes, seed, count_prior)
    samples = as_bytes(canvases)
    decomposed = slice(min(DECOMPOSED_SCENES, len(first)))
    with closed(air):
        shown = Inference._make(field[decomposed] for field in inference)
        windows = _windows(air, images[decomposed], shown)
    return Snapshot(
        step=step,
        scenes=inferred.pick(slice(len(first))),
        errors=further.pick(is_error),
        samples=InferredScenes(samples, samples, boxes.cpu().numpy(), counts.cpu().numpy()),
        windows=as_bytes(windows),
        objects=as_bytes(inference.objects[decomposed]),
        presence=at_least_probs(inference.count_probs[decomposed]).cpu().numpy(),
    )


def _windows(air: AIR, images: Tensor, inference: Inference) -> Tensor:
    """The windows of images [M, (C,) H, H] that the steps encode, [M, T, (C,) W, W].

    With a background that is not black, they show differences, of which 0 is grey.
    """
    painted = air.paint(inference.z_where.unbind(1), inference.z_what.unbind(1))
    background = inference.backgrounds
    canvases = accumulate(painted.unbind()[:-1], air.likelihood.add, initial=background)
    seen = torch.stack([air.look.remainder(images, background, c) for c in canvases], 1)
    if air.background is not None or air.renderer != "none":
        seen = (1 + seen) / 2
    flat = seen.flatten(0, 1)
    where = inference.z_where.flatten(0, 1)
    windows = image_to_window(air.window(where), air.window_size, air.x_size, flat)
    return windows.reshape(*seen.shape[:-2], air.window_size, air.window_size)


def as_bytes(intensities: Tensor) -> NDArray[np.uint8]:
    """Converts intensities in [0, 1] to bytes; clips values outside, and NaN becomes 0."""
    levels = intensities.detach().nan_to_num().clamp(0, 1) * 255 + 0.5
    return np.asarray(levels.to(torch.uint8).cpu().numpy())


def save_snapshot(folder: Path, snapshot: Snapshot) -> None:
    """Writes ``<step>.npz`` into a folder, and makes the folder if necessary."""
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
    """The snapshots in a folder by step, in ascending order."""
    files = {int(path.stem): path for path in folder.glob("*.npz") if path.stem.isdecimal()}
    return dict(sorted(files.items()))


def load_snapshot(path: Path) -> Snapshot:
    """Reads a file that `save_snapshot` wrote.

    Raises:
        SnapshotError: If the file is no readable snapshot.
    """
    fields: dict[str, Any] = {}
    try:
        with path.open("rb") as file:
            for key, array in np.load(file, allow_pickle=False).items():
                name, _, part = key.partition(".")
                if part:
                    fields.setdefault(name, {})[part] = array
                else:
                    fields[name] = array
        for name in ("scenes", "errors", "samples"):
            fields[name] = InferredScenes(**fields[name])
        return Snapshot(**fields | {"step": int(fields["step"])})
    except Exception as error:  # NumPy and zipfile raise many types of errors
        raise SnapshotError(f"{path} is no readable snapshot: {error}") from error
