"""What each of two ranks computes in tests of training by several ranks."""

import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for scripts of tests/benchmarks
from air import AIR
from air.evaluation.metrics import HeldOut
from air.marginal import MarginalAIR
from air.training import trainer as trainer_module
from air.training.compiled_svi import Compiler
from air.training.ranks import any_rank, is_main, joined_ranks, rank, shard
from air.training.trainer import Trainer
from air.training.training_settings import TrainingSettings
from tests.helpers import GivenNoise, capture_only, make_svi, small_air

CASES = [("marginal", False), ("marginal", True), ("score", False)]  # estimator, captured
STEPS = {"marginal": 50, "score": 20}  # enough to learn; enough to learn a prior


def make_air() -> AIR:
    torch.manual_seed(3)
    return small_air(num_steps=2)


def data(size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Images, and noise for them."""
    drawn = torch.Generator().manual_seed(5)
    sizes = {"z_pres": 1, "z_where": 3, "z_what": 5}
    names = {f"{name}_{t}": k for (name, k), t in product(sizes.items(), range(2))}
    noise = {name: torch.rand(size, k, generator=drawn) for name, k in names.items()}
    noise |= {k: torch.special.ndtri(v) for k, v in noise.items() if not k.startswith("z_pres")}
    return torch.rand(size, 12, 12, generator=drawn), noise


def one_step(
    estimator: str, captured: bool, device: str = "cpu", compiler: Compiler = capture_only
) -> dict[str, Tensor]:
    """The gradients and the rest of a step on the part of 8 images that is this rank's."""
    images, noise = data(8)
    air = make_air().to(device)
    own_noise = {name: shard(values).to(device) for name, values in noise.items()}
    vars(air)["guide"] = GivenNoise(own_noise)(air.guide)
    program: Any = MarginalAIR(air) if estimator == "marginal" else air
    svi = make_svi(program, (1e-3, 1e-2), 50.0, compiler if captured else None)
    part = shard(images).to(device)
    loss = svi.step_async(part, num_images=3 * len(part))  # as if drawn from three times as many
    gradients = {name: p.grad for name, p in air.named_parameters() if p.grad is not None}
    others = {"loss": loss, "number": torch.as_tensor(svi.num_images), "norm": svi.grad_norm}
    return {**gradients, **others, **air.state_dict(prefix="after ")}


def make_trainer(num_steps: int, **settings: Any) -> Trainer:  # noqa: ANN401
    given = TrainingSettings(num_steps=num_steps, batch_size=4, eval_every=0, **settings)
    images = data(25)[0]
    return Trainer(make_air(), images, HeldOut(images[:3]), given)


def train(trainer: Trainer) -> Iterator[float]:
    """Trains to the end; the ELBOs on the way."""
    for event in trainer.train():
        yield from [event.elbo] if hasattr(event, "elbo") else []


def main(folder: Path) -> None:
    """Saves this rank's results into a folder."""
    torch.set_num_threads(1)
    pyro.enable_validation(False)  # a captured step has no values to look at
    trainer_module.LEARN_PRIOR_EVERY = 10
    with joined_ranks():
        found: dict[str, Any] = {str(case): one_step(*case) for case in CASES}
        for estimator, steps in STEPS.items():
            trainer = make_trainer(steps, estimator=estimator, learn_count_prior_from=20)
            found[f"elbos {estimator}"] = list(train(trainer))
            found[f"weights {estimator}"] = trainer.air.state_dict()
            found[f"prior {estimator}"] = trainer.prior.learnt
        found["drawn"] = torch.rand(4)
        uninterrupted, first, second = (make_trainer(n) for n in (10, 5, 10))
        list(train(uninterrupted))
        list(train(first))
        if is_main():  # writes the checkpoint, which all ranks read
            torch.save(first.state_dict(), folder / "state.pt")
        any_rank(False)  # waits for it
        second.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
        list(train(second))
        found |= {"uninterrupted": uninterrupted.air.state_dict()}
        found |= {"resumed": second.air.state_dict()}
        stopped = make_trainer(50, progress_every=7)
        if rank() == 1:
            stopped.request_stop()
        list(train(stopped))
        found["stopped"] = stopped.step, stopped.stopped
        torch.save(found, folder / f"{rank()}.pt")
