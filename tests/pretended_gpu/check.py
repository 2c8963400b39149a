"""The CUDA path of the program on a pretended GPU: checks that need no GPU, only a C++ compiler.

Run in a process of its own, into which the library of pretend_gpu.cpp was loaded before torch. It
prints one line of JSON for each check, its name, "ok", and if it failed a "detail".
"""

import gc
import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import pyro
import torch
from helpers import SETTINGS, capture_only, small_air
from pretended_gpu.gpu import (
    GPU,
    STEPS,
    EveryNumberIsOne,
    NothingCrosses,
    PretendedGPU,
    pretended,
)
from pyro.infer import TraceGraph_ELBO
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from air import AIR
from air.evaluation.collapse import first_not_finite
from air.evaluation.elbo import importance_weighted_bound, sample_elbo
from air.evaluation.metrics import HeldOut
from air.inference import infer, sample_prior
from air.marginal import MarginalAIR
from air.priors import AnnealedPresencePrior
from air.training.compiled_svi import WARMUP_STEPS, CompiledSVI, RecordingError
from air.training.events import Evaluated, Progress
from air.training.svi import SVI, make_optimizer
from air.training.trainer import Trainer
from air.visualization.snapshots import take_snapshot

ESTIMATORS = ("marginal", "score")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # estimator, and arguments of AIR
    "marginal": ("marginal", {}),
    "score": ("score", {}),
    "marginal, guide difference": ("marginal", {"guide_input": "difference"}),
    "score, guide difference": ("score", {"guide_input": "difference"}),
    "marginal, guide glimpse": ("marginal", {"guide_input": "glimpse"}),
    "marginal, likelihood bernoulli": ("marginal", {"likelihood": "bernoulli"}),
    "score, likelihood bernoulli": ("score", {"likelihood": "bernoulli"}),
    "marginal, three channels": ("marginal", {"channels": 3}),
    "score, three channels": ("score", {"channels": 3}),
    "marginal, convolutions": ("marginal", {"embed_channels": [2, 3]}),
    "marginal, background": ("marginal", {"background_model": "vae", "likelihood_sd": "learn"}),
    "score, no masking": ("score", {"use_masking": False}),
    "score, no baselines": ("score", {"use_baselines": False}),
    "marginal, no baselines": ("marginal", {"use_baselines": False}),
}
CAPTURED = partial(CompiledSVI, compiler=capture_only)

CHECKS: dict[str, Callable[[], None]] = {}
Check = Callable[..., None]


def check(*cases: str | tuple[str, ...]) -> Callable[[Check], Check]:
    """Registers a check under its name; with cases, once for each of them, its argument."""

    def register(function: Check) -> Check:
        name = function.__name__.replace("_", " ")
        if not cases:
            CHECKS[name] = function
        for case in cases:
            label = case if isinstance(case, str) else ", ".join(case)
            CHECKS[f"{name}: {label}"] = partial(function, case)
        return function

    return register


def make_svi(
    estimator: str,
    *,
    kind: Callable[..., SVI] = SVI,
    device: torch.device = GPU,
    clip_grad_norm: float | None = None,
    frozen: tuple[str, ...] = (),
    **options: Any,  # noqa: ANN401  # of SVI
) -> tuple[AIR, SVI]:
    """A model on the device, and its SVI."""
    with torch.device(device):  # `AIR.to` cannot move fake parameters
        air = small_air(num_steps=STEPS)
    freeze(air, *frozen)
    program = MarginalAIR(air) if estimator == "marginal" else air
    optimizer = make_optimizer(air, 1e-3, 1e-2, clip_grad_norm)
    return air, kind(program.model, program.guide, optimizer, TraceGraph_ELBO(), **options)


def make_images(number: int = 100, channels: int = 1, device: torch.device = GPU) -> Tensor:
    shape = [number, 12, 12] if channels == 1 else [number, channels, 12, 12]
    return torch.zeros(shape, dtype=torch.uint8, device=device)


def make_prior(device: torch.device = GPU) -> AnnealedPresencePrior:
    return AnnealedPresencePrior([0.5] * STEPS, "lin", 1e-3, 0, 10, device)


def freeze(air: AIR, *prefixes: str) -> None:
    """Freezes the parameters whose names begin so, and no others."""
    for name, parameter in air.named_parameters():
        parameter.requires_grad_(not name.startswith(prefixes))


