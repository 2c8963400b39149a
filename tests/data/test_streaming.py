"""Batches that stay in their files: training on them is training from memory."""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pyro
import pytest
import torch
from helpers import SETTINGS, capture_only, small_air, weights

from air.data.arrays import Array
from air.data.shards import Shards
from air.data.streaming import StreamedImages
from air.evaluation.metrics import HeldOut
from air.training.settings import Estimator
from air.training.trainer import Trainer

X = np.random.default_rng(0).integers(0, 256, (41, 12, 12), np.uint8)


def in_files(folder: Path, x: Array = X) -> StreamedImages:
    for k, part in enumerate(np.split(x, [17, 30])):
        np.save(folder / f"{k}.npy", part)
    files = Shards([np.load(folder / f"{k}.npy", mmap_mode="r") for k in range(3)])
    return StreamedImages(files, torch.device("cpu"))


def test_a_batch_that_is_no_smaller_than_the_data_is_all_of_them(tmp_path: Path) -> None:
    streamed = in_files(tmp_path)
    assert len(streamed) == 41
    for batch_size in (41, 64):
        assert np.array_equal(streamed.draw(batch_size), X)
    assert streamed.draw(8).shape == (8, 12, 12)
    assert np.array_equal(streamed[15:20], X[15:20])


def test_a_gpu_takes_batches_from_pinned_memory_without_waiting(tmp_path: Path) -> None:
    """Otherwise the next batch would not be read before the device has taken all its steps."""
    streamed = in_files(tmp_path)
    streamed.device = torch.device("cuda")  # there may be none here
    with (
        mock.patch("torch.empty_like") as empty_like,
        mock.patch.object(torch.Tensor, "pin_memory", autospec=True) as pin_memory,
    ):
        for _ in range(2):
            streamed.draw(8)
    assert empty_like.call_count == 1  # a recorded step reads from a fixed address
    copied = mock.call(pin_memory.return_value, non_blocking=True)
    assert empty_like.return_value.copy_.mock_calls == [copied, copied]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "compiled"), [("marginal", False), ("score", False), ("marginal", True)]
)
def test_training_from_files_is_training_from_memory(
    tmp_path: Path, estimator: Estimator, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, estimator=estimator, compile=compiled, learn_count_prior_from=11)
    monkeypatch.setattr("air.training.trainer.LEARN_PRIOR_EVERY", 11)
    results = []
    for images in (torch.from_numpy(X), in_files(tmp_path)):
        torch.manual_seed(1)
        held_out = HeldOut(torch.rand(3, 12, 12))
        # A captured step cannot look at values, as Pyro's validation does.
        with pyro.validation_enabled(not compiled):
            trainer = Trainer(small_air(), images, held_out, settings, compiler=capture_only)
            elbos = [event.elbo for event in trainer.train() if hasattr(event, "elbo")]
        results.append((elbos, trainer.learnt_prior, weights(trainer)))
    (elbos, prior, parameters), (streamed_elbos, streamed_prior, streamed_parameters) = results
    assert elbos == streamed_elbos
    assert prior == streamed_prior
    assert prior is not None
    assert all(map(torch.equal, parameters, streamed_parameters))
