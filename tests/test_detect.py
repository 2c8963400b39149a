"""Detections in files of images are the model's inferences; files that do not fit are named."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import count_on, small_air
from PIL import Image

from air import AIR
from air.detect import detect, load_air, main
from air.evaluation.boxes import tight_boxes
from air.inference import infer
from air.model_settings import ModelSettings
from air.storage.checkpoint import save_weights, write_state

FLAGS = {  # of `small_air`
    "model_steps": 3, "window_size": 7, "encoder_latent_size": 5, "rnn_hidden_size": 11,
    "encoder_net": [9], "decoder_net": [8], "predict_net": [6], "bl_predict_net": [4],
}  # fmt: skip


def save(air: AIR, path: Path, **config: object) -> Path:
    """A checkpoint with the parts that `load_air` needs."""
    state = {"format": 3, "model": air.state_dict(), "optimizer": {}, "step": 1}
    write_state(path, state | {"config": {**FLAGS, **config}})
    return path


def write_png(path: Path, channels: int = 1, side: int = 12) -> torch.Tensor:
    shape = (side, side) if channels == 1 else (side, side, channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    Image.fromarray(pixels).save(path)
    return torch.from_numpy(pixels if channels == 1 else pixels.transpose(2, 0, 1).copy())


@pytest.mark.parametrize("channels", [1, 3])
def test_detections_are_the_models_inferences(channels: int) -> None:
    air = small_air(channels=channels)
    images = torch.rand(7, 12, 12) if channels == 1 else torch.rand(7, channels, 12, 12)
    found, detections = infer(air, images), detect(air, images)
    painted = found.objects if channels == 1 else found.objects.amax(2)
    for i, detection in enumerate(detections):
        assert detection.count == found.counts[i] == len(detection.objects)
        assert detection.probability == pytest.approx(found.count_probs[i].max().item())
        for t, each in enumerate(detection.objects):
            assert each.step == t + 1
            assert each.window == found.boxes[i, t].tolist()
            assert each.box == tight_boxes(painted[i, t]).tolist()
            assert each.probability == pytest.approx(found.count_probs[i, t + 1 :].sum().item())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"channels": 3},
        {"embed_net": [10, 6]},
        {"decoder_net": [4] * 6},
        {"decoder_net": [], "guide_input": "difference"},
    ],
    ids=str,
)
def test_a_checkpoint_knows_the_size_of_its_images(
    settings: dict[str, object], tmp_path: Path
) -> None:
    air = small_air(**settings)
    flags = {name: value for name, value in settings.items() if name != "channels"}
    if "guide_input" in flags:
        flags["guide"] = flags.pop("guide_input")
    loaded = load_air(save(air, tmp_path / "checkpoint.pt", **flags))
    assert (loaded.x_size, loaded.channels) == (12, air.channels)
    images = torch.rand(5, air.channels, 12, 12).squeeze(1)
    assert torch.equal(infer(loaded, images).count_probs, infer(air, images).count_probs)


def test_weights_of_the_default_model_load_without_a_checkpoint(tmp_path: Path) -> None:
    air = AIR()
    save_weights(air, tmp_path / "weights.pt")
    assert load_air(tmp_path / "weights.pt").x_size == 50


def test_the_command_prints_json_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    air = small_air()
    count_on(air, 2, 9.0)
    path = save(air, tmp_path / "checkpoint.pt")
    image = write_png(tmp_path / "a.png")
    np.savez(tmp_path / "b.npz", x=np.stack([image.numpy()] * 2))
    line = f"--load {path} {tmp_path}/a.png {tmp_path}/b.npz --figure {tmp_path}/found.png"
    assert main(line.split()) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [each["image"] for each in printed] == [
        f"{tmp_path}/a.png", f"{tmp_path}/b.npz[0]", f"{tmp_path}/b.npz[1]"
    ]  # fmt: skip
    (detection,) = detect(air, image[None])
    for each in printed:
        assert each["count"] == detection.count == 3
        assert [found["box"] for found in each["objects"]] == [o.box for o in detection.objects]
    with Image.open(tmp_path / "found.png") as drawn:
        assert drawn.mode == "RGB"
        assert drawn.width > 3 * 192


def test_the_command_takes_nets_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def nets(settings: ModelSettings) -> dict[str, torch.nn.Module]:
        pixels = settings.channels * settings.window_size**2
        linear = torch.nn.Linear(settings.z_what_size, pixels)
        return {"decode": torch.nn.Sequential(linear, torch.nn.Sigmoid())}

    settings = ModelSettings(
        num_steps=3, x_size=12, window_size=7, z_what_size=5, rnn_hidden_size=11,
        encoder_net=[9], decoder_net=[8], predict_net=[6], bl_predict_net=[4],
    )  # fmt: skip
    air = AIR.from_settings(settings, nets)
    count_on(air, 2, 9.0)
    path = save(air, tmp_path / "c.pt", x_size=12, channels=1)
    image = write_png(tmp_path / "a.png")
    line = f"--load {path} {tmp_path}/a.png".split()
    assert main(line, nets) == 0
    (printed,) = json.loads(capsys.readouterr().out)
    (expected,) = detect(air, image[None])
    assert printed["objects"][0]["box"] == expected.objects[0].box
    with pytest.raises(SystemExit):
        main(line)
    assert "do not fit these settings and nets" in capsys.readouterr().err


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grey = save(small_air(), tmp_path / "grey.pt")
    coloured = save(small_air(channels=3), tmp_path / "coloured.pt")
    write_png(tmp_path / "a.png")
    write_png(tmp_path / "rgb.png", 3)
    write_png(tmp_path / "large.png", side=13)
    (tmp_path / "text.png").write_text("no image")
    np.savez(tmp_path / "floats.npz", x=np.zeros((2, 12, 12)))
    np.savez(tmp_path / "pickle.npz", x=np.array([{}], object))
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    for model, line, problem in [
        (grey, "rgb.png", "expected mode L or 1, got RGB"),
        (coloured, "a.png", "expected mode RGB, got L"),
        (grey, "large.png", r"expected 12 x 12 pixels, got (13, 13)"),
        (grey, "text.png", "text.png: no image for this model"),
        (grey, "cut.png", "cut.png: no image for this model"),
        (grey, "missing.png", "missing.png"),
        (grey, "missing.npz", "missing.npz"),
        (grey, "floats.npz", "expected x uint8 (N, 12, 12), got float64 (2, 12, 12)"),
        (coloured, "floats.npz", "expected x uint8 (N, 3, 12, 12)"),
        (grey, "pickle.npz", "Object arrays cannot be loaded"),
        (grey, f"a.png --figure {tmp_path}/a.png", "--figure never overwrites"),
        (grey, "a.png --device toaster", "--device"),
        (tmp_path / "text.png", "a.png", "text.png is no readable file of weights"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main(f"--load {model} {tmp_path}/{line}".split())
        said = capsys.readouterr()
        assert (ended.value.code, said.out, said.err.count("\n")) == (2, "", 1), said.err
        assert problem in said.err


def test_a_checkpoint_with_bad_settings_is_refused(tmp_path: Path) -> None:
    for name, value in [
        ("window_size", 0), ("model_steps", "3"), ("model_steps", 0), ("non_linearity", "Linear"),
        ("decoder_output_bias", "x"), ("guide", 5), ("rnn_hidden_size", 12), ("window_size", 9),
    ]:  # fmt: skip
        path = save(small_air(), tmp_path / "foreign.pt", **{name: value})
        with pytest.raises(ValueError, match=f"{path}"):
            load_air(path)


def test_an_rgb_file_is_read_for_a_model_of_three_channels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    air = small_air(channels=3)
    count_on(air, 2, 9.0)
    path, image = save(air, tmp_path / "c.pt"), write_png(tmp_path / "a.png", 3)
    line = f"--load {path} {tmp_path}/a.png --figure {tmp_path}/found.png"
    assert main(line.split()) == 0
    (printed,) = json.loads(capsys.readouterr().out)
    (expected,) = detect(air, image[None])
    assert printed["objects"][0]["box"] == expected.objects[0].box