def take_steps(svi: SVI, data: Tensor, prior: AnnealedPresencePrior, number: int) -> Tensor:
    """Some steps, between which rates and prior change in place; the last loss."""
    for step in range(number):
        with NothingCrosses():
            prior.set_step(step + 1)
            for group in svi.optim.param_groups:
                group["lr"].fill_(0.1 / (step + 1))
            loss = svi.step_async(data, batch_size=7, z_pres_prior_p=prior)
    return loss


def trained_names(air: AIR, stepped: Sequence[Sequence[Tensor]]) -> list[str]:
    """The parameters in some calls of fused Adam."""
    names = {id(parameter): name for name, parameter in air.named_parameters()}
    return sorted(names[id(parameter)] for params in stepped for parameter in params)


def expected_names(air: AIR, estimator: str, *frozen: str) -> list[str]:
    unused = ("bl_",) if estimator == "marginal" else ()  # the baseline
    names = (name for name, _ in air.named_parameters())
    return sorted(name for name in names if not name.startswith(frozen + unused))


def assert_captured_once(svi: SVI) -> fx.GraphModule:
    assert isinstance(svi, CompiledSVI)
    (graph,) = svi._compiled.values()
    assert isinstance(graph, fx.GraphModule), "the step runs uncompiled"
    return graph


def assert_on_gpu(*values: object) -> None:
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    assert tensors
    for tensor in tensors:
        assert tensor.device == GPU, f"a result is on {tensor.device}"


@check(*ESTIMATORS)
def eager_step(estimator: str) -> None:
    with pretended(estimator) as gpu:
        air, svi = make_svi(estimator)
        loss = take_steps(svi, make_images(), make_prior(), 2)
        calls = len(gpu.stepped) // 2
        for stepped in (gpu.stepped[:calls], gpu.stepped[calls:]):
            assert trained_names(air, stepped) == expected_names(air, estimator)
        assert_on_gpu(loss, svi.skipped, svi.grad_norm, svi.stats.sums, [*air.parameters()])


@check(*ESTIMATORS)
def eager_step_on_one_batch_of_many_images(estimator: str) -> None:
    with pretended(estimator):
        _, svi = make_svi(estimator)
        images = make_images(7)
        with NothingCrosses():
            assert_on_gpu(svi.step_async(images, num_images=100))


@check(*ESTIMATORS)
def clipped_step(estimator: str) -> None:
    with pretended(estimator) as gpu:
        air, svi = make_svi(estimator, clip_grad_norm=10.0)
        take_steps(svi, make_images(), make_prior(), 1)
        assert trained_names(air, gpu.stepped) == expected_names(air, estimator)


@check(*product(ESTIMATORS, ("one graph", "two graphs")))
def recorded_step(case: tuple[str, str]) -> None:
    estimator, number = case
    with pretended(estimator) as gpu:

        def all_reduce(tensor: Tensor) -> None:
            assert gpu.recording is None, "an all_reduce in a recording"
            gpu.replayed.append("all_reduce")
            tensor.mul_(2)

        air, svi = make_svi(
            estimator,
            kind=CAPTURED,
            clip_grad_norm=10.0,
            all_reduce=all_reduce if number == "two graphs" else None,
        )
        data, prior = make_images(), make_prior()
        take_steps(svi, data, prior, WARMUP_STEPS - 1)
        assert not gpu.graphs, "recorded before all was built"
        stepped = len(gpu.stepped)
        take_steps(svi, data, prior, 1)
        graphs = list(gpu.graphs)
        assert len(graphs) == (2 if number == "two graphs" else 1)
        for graph in graphs:
            assert graph.mode == "thread_local", f"other threads may not go on: {graph.mode!r}"
            assert graph.recorded_on == GPU.index, "another device than the data's was current"
        for graph in graphs[1:]:
            assert graph.pools == (graphs[0].pool(),), "the graphs of a step share no memory"
        assert gpu.device == 0, "the device that was current is not so again"
        assert not any(group["capturable"] for group in svi.optim.param_groups), "still capturable"
        # The third step and the recorded one, which hold the update of the same parameters.
        names = trained_names(air, gpu.stepped[stepped:])
        assert names == sorted(2 * expected_names(air, estimator))

        stepped = len(gpu.stepped)
        gpu.replayed.clear()
        loss = take_steps(svi, data, prior, 2)
        once = [graphs[0], "all_reduce", graphs[1]] if number == "two graphs" else graphs
        assert gpu.replayed == 2 * once
        assert len(gpu.stepped) == stepped, "a replay also ran the step"
        assert gpu.graphs == graphs, "recorded again"
        assert_on_gpu(loss, svi.skipped, svi.grad_norm)
        assert_captured_once(svi)


