"""User-defined nets: with both estimators, captured, resumed, loaded, detecting."""

import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from helpers import (
    SMALL,
    Run,
    capture_only,
    make_svi,
    moved,
    run,
    save_checkpoint,
    small_air,
    values,
)
from pyro.infer import SVI, TraceGraph_ELBO
from torch import Tensor, nn
from torch.nn.functional import softplus

from air import AIR
from air.detect import detect
from air.inference import infer
from air.marginal import MarginalAIR
from air.storage.checkpoint import CheckpointError, load_air
from air.support.model_settings import ModelSettings
from air.training.teacher import Teacher


class ConvEncoder(nn.Module):
    """q(z_what | window): [B, C * W * W] to mean and standard deviation, [B, Z] each."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.shape = settings.channels, settings.window_size, settings.window_size
        self.conv = nn.Conv2d(settings.channels, 4, 5, stride=2)
        side = (settings.window_size - 5) // 2 + 1
        self.linear = nn.Linear(4 * side**2, 2 * settings.z_what_size)

    def forward(self, window: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.conv(window.view(-1, *self.shape))).flatten(1)
        loc, scale = self.linear(hidden).chunk(2, 1)
        return loc, softplus(scale) + 1e-4


class Narrow(nn.Module):
    """An embedding with running statistics, which are no constants of the prior."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.linear = nn.Linear(settings.channels * settings.x_size**2, 6)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.linear(images))


class Where(nn.Module):
    """q(z_pres, z_where | h)."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.linear = nn.Linear(settings.rnn_hidden_size, 7)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pres, loc, scale = self.linear(h).split([1, 3, 3], 1)
        return torch.sigmoid(pres), loc, softplus(scale) + 1e-4


def nets(settings: ModelSettings) -> dict[str, nn.Module]:
    window_pixels = settings.channels * settings.window_size**2
    decode = nn.Sequential(nn.Linear(settings.z_what_size, window_pixels), nn.Sigmoid())
    return {"encode": ConvEncoder(settings), "decode": decode, "predict": Where(settings)}


SETTINGS = ModelSettings(x_size=12, window_size=9, z_what_size=5, rnn_hidden_size=11)


def test_the_contract_of_pyros_svi_holds_with_user_defined_nets(images: Tensor) -> None:
    air = AIR.from_settings(SETTINGS, nets)
    assert isinstance(air.encode, ConvEncoder)
    svi = SVI(air.model, air.guide, pyro.optim.Adam({"lr": 1e-3}), TraceGraph_ELBO())
    before = values(air)
    for _ in range(2):
        svi.step(images, batch_size=8)
    assert moved(air, before) >= {name for name, _ in air.named_parameters()}


def test_the_baseline_has_a_copy_of_a_user_defined_embedding() -> None:
    air = AIR(**{"x_size": 12, "window_size": 9}, embed=Narrow(SETTINGS))  # type: ignore[arg-type]
    assert air.rnn.weight_ih.shape[1] == 6 + 1 + 3 + 50
    own, copied = air.embed.linear.weight, air.bl_embed.linear.weight
    assert torch.equal(own, copied)
    assert own is not copied
    assert any(copied is p for p in air.baseline_parameters())
    assert torch.equal(air.embed.norm.running_mean, torch.zeros(6))  # not moved by the check


def test_other_nets_begin_with_the_same_weights() -> None:
    torch.manual_seed(0)
    ours = AIR.from_settings(SETTINGS)
    made = nets(SETTINGS)
    torch.manual_seed(0)
    own = AIR.from_settings(SETTINGS, lambda settings: made)
    for name, weight in own.state_dict().items():
        if not name.startswith(("encode", "decode", "predict")):
            assert torch.equal(weight, ours.state_dict()[name]), name


@pytest.mark.parametrize(
    ("name", "net", "message"),
    [
        ("encode", nn.Linear(81, 10), r"encode: expected outputs of \[5, 5\] columns for inputs"),
        ("decode", nn.Linear(5, 80), r"decode: expected outputs of \[81\] .* got \[80\]"),
        ("predict", nn.Linear(11, 7), r"predict: expected outputs of \[1, 3, 3\] .* got \[7\]"),
        ("decode", nn.Unflatten(1, (5, 1)), r"decode: .* outputs \[B, columns\], got \[2, 5, 1\]"),
        ("decode", nn.Linear(7, 81), r"decode: expected a net for inputs \[B, 5\] \(mat1 and"),
        ("encode", nn.Linear, r"encode: expected an instance of nn\.Module, got <class"),
        ("embed", torch.tanh, r"embed: expected an instance of nn\.Module, got <built-in"),
        ("decoder", nn.Linear(5, 81), r"nets: expected a dict of encode, .* got \['decoder'\]"),
        (None, nn.Linear(5, 81), r"nets: expected a dict of encode, .*, got Linear"),
    ],
)
def test_a_net_that_does_not_fit_is_refused(name: str | None, net: Any, message: str) -> None:  # noqa: ANN401
    def factory(settings: ModelSettings) -> Mapping[str, nn.Module]:
        return {name: net} if name else net

    with pytest.raises(ValueError, match=message):
        AIR.from_settings(SETTINGS, factory)


def test_moments_of_batches_move_at_real_steps_only(images: Tensor) -> None:
    """Not where a step is captured for compilation."""
    decode = nn.Sequential(nn.Linear(5, 81), nn.BatchNorm1d(81))
    air = AIR(**vars(replace(SETTINGS, num_steps=1)), decode=decode)
    svi = make_svi(MarginalAIR(air), compiler=capture_only, module=air)
    with pyro.validation_enabled(False):
        for _ in range(3):
            svi.step(images)
    assert air.decode[1].num_batches_tracked == 3


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_script_adds_nothing_to_the_store(images: Tensor, tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(5, 81)).save(tmp_path / "decode.pt")
    infer(AIR(**vars(SETTINGS), decode=torch.jit.load(tmp_path / "decode.pt")), images)
    assert not pyro.get_param_store().keys()


class Locked(nn.Module):
    """A net that cannot be copied, because of its lock."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.lock = nn.Linear(5, 49), threading.Lock()

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z).sigmoid()


