"""Files of weights: whole or as before, read without trust, refused in one line."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import load_weights, small_air
from torch import nn

from air import AIR
from air.storage.checkpoint import (
    FORMAT,
    CheckpointError,
    check_image_size,
    load_air,
    load_weights_strict,
    read_config,
    read_state,
    read_weights,
    save_weights,
    write_state,
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


def test_paths_may_be_texts(tmp_path: Path, air: AIR) -> None:
    weights, checkpoint = str(tmp_path / "weights.pt"), str(tmp_path / "checkpoint.pt")
    save_weights(air, weights)
    load_weights_strict(small_air(), read_weights(weights)[0], weights)
    state = {"format": FORMAT, "step": 3, "config": CONFIG, "optimizer": {}}
    state["model"] = air.state_dict()
    write_state(checkpoint, state)
    write_state(checkpoint, state, previous=str(tmp_path / "previous.pt"))
    assert read_state(checkpoint)["step"] == 3
    assert read_config(checkpoint) == CONFIG
    assert read_config(weights) == {}
    loaded = load_air(checkpoint)
    assert torch.equal(loaded.decode.mlp.seq[0].weight, air.decode.mlp.seq[0].weight)
    check_image_size(loaded, *read_weights(checkpoint), checkpoint)
    with pytest.raises(CheckpointError, match="there is no file"):
        load_air(str(tmp_path / "missing.pt"))


@pytest.mark.parametrize(
    "sizes",
    [{}, {"window_size": 28}, {"z_what_size": 50}, {"x_size": 50, "window_size": 28}],
)
def test_weights_alone_of_other_sizes_bring_no_settings(
    sizes: dict[str, int], tmp_path: Path
) -> None:
    save_weights(small_air(**sizes), tmp_path / "weights.pt")
    message = r"do not fit .*\. The file brings no settings .* defaults .* checkpoint\.pt.*AIR\("
    with pytest.raises(CheckpointError, match=message):
        load_air(tmp_path / "weights.pt")
    save_weights(AIR(x_size=9), tmp_path / "weights.pt")
    assert load_air(tmp_path / "weights.pt").x_size == 9
    torch.save({"weight": torch.zeros(3)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"holds no AIR: rnn\.weight_ih and h_init are not"):
        load_air(tmp_path / "weights.pt")


class TwoHeads(nn.Module):
    """An encoder of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(49, 5)

    def forward(self, window: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.linear(window), self.linear(window).exp()


CONFIG = {
    "model_steps": 3, "x_size": 12, "channels": 1, "window_size": 7, "encoder_latent_size": 5,
    "rnn_hidden_size": 11, "encoder_net": [9], "decoder_net": [8], "predict_net": [6],
    "bl_predict_net": [4],
}  # fmt: skip


@pytest.mark.parametrize("known", ["all", "earlier program", "nothing"])
@pytest.mark.parametrize("embed_net", [None, [6]])
def test_images_of_another_size_are_named(known: str, embed_net: list[int] | None) -> None:
    air = small_air(embed_net=embed_net)
    config: dict[str, Any] = {} if known == "nothing" else dict(CONFIG)
    if known == "earlier program":
        del config["channels"]
        config["x_size"] = 50  # which was not that of the images
    check_image_size(air, air.state_dict(), config, "a.pt")
    for other, these in (
        (small_air(x_size=8), "8 x 8 in 1$"),
        (small_air(channels=3), "12 x 12 in 3$"),
    ):
        with pytest.raises(
            CheckpointError, match=f"a.pt was trained on .* 12 x 12 pixels in 1 channel, .*{these}"
        ):
            check_image_size(other, air.state_dict(), config, "a.pt")
    colour = small_air(channels=3, x_size=9, embed_net=embed_net)
    size = {"channels": 3, "x_size": 9} if known == "all" else {}
    with pytest.raises(CheckpointError, match="of 9 x 9 pixels in 3 channels, but these are 12 x"):
        check_image_size(air, colour.state_dict(), {**config, **size}, "a.pt")


@pytest.mark.parametrize(
    "weights",
    [
        {},
        {"a": 1},
        {"z_what_init": 1.0},
        small_air(window_size=5).state_dict(),
        small_air(encode=TwoHeads(), x_size=8).state_dict(),
        {**small_air(x_size=8).state_dict(), "bl_rnn.weight_ih": torch.zeros(44, 9 + 65)},
    ],
)
def test_weights_that_do_not_tell_the_size_pass(weights: dict[str, Any]) -> None:
    check_image_size(small_air(), weights, {}, "a.pt")