@check()
def other_data_is_recorded_too() -> None:
    with pretended("marginal", warmup_steps=1) as gpu:
        _, svi = make_svi("marginal", kind=CAPTURED)
        data, other, prior = make_images(), make_images(), make_prior()
        take_steps(svi, data, prior, 1)
        take_steps(svi, other, prior, 1)
        first, second = gpu.graphs
        assert_captured_once(svi)  # the program, which is that of any such data
        for images in (data, other, data):
            take_steps(svi, images, prior, 1)
        assert gpu.replayed == [first, second, first]


@check(*ESTIMATORS)
def the_graph_is_that_of_the_cpu(estimator: str) -> None:
    """What is compiled on a GPU is what other tests compare with eager steps on the CPU."""
    programs = []
    for device in (torch.device("cpu"), GPU):
        with pretended(estimator, device):
            _, svi = make_svi(estimator, kind=CAPTURED, device=device, clip_grad_norm=10.0)
            images, prior = make_images(device=device), make_prior(device)
            # On the CPU the step reads whether it is to be skipped.
            with EveryNumberIsOne() if device.type == "cpu" else NothingCrosses():
                svi.step_async(images, batch_size=7, z_pres_prior_p=prior)
            nodes = [str(node.format_node()) for node in assert_captured_once(svi).graph.nodes]
            programs.append([node.replace(f"device: {device}", "device") for node in nodes])
    on_cpu, on_gpu = programs
    for one, other in zip(on_cpu, on_gpu, strict=False):
        assert one == other, f"on the CPU {one}, on the GPU {other}"
    assert len(on_cpu) == len(on_gpu) > 500


@check(("marginal", "eager"), ("score", "eager"), ("marginal", "captured"))
def step_of_which_a_part_is_frozen(case: tuple[str, str]) -> None:
    """Frozen before the optimiser is made, and others on the way."""
    estimator, how = case
    kind = SVI if how == "eager" else CAPTURED
    with pretended(estimator) as gpu:
        air, svi = make_svi(estimator, kind=kind, frozen=("decode.",))
        data, prior = make_images(), make_prior()
        for frozen in ("decode.", "encode."):
            freeze(air, frozen)
            gpu.stepped.clear()
            take_steps(svi, data, prior, 1)
            assert trained_names(air, gpu.stepped) == expected_names(air, estimator, frozen)


@check("one graph", "two graphs")
def a_recording_that_fails_names_the_cause(number: str) -> None:
    with pretended("marginal", warmup_steps=1) as gpu:

        def fails(*_: object, **__: object) -> None:
            if gpu.recording is not None:
                gpu.recording.failed = True
                raise RuntimeError("the root of all evil\nand a long story")

        all_reduce = None if number == "one graph" else lambda tensor: tensor.mul_(2)
        _, svi = make_svi("marginal", kind=CAPTURED, all_reduce=all_reduce)
        try:
            with mock.patch("torch._fused_adam_", fails):
                take_steps(svi, make_images(), make_prior(), 1)
        except RecordingError as error:
            message = str(error)
        else:
            raise AssertionError("no RecordingError")
        assert message == "no CUDA graph of the step: RuntimeError: the root of all evil", message
        assert gpu.device == 0
        assert not any(group["capturable"] for group in svi.optim.param_groups), "still capturable"


@contextmanager
def pretended_trainer(
    variant: str,
    warmup_steps: int = WARMUP_STEPS,
    **settings: Any,  # noqa: ANN401
) -> Iterator[tuple[PretendedGPU, Callable[..., Trainer]]]:
    """A pretended GPU and what makes a trainer on it, whose held-out scenes are on the host."""
    estimator, arguments = VARIANTS[variant]
    given = {"estimator": estimator, "lr_schedule": "cosine", "background_steps": 1, **settings}
    with pretended(estimator, warmup_steps=warmup_steps) as gpu:

        def make(*, captured: bool = False) -> Trainer:
            pyro.clear_param_store()
            with torch.device(GPU):
                air = small_air(num_steps=STEPS, **arguments)
            host = torch.device("cpu")
            scenes = make_images(7, air.channels, host)
            # Without boxes and overlaps, whose scores the host computes, and from their values.
            held_out = HeldOut(scenes, torch.zeros(7, dtype=torch.long, device=host))
            images = make_images(channels=air.channels)
            own = replace(SETTINGS, compile=captured, **given)
            return Trainer(air, images, held_out, own, compiler=capture_only)

        yield gpu, make


