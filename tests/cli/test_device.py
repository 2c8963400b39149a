"""Devices by name, and the settings of torch and Pyro that a run changes."""

import contextlib
from unittest import mock

import pyro
import pytest
import torch

from air.cli import device
from air.cli.device import pick_device, torch_settings_of_a_run


@pytest.mark.parametrize("name", ["toaster", "cuda:77", "meta", ""])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(ValueError, match="--device: cannot use"):
        pick_device(name)


@pytest.mark.parametrize(
    ("name", "local_rank", "index"), [("cuda:1", None, 1), ("cuda", None, None), ("cuda", 1, 1)]
)
def test_a_gpu_becomes_the_current_one(
    name: str, local_rank: int | None, index: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA graph of another GPU than the current one cannot be recorded."""
    monkeypatch.setattr(device, "local_rank", lambda: local_rank)
    with (
        mock.patch("torch.zeros"),  # there may be no GPU here
        mock.patch("torch.cuda.set_device") as chosen,
    ):
        assert pick_device(name) == torch.device("cuda", index)
    assert [call.args[0].index for call in chosen.mock_calls] == ([] if index is None else [index])


def test_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "local_rank", lambda: 1)
    with pytest.raises(ValueError, match=r"--device: expected cuda, .* got cuda:1"):
        pick_device("cuda:1")
    assert pick_device("cpu").type == "cpu"


def test_torch_and_pyro_have_their_settings_again_also_after_an_error() -> None:
    def found() -> tuple[object, ...]:
        return (
            torch.get_num_threads(),
            pyro.distributions.is_validation_enabled(),
            pyro.infer.is_validation_enabled(),
            pyro.poutine.is_validation_enabled(),
        )

    before = found()
    with contextlib.suppress(ZeroDivisionError), torch_settings_of_a_run():
        torch.set_num_threads(torch.get_num_threads() + 1)
        assert not any(found()[1:])
        raise ZeroDivisionError
    assert found() == before
    assert all(before[1:])
