"""The tutorial runs, its page shows what it prints, and it computes what the package computes."""

import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import matplotlib.pyplot as plt
import pyro
import pytest
import torch
from helpers import GivenNoise
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from torch import Tensor

from air import AIR
from air.marginal import MarginalAIR
from air.tutorial.render import PAGE, SOURCE, pictures_of, render_page, run_cells, split_cells

CELLS = split_cells(SOURCE.read_text("utf-8"))
RIGHT = r"([\d.]+) % are counted right"


class Run(NamedTuple):
    names: dict[str, Any]  # what the tutorial defines
    outputs: list[str]
    folder: Path


def run_tutorial(folder: Path, **environment: str) -> Run:
    environment |= {"AIR_TUTORIAL_FOLDER": str(folder)}
    with mock.patch.dict(os.environ, environment), plt.rc_context(), torch.random.fork_rng():
        names, outputs = run_cells(CELLS)
    plt.close("all")
    return Run(names, outputs, folder)


@pytest.mark.slow
def test_a_quick_run(tmp_path: Path, environment: dict[str, str]) -> None:
    """One run serves all that needs one, since it takes half a minute."""
    quick = run_tutorial(tmp_path, AIR_TUTORIAL_QUICK="1", AIR_CACHE=environment["AIR_CACHE"])
    check_that_the_page_shows_what_the_code_prints(quick)
    check_that_every_picture_is_drawn_and_on_the_page(quick)
    for estimator in ("score", "exact"):
        pyro.clear_param_store()
        check_that_elbo_and_gradients_are_those_of_the_package(estimator, quick)


def without_outputs(page: str) -> str:
    return re.sub(r"^```text\n.*?^```\n\n?", "", page, flags=re.MULTILINE | re.DOTALL).strip()


def without_numbers(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"-?(\d[\d.,]*|nan)", "#", text)).strip()


def test_the_page_shows_the_text_and_the_code() -> None:
    page = render_page(CELLS, [""] * len(CELLS))
    assert without_outputs(PAGE.read_text("utf-8")) == page.strip()


def check_that_the_page_shows_what_the_code_prints(quick: Run) -> None:
    """Its numbers are those of a complete run."""
    shown = re.findall(r"^```text\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    printed = [output for output in quick.outputs if output]
    assert [*map(without_numbers, shown)] == [*map(without_numbers, printed)]


def check_that_every_picture_is_drawn_and_on_the_page(quick: Run) -> None:
    names = [name for cell in CELLS for name in pictures_of(cell)]
    assert len(names) > 8
    assert sorted(names) == sorted(path.stem for path in quick.folder.iterdir())
    assert sorted(names) == sorted(path.stem for path in PAGE.parent.glob("*.png"))
    assert all((PAGE.parent / f"{name}.png").stat().st_size < 100_000 for name in names)


def test_what_the_page_says_of_its_results() -> None:
    page = PAGE.read_text("utf-8")
    assert float(re.findall(RIGHT, page)[-1]) >= 95
    share = re.search(r"the exact expectation has ([\d.]+) of the standard deviation", page)
    assert float(share[1]) <= 0.5
    ours, black = map(float, re.findall(r"ELBO (\d+) nats, of black canvases (\d+)", page)[0])
    assert ours > black + 50


PAIRS = (  # parameters of the package, and of the tutorial
    ("decode.mlp.seq", "air.decode.net"), ("predict.mlp.seq", "air.predict.net"),
    ("encode.mlp.seq", "air.encode.net"), ("h_init", "air.lstm.h_init"),
    ("c_init", "air.lstm.c_init"), ("z_where_init", "air.z_where_init"),
    ("z_what_init", "air.z_what_init"), ("bl_predict.seq", "baseline.value"),
    ("bl_h_init", "baseline.lstm.h_init"), ("bl_c_init", "baseline.lstm.c_init"),
)  # fmt: skip


def to_tutorial(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The package's weights, or their gradients, under the tutorial's names and in its shapes."""
    moved = {}
    for name, value in values.items():
        for ours, theirs in PAIRS:
            if name == ours or name.startswith(f"{ours}."):
                moved[theirs + name.removeprefix(ours)] = value
    for ours, theirs in (("rnn", "air.lstm"), ("bl_rnn", "baseline.lstm")):
        if f"{ours}.weight_ih" not in values:
            continue
        of_inputs = values[f"{ours}.weight_ih"]
        moved[f"{theirs}.see.weight"] = of_inputs[:, :2500]
        moved[f"{theirs}.recall.weight"] = torch.cat(
            (of_inputs[:, 2500:], values[f"{ours}.weight_hh"]), 1
        )
        moved[f"{theirs}.see.bias"] = values[f"{ours}.bias_ih"]
    return moved


def check_that_elbo_and_gradients_are_those_of_the_package(estimator: str, quick: Run) -> None:
    names, n = quick.names, 12
    x = names["test_x"][:n]
    ours, air, baseline = AIR(), names["AIR"](), names["Baseline"]()
    with torch.no_grad():
        for bias in (ours.rnn.bias_hh, ours.bl_rnn.bias_hh):  # the tutorial has one bias
            bias.zero_()
    both = torch.nn.ModuleDict({"air": air, "baseline": baseline})
    both.load_state_dict(to_tutorial(ours.state_dict()))
    noise = {f"z_pres_{t}": torch.rand(n, 1) for t in range(3)}
    noise |= {f"z_where_{t}": torch.randn(n, 3) for t in range(3)}
    noise |= {f"z_what_{t}": torch.randn(n, 50) for t in range(3)}
    with GivenNoise(noise), pyro.validation_enabled(False), pytest.MonkeyPatch.context() as patch:
        if estimator == "score":
            loss = TraceGraph_ELBO()
            mine = loss.loss_and_grads(ours.model, ours.guide, x)
            theirs = loss.loss_and_grads(names["model"], names["guide"], air, x, baseline)
        else:
            exact = MarginalAIR(ours)  # whose sites are hidden from handlers outside
            patch.setattr(ours, "guide", GivenNoise(noise)(ours.guide))
            mine = Trace_ELBO().loss_and_grads(exact.model, exact.guide, x)
            of_tutorial = -names["exact_elbo"](air, x).sum()
            of_tutorial.backward()
            theirs = of_tutorial.item()

    assert math.isclose(mine, theirs, rel_tol=1e-5)
    expected = {k: p.grad for k, p in ours.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in both.named_parameters() if p.grad is not None}
    assert len(found) > (20 if estimator == "score" else 12)
    expected = to_tutorial(expected)
    for name, gradient in found.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(
            gradient, expected[name], atol=1e-4 * scale + 1e-6, rtol=1e-3, msg=name
        )


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("AIR_TUTORIAL_WHOLE") != "1",
    reason="takes minutes; AIR_TUTORIAL_WHOLE=1 runs it",
)
@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_the_whole_tutorial_counts_95_percent_right(seed: str, tmp_path: Path) -> None:
    outputs = run_tutorial(tmp_path, AIR_TUTORIAL_SEED=seed).outputs
    assert float(re.findall(RIGHT, "".join(outputs))[-1]) >= 95
