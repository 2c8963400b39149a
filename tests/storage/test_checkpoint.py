"""Files of weights: intact or as before, read without trust, refused in one line."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import load_weights, save_checkpoint, small_air

from air import AIR
from air.storage.checkpoint import (
    FORMAT,
    CheckpointError,
    check_image_size,
    load_air,
    read_state,
    save_weights,
)
from air.support.model_settings import ModelSettings


def test_no_pickle_is_ever_executed(tmp_path: Path, air: AIR) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"model": Trap()}, tmp_path / "trap.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Trap()))
    for name in ("trap.pt", "raw.pt"):
        with pytest.raises(CheckpointError, match="cannot be read as weights"):
            load_weights(air, tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_foreign_and_damaged_files_are_refused(tmp_path: Path, air: AIR) -> None:
    path = save_checkpoint(air, tmp_path / "checkpoint.pt")
    assert load_air(str(path)).x_size == 12
    intact = path.read_bytes()
    truncated = [intact[:size] for size in (0, 1, len(intact) // 2, len(intact) - 1)]
    flipped = bytearray(intact)  # one bit of a weight
    flipped[intact.index(air.decode.mlp.seq[0].weight.detach().numpy().tobytes()) + 7] ^= 4
    for content in (*truncated, flipped, b"garbage", b"PK\x03\x04 no zip"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"checkpoint\.pt cannot be read as weights"):
            read_state(path)
    for missing, problem in ((tmp_path, "is a folder"), (tmp_path / "missing.pt", "no file")):
        with pytest.raises(CheckpointError, match=problem):
            load_weights(air, missing)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": FORMAT + 1}, "newer than this program's"),
        ({"format": FORMAT - 1}, "only its weights can be used, by --load"),
        ({"format": "3"}, "expected int for format, got str"),
        ({"step": 2.5}, "expected int for step, got float"),
        ({"model": [1]}, "expected dict for model, got list"),
        ({"config": None}, "expected dict for config, got NoneType"),
        ({"config": {"guide": "glimpse"}}, "of an earlier program, whose glimpses"),
    ],
)
def test_foreign_checkpoints_are_refused(
    changes: dict[str, object], message: str, tmp_path: Path, air: AIR
) -> None:
    path = save_checkpoint(air, tmp_path / "checkpoint.pt")
    torch.save({**torch.load(path, weights_only=True), **changes}, path)
    with pytest.raises(CheckpointError, match=message):
        read_state(path)
    if changes == {"format": FORMAT - 1}:
        load_weights(small_air(), path)
        assert load_air(path).x_size == 12


def test_files_without_weights_are_refused(tmp_path: Path, air: AIR) -> None:
    path = tmp_path / "weights.pt"
    save_weights(air, path)
    with pytest.raises(CheckpointError, match="is not the checkpoint of a run"):
        read_state(path)
    for content, message in [
        ([air.state_dict()], "contains a list instead of weights"),
        ({1: torch.zeros(1)}, "contains a dict instead of weights"),
        ({"decode": 1.0}, "do not fit these settings"),
    ]:
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            load_weights(air, path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_prior_sd": 0.1}, r"z_where_scale_prior is \[0.1.* expected \[0.2"),
        ({"z_what_size": 4}, r"do not fit these settings and nets: .*z_what"),
        ({"embed_net": [5]}, r"Unexpected key.*\"embed\.seq\.0\.weight\""),
    ],
)
def test_weights_that_do_not_fit_are_named(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_weights(small_air(**options), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=message):
        load_weights(small_air(), tmp_path / "weights.pt")
    load_weights(small_air(**options), tmp_path / "weights.pt")


def test_weights_alone_are_loaded_with_default_settings(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    save_weights(AIR(), path)
    assert load_air(path).x_size == 50
    save_weights(small_air(window_size=5), path)
    message = r"do not fit .*\. The file has no settings .* defaults .* checkpoint\.pt.*AIR\("
    with pytest.raises(CheckpointError, match=message):
        load_air(path)
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"contains no AIR: rnn\.weight_ih is missing"):
        load_air(path)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda air: torch.compile(air, backend="eager"),
        lambda air: torch.optim.swa_utils.AveragedModel(air),
        lambda air: setattr(air, "decode", torch.compile(air.decode, backend="eager")) or air,
        lambda air: setattr(air, "encode", torch.nn.DataParallel(air.encode)) or air,
        lambda air: torch.nn.DataParallel(torch.nn.DataParallel(air)),
        lambda air: torch.nn.ModuleDict({"other": torch.nn.Linear(2, 2), "air": air}),
    ],
    ids=["compiled", "averaged", "a compiled part", "a parallel part", "parallel", "a part"],
)
def test_weights_of_wrapped_models_are_loaded(
    wrap: Callable[[AIR], torch.nn.Module], tmp_path: Path
) -> None:
    air = AIR()
    save_weights(wrap(air), tmp_path / "weights.pt")
    loaded = load_air(tmp_path / "weights.pt")
    assert torch.equal(loaded.z_what_init, air.z_what_init)
    assert torch.equal(loaded.predict.mlp.seq[0].weight, air.predict.mlp.seq[0].weight)


def test_weights_of_a_compiled_net_of_ones_own_are_loaded_with_it(tmp_path: Path) -> None:
    def nets(settings: ModelSettings) -> dict[str, torch.nn.Module]:
        decode = torch.nn.Linear(settings.z_what_size, settings.window_size**2)
        return {"decode": torch.compile(decode, backend="eager")}

    air = AIR.from_settings(ModelSettings(), nets)
    save_weights(air, tmp_path / "weights.pt")
    state = torch.get_rng_state()
    loaded = load_air(tmp_path / "weights.pt", nets=nets)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loaded.decode.weight, air.decode.weight)
    torch.save({"state_dict": {f"model.{k}": v for k, v in air.state_dict().items()}, "epoch": 3},
               tmp_path / "lightning.ckpt")  # fmt: skip
    loaded = load_air(tmp_path / "lightning.ckpt", nets=nets)
    assert torch.equal(loaded.decode.weight, air.decode.weight)


def test_images_of_another_size_are_named(air: AIR) -> None:
    config = {"x_size": 12, "channels": 1}
    check_image_size(air, config, "a.pt")
    check_image_size(air, {}, "weights.pt")
    for options, size in (({"x_size": 8}, "1, 8, 8"), ({"channels": 3}, "3, 12, 12")):
        message = rf"a.pt was trained on images of \[1, 12, 12\] .* are \[{size}\]"
        with pytest.raises(CheckpointError, match=message):
            check_image_size(small_air(**options), config, "a.pt")
