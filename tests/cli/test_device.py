"""Devices by name: those that are not there are refused in one line."""

import pytest

from air.cli.device import pick_device


@pytest.mark.parametrize("name", ["toaster", "cuda:77", "meta", ""])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(ValueError, match="--device: cannot use"):
        pick_device(name)


def test_each_process_takes_a_gpu_of_its_own() -> None:
    with pytest.raises(ValueError, match="use cuda, not cuda:1"):
        pick_device("cuda:1", local_rank=1)
    assert pick_device("cpu", local_rank=1).type == "cpu"