ODD_NETS = {
    "a lock": Locked,
    "weights that a hook computes": lambda: nn.utils.weight_norm(nn.Linear(5, 49)),
    "sizes by the first input": lambda: nn.Sequential(nn.LazyLinear(7), nn.Linear(7, 49)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", ODD_NETS)
def test_nets_that_cannot_be_copied_train(kind: str) -> None:
    air = small_air(decode=ODD_NETS[kind](), use_baselines=False)
    before = [parameter.clone() for parameter in air.decode.parameters()]
    svi = SVI(air.model, air.guide, pyro.optim.Adam({"lr": 1e-2}), TraceGraph_ELBO())
    svi.step(torch.rand(4, 12, 12))
    assert not any(map(torch.equal, before, air.decode.parameters()))


def test_what_needs_a_copy_says_so() -> None:
    air = small_air(decode=Locked())
    with pytest.raises(ValueError, match=r"the model: cannot be copied.*--added-scenes 0"):
        Teacher(air, 1.0)
    net = Locked()
    net.net = nn.Linear(144, 4)
    with pytest.raises(ValueError, match="embed: cannot be copied"):
        small_air(embed=net)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["-t 2", "-t 1 --estimator score --compile"])
def test_a_run_trains_resumes_loads_and_detects(
    flags: str, tmp_path: Path, environment: dict[str, str], succeeds: Run
) -> None:
    options: dict[str, Any] = {"nets": nets, "compiler": capture_only}
    line = f"{SMALL} {flags} --window-size 9"
    succeeds(f"{line} --output-dir whole -n 6", **options)
    succeeds(f"{line} --output-dir run -n 3", **options)
    succeeds("--resume run -n 6", **options)
    path = tmp_path / "run" / "checkpoint.pt"
    air, whole = (load_air(p, nets=nets) for p in (path, tmp_path / "whole" / "checkpoint.pt"))
    assert isinstance(air.encode, ConvEncoder)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, air.state_dict()[name]), name
    assert len(detect(air, torch.rand(2, 50, 50))) == 2
    with pytest.raises(CheckpointError, match="do not fit these settings and nets"):
        load_air(path)
    without = run("--resume run -n 8", tmp_path, environment)
    assert without.returncode == 2
    assert "do not fit these settings and nets: " in without.stderr


def test_running_statistics_are_loaded(tmp_path: Path) -> None:
    def factory(settings: ModelSettings) -> dict[str, nn.Module]:
        return {"embed": Narrow(settings)}

    air = AIR.from_settings(SETTINGS, factory)
    assert isinstance(air.embed, Narrow)
    air.embed.norm.running_mean += 3.0
    nets_of = {f"{name}_net": [200] for name in ("encoder", "decoder", "predict", "bl_predict")}
    path = save_checkpoint(air, tmp_path / "checkpoint.pt", window_size=9, **nets_of)
    loaded = load_air(path, nets=factory)
    assert torch.equal(loaded.embed.norm.running_mean, torch.full((6,), 3.0))
