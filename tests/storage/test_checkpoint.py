"""Files of weights: whole or as before, read without trust, refused in one line."""

import pickle
from pathlib import Path

import pytest
import torch
from helpers import load_weights, small_air

from air import AIR
from air.storage.checkpoint import (
    FORMAT,
    CheckpointError,
    read_state,
    save_weights,
)


def test_weights_alone_are_a_plain_state_dict(tmp_path: Path, air: AIR) -> None:
    save_weights(air, tmp_path / "weights.pt")
    assert set(torch.load(tmp_path / "weights.pt", weights_only=True)) == set(air.state_dict())
    load_weights(small_air(), tmp_path / "weights.pt")


def test_no_pickle_is_ever_executed(tmp_path: Path, air: AIR) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"model": Trap()}, tmp_path / "trap.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Trap()))
    for name in ("trap.pt", "raw.pt"):
        with pytest.raises(CheckpointError, match="no readable file of weights"):
            load_weights(air, tmp_path / name)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 no zip"])
def test_foreign_files_are_refused(tmp_path: Path, air: AIR, content: bytes) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights\.pt is no readable file of weights"):
        load_weights(air, path)
    with pytest.raises(CheckpointError, match="there is no file"):
        load_weights(air, tmp_path / "missing.pt")


def write_checkpoint(path: Path, air: AIR, **changes: object) -> None:
    state = {"format": FORMAT, "step": 3, "config": {}, "optimizer": {}, "model": air.state_dict()}
    torch.save({**state, **changes}, path)


def test_damaged_checkpoints_are_refused(tmp_path: Path, air: AIR) -> None:
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, air)
    whole = path.read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="no readable file of weights"):
            read_state(path)
    bits = bytearray(whole)
    bits[whole.index(air.decode.mlp.seq[0].weight.detach().numpy().tobytes()) + 7] ^= 4
    path.write_bytes(bits)  # one bit of a weight
    with pytest.raises(CheckpointError, match="no readable file of weights"):
        read_state(path)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, air: AIR) -> None:
    path = tmp_path / "checkpoint.pt"
    for changes, message in [
        ({"format": FORMAT + 1}, "newer than this program's"),
        ({"format": FORMAT - 1}, "only its weights can be used, by --load"),
        ({"format": "3"}, "its format is no number"),
        ({"step": 2.5}, "it holds no step"),
        ({"model": [1]}, "it holds no model"),
        ({"config": None}, "it holds no config"),
    ]:
        write_checkpoint(path, air, **changes)  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match=message):
            read_state(path)
    save_weights(air, path)
    with pytest.raises(CheckpointError, match="is no checkpoint of a run"):
        read_state(path)
    for content, message in [
        ([air.state_dict()], "holds no weights, but a list"),
        ({1: torch.zeros(1)}, "holds no weights, but a dict"),
        ({"decode": 1.0}, "holds no weights: decode is a float"),
    ]:
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            load_weights(air, path)


def test_constants_of_the_prior_must_be_those_of_the_flags(tmp_path: Path) -> None:
    save_weights(small_air(scale_prior_sd=0.1), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"z_where_scale_prior is \[0.1.* by the flags \[0.2"):
        load_weights(small_air(), tmp_path / "weights.pt")
    load_weights(small_air(scale_prior_sd=0.1), tmp_path / "weights.pt")


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    save_weights(small_air(z_what_size=4), tmp_path / "weights.pt")
    several = r"do not fit these settings and nets: .* expected .* more"
    with pytest.raises(CheckpointError, match=several):
        load_weights(small_air(), tmp_path / "weights.pt")
    save_weights(small_air(embed_net=[5]), tmp_path / "embedded.pt")
    with pytest.raises(CheckpointError, match=r"embed\.seq\.0\.weight is unknown"):
        load_weights(small_air(), tmp_path / "embedded.pt")
