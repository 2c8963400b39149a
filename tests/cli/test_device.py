"""Devices by name: those that are not there are refused in one line."""

from unittest import mock

import pytest
import torch

from air.cli.device import pick_device


@pytest.mark.parametrize("name", ["toaster", "cuda:77", "meta", ""])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(ValueError, match="--device: cannot use"):
        pick_device(name)


def test_each_process_takes_a_gpu_of_its_own() -> None:
    with pytest.raises(ValueError, match="use cuda, not cuda:1"):
        pick_device("cuda:1", local_rank=1)
    assert pick_device("cpu", local_rank=1).type == "cpu"


@pytest.mark.parametrize(("name", "current"), [("cuda:1", 1), ("cuda", None)])
def test_a_gpu_that_is_named_becomes_the_current_one(name: str, current: int | None) -> None:
    """A CUDA graph of another GPU than the current one cannot be recorded."""
    chosen = []
    with (
        mock.patch("torch.zeros"),  # there may be no GPU here
        mock.patch("torch.cuda.set_device", lambda device: chosen.append(device.index)),
    ):
        assert pick_device(name) == torch.device(name)
    assert chosen == ([] if current is None else [current])
