"""Snapshots show what the model infers, and are read back from their files unchanged."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import count_on, make_snapshot, small_air

from air import AIR
from air.evaluation.metrics import HeldOut
from air.inference import infer, sample_prior
from air.spatial_transformer import image_to_window
from air.visualization.snapshots import (
    InferredScenes,
    SnapshotError,
    as_bytes,
    load_snapshot,
    save_snapshot,
    snapshot_files,
    take_snapshot,
)


def held_out(number: int = 12) -> HeldOut:
    """Every third scene is empty."""
    images = torch.randint(1, 256, (number, 12, 12), dtype=torch.uint8)
    images[::3] = 0
    return HeldOut(images, torch.full((number,), 3))


def equal(one: object, other: object) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return all(map(equal, one, other))
    if one is None:
        return other is None
    return np.array_equal(one, other, equal_nan=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("guide_input", ["image", "difference", "glimpse"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("background", ["none", "pca"])
def test_windows_are_what_the_encoder_is_given(
    guide_input: str, channels: int, background: str
) -> None:
    air = small_air(guide_input=guide_input, channels=channels, background_model=background)
    images = torch.rand(9, channels, 12, 12).squeeze(1)
    given: list[torch.Tensor] = []
    hook = air.encode.register_forward_pre_hook(lambda net, inputs: given.append(inputs[0]))
    found = infer(air, images)
    hook.remove()
    windows = take_snapshot(air, HeldOut(images), 0, seed=0).windows
    for t, window in enumerate(given):
        expected = window[:8].reshape(windows[:, t].shape)
        if background == "pca":  # differences are drawn around a medium grey
            within = torch.ones(8, channels, 12, 12)  # beyond the image they are black
            cut = image_to_window(found.z_where[:8, t], air.window_size, air.x_size, within)
            expected = (cut.view_as(expected) + expected) / 2
        np.testing.assert_allclose(windows[:, t], as_bytes(expected), atol=1)


def test_a_snapshot_shows_what_is_inferred(air: AIR) -> None:
    scenes = held_out()
    state = torch.get_rng_state()
    snapshot = take_snapshot(air, scenes, 40, seed=3, num_scenes=10)
    assert torch.equal(state, torch.get_rng_state())
    assert snapshot.step == 40
    order = [1, 2, 4, 5, 7, 8, 0, 3, 6, 9]  # the empty ones last
    np.testing.assert_array_equal(snapshot.scenes.images, scenes.images[order])
    images = scenes.images[order] / 255
    found = infer(air, images)
    rebuilt = as_bytes(found.reconstructions)
    assert equal(snapshot.scenes[1:4], (rebuilt, found.boxes, found.counts))
    np.testing.assert_array_equal(snapshot.objects, as_bytes(found.objects[:8]))
    for i, t in ((0, 0), (5, 2), (7, 1)):
        window = image_to_window(found.z_where[i, t][None], 7, 12, images[i][None])
        np.testing.assert_array_equal(snapshot.windows[i, t], as_bytes(window.reshape(7, 7)))
        probability = found.count_probs[i, t + 1 :].sum()
        assert snapshot.presence[i, t] == pytest.approx(probability.item(), rel=1e-5)
    canvas, boxes, counts = sample_prior(air, 10, 3)
    assert equal(snapshot.samples[:4], (as_bytes(canvas), as_bytes(canvas), boxes, counts))


def test_only_what_is_still_counted_wrongly_is_an_error() -> None:
    air, scenes = small_air(), held_out()
    count_on(air, 0, 9.0)  # three everywhere
    scenes.counts[7] = 1
    snapshot = take_snapshot(air, scenes, 0, 0, miscounted=[2, 7], num_scenes=4)
    np.testing.assert_array_equal(snapshot.errors.images, scenes.images[7:8])
    np.testing.assert_array_equal(snapshot.errors.true_counts, [1])
    assert len(snapshot.scenes.images) == 4
    unknown = take_snapshot(air, HeldOut(scenes.images), 0, 0)
    assert unknown.scenes.true_counts is None
    assert len(unknown.errors.images) == 0


def test_intensities_become_bytes() -> None:
    given = torch.tensor([-3.0, 0.0, 0.5, 1.0, 1.7, float("nan"), float("inf"), -float("inf")])
    assert as_bytes(given).tolist() == [0, 0, 128, 255, 255, 0, 255, 0]


def test_snapshots_are_read_back_unchanged(tmp_path: Path) -> None:
    made = {step: make_snapshot(step, wrong=step % 3) for step in (20, 500, 10_000_000_000)}
    made[500] = made[500]._replace(scenes=made[500].scenes._replace(true_counts=None))
    for step in (500, 20, 10_000_000_000):
        save_snapshot(tmp_path / "made", made[step])
    files = snapshot_files(tmp_path / "made")
    assert list(files) == list(made)
    for step, path in files.items():
        assert equal(load_snapshot(path), made[step])
    assert len(list((tmp_path / "made").iterdir())) == 3


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_snapshot(tmp_path, make_snapshot(7))
    whole = (tmp_path / "00000007.npz").read_bytes()
    np.savez(tmp_path / "1.npz", **{"step.": np.array([InferredScenes], dtype=object)})
    np.savez(tmp_path / "2.npz", x=np.zeros(3))
    with np.load(tmp_path / "00000007.npz") as file:
        np.savez(tmp_path / "3.npz", **{k: v for k, v in file.items() if k != "errors.boxes"})
    (tmp_path / "4.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "5.npz").write_bytes(b"")
    (tmp_path / "6.npz").write_bytes(whole[:900] + bytes(200) + whole[1100:])
    for name in (1, 2, 3, 4, 5, 6, "none"):
        with pytest.raises(SnapshotError, match=rf"{name}.npz is no readable snapshot"):
            load_snapshot(tmp_path / f"{name}.npz")