@check(*VARIANTS)
def trainers_step(variant: str) -> None:
    with pretended_trainer(variant) as (gpu, make):
        trainer = make()
        steps = 1 if trainer.air.background is None else 2  # the first trains the background alone
        for _ in range(steps):
            with NothingCrosses():
                trainer._take_step()
        assert gpu.stepped
        assert_on_gpu(trainer.stats.sums, [*trainer.air.parameters()])


@check()
def added_scenes() -> None:
    """They are made on the device, uncompiled and in a recorded step."""
    settings = {"warmup_steps": 1, "added_scenes": 5.0, "added_scenes_from": 1}
    with pretended_trainer("marginal", **settings) as (gpu, make):
        for captured in (False, True):
            trainer = make(captured=captured)
            for _ in range(3):  # without and with weight; when captured, recorded and replayed
                with NothingCrosses():
                    trainer._take_step()
        assert len(gpu.graphs) == 1


@check(*(variant for variant in VARIANTS if variant.startswith("score")))
def evaluation(variant: str) -> None:
    """Copies and reads are meant here; only devices must not be mixed."""
    with pretended_trainer(variant) as (_, make), EveryNumberIsOne():
        trainer = make()
        air, images, prior = trainer.air, trainer.images[:5], trainer.prior
        with NothingCrosses():
            assert_on_gpu(infer(air, images))
            assert_on_gpu(air.prior(5), air.prior(5, prior))
        assert_on_gpu(sample_elbo(air, images, prior), sample_elbo(air, images))
        assert_on_gpu(importance_weighted_bound(air, images, 1, prior))
        assert_on_gpu(sample_prior(air, 5, seed=0))
        on_host = torch.zeros(3, *images.shape[1:], device="cpu")  # of floats, whose range is read
        assert_on_gpu(infer(air, on_host), sample_elbo(air, on_host))
        assert first_not_finite(air, images, prior) == "a sample"
        trainer._learn_count_prior()
        found = trainer.evaluate(7, iwae_samples=1, iwae_scenes=5)
        assert found.result.bound is not None
        snapshot = take_snapshot(air, trainer.held_out, 0, seed=0, miscounted=[1, 2])
        assert snapshot.scenes.images.shape[0] == 7


@check("marginal")  # one of the two, for the sake of time
def training_from_start_to_end(estimator: str) -> None:
    settings = {"num_steps": WARMUP_STEPS + 2, "progress_every": 3, "eval_every": 4}
    with pretended_trainer(estimator, **settings) as (gpu, make), EveryNumberIsOne():
        events = list(make(captured=True).train())
    kinds = [type(event) for event in events]
    assert kinds.count(Progress) == 2
    assert kinds.count(Evaluated) == 2
    (graph,) = gpu.graphs
    assert gpu.replayed == [graph] * 2


@check("score")  # which has two groups of parameters, and so two rates
def resumed_training(estimator: str) -> None:
    """A checkpoint is read onto the host; from there all must find its way to the GPU."""
    with pretended_trainer(estimator, warmup_steps=1) as (gpu, make):
        stopped = make()
        stopped._take_step()
        with EveryNumberIsOne():
            state = stopped.state_dict()
        state = tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, state)
        resumed = make(captured=True)
        with EveryNumberIsOne():
            resumed.load_state_dict(state)
        restored = trained_names(resumed.air, [[*resumed.optimizer.state]])
        assert restored == expected_names(resumed.air, estimator)
        for moments in resumed.optimizer.state.values():
            assert_on_gpu(moments)
        with NothingCrosses():
            resumed._take_step()
            resumed._take_step()
        assert gpu.replayed == gpu.graphs
        # Its own state, loaded into the same trainer: a recorded step holds the former moments.
        with EveryNumberIsOne():
            resumed.load_state_dict(state)
        resumed._take_step()
        assert len(gpu.replayed) == 1, "replayed what writes to moments that are no more in use"


def main() -> None:
    """Runs all checks."""
    pyro.enable_validation(False)  # as the program does
    torch.set_num_threads(1)
    gc.freeze()  # so that recording, which collects garbage, does not look through all of torch
    for name, function in CHECKS.items():
        outcome: dict[str, Any] = {"name": name, "ok": True}
        try:
            function()
        except Exception:  # whatever it is, the test of that name shows it
            outcome = {"name": name, "ok": False, "detail": traceback.format_exc()}
        print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main()
