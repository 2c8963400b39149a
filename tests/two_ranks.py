"""What tests of training by two processes run under torchrun; each rank saves what it found.

torchrun --nproc-per-node 2 tests/two_ranks.py FOLDER
"""

import io
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, redirect_stderr
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceGraph_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, this is not a package
from air.training.parallel import ProcessGroup, process_group

import main as program
from air import AIR
from air.cli.flags import build_parser
from air.evaluation.metrics import HeldOut
from air.marginal import MarginalAIR
from air.training import trainer as trainer_module
from air.training.compiled_svi import CompiledSVI, inductor
from air.training.settings import TrainingSettings
from air.training.svi import SVI, make_optimizer
from air.training.trainer import Trainer

CASES = list(product(("marginal", "score"), (False, True)))  # estimator, captured
STEPS = 50


class GivenNoise(Messenger):
    """Draws each image's samples by noise that goes with the image, [B, size] for each site."""

    def __init__(self, noise: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.noise = noise

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.noise and not msg["done"]:
            fn, noise = msg["fn"], self.noise[msg["name"]]
            while hasattr(fn, "base_dist"):
                fn = fn.base_dist
            if isinstance(fn, dist.Normal):
                msg["value"] = fn.loc + fn.scale * torch.special.ndtri(noise)
            else:
                msg["value"] = (noise < fn.probs).float()
            msg["done"] = True


def small_air() -> AIR:
    torch.manual_seed(3)
    return AIR(num_steps=2, x_size=12, window_size=7, z_what_size=5, rnn_hidden_size=11,
               encoder_net=[9], decoder_net=[8], predict_net=[6], bl_predict_net=[4])  # fmt: skip


def data(size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Images, and noise for them."""
    drawn = torch.Generator().manual_seed(5)
    sizes = {"z_pres": 1, "z_where": 3, "z_what": 5}
    names = {f"{name}_{t}": k for (name, k), t in product(sizes.items(), range(2))}
    noise = {name: torch.rand(size, k, generator=drawn) for name, k in names.items()}
    return torch.rand(size, 12, 12, generator=drawn), noise


def one_step(estimator: str, captured: bool, group: ProcessGroup) -> dict[str, Tensor]:
    """The gradients and the rest of a step on the part of 8 images that is this rank's."""
    images, noise = data(8)
    air = small_air()
    program: Any = MarginalAIR(air) if estimator == "marginal" else air
    guide = GivenNoise({name: group.shard(values) for name, values in noise.items()})(program.guide)
    kind: Any = partial(CompiledSVI, compiler=lambda graph: graph) if captured else SVI
    optimizer = make_optimizer(air, 1e-3, 1e-2, clip_grad_norm=50.0)
    svi = kind(program.model, guide, optimizer, TraceGraph_ELBO(), all_reduce=group.all_reduce)
    part = group.shard(images)
    loss = svi.step_async(part, num_images=3 * len(part))  # as if drawn from three times as many
    gradients = {name: p.grad for name, p in air.named_parameters() if p.grad is not None}
    others = {"loss": loss, "number": torch.as_tensor(svi.num_images), "norm": svi.grad_norm}
    return {**gradients, **others, **air.state_dict(prefix="after ")}


def make_trainer(num_steps: int, group: ProcessGroup, **settings: Any) -> Trainer:  # noqa: ANN401
    given = TrainingSettings(num_steps=num_steps, batch_size=4, eval_every=0, **settings)
    images = data(25)[0]
    return Trainer(small_air(), group.shard(images), HeldOut(images[:3]), given, group)


def train(trainer: Trainer) -> Iterator[float]:
    """Trains to the end; the ELBOs on the way."""
    for event in trainer.train():
        yield from [event.elbo] if hasattr(event, "elbo") else []


def refuse(group: ProcessGroup, folder: Path) -> tuple[Any, str]:
    """The exit code and the words of main.py on data that rank 1 alone lacks."""
    path = folder / f"scenes-{group.rank}.npz"
    if group.is_main:
        np.savez(path, x=np.eye(12, dtype=np.uint8)[None].repeat(30, 0) * 255)
    parser, said = build_parser(quiet=not group.is_main), io.StringIO()
    context = program.Context(group, nets=None, compiler=inductor)
    with ExitStack() as exit_stack, redirect_stderr(said):
        try:
            program.prepare(parser, {"data": str(path)}, context, None, exit_stack)
        except SystemExit as ended:
            return ended.code, said.getvalue()
    return 0, said.getvalue()


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    pyro.enable_validation(False)  # a captured step has no values to look at
    trainer_module.LEARN_PRIOR_EVERY = 10
    with process_group() as group:
        found: dict[str, Any] = {str(case): one_step(*case, group) for case in CASES}
        for estimator in ("marginal", "score"):
            trainer = make_trainer(STEPS, group, estimator=estimator, learn_count_prior_from=20)
            found[f"elbos {estimator}"] = list(train(trainer))
            found[f"weights {estimator}"] = trainer.air.state_dict()
            found[f"prior {estimator}"] = trainer.learnt_prior
        whole, first, second = (make_trainer(n, group) for n in (10, 5, 10))
        list(train(whole))
        list(train(first))
        saved = group.all_gather(first.state_dict())[0]  # the checkpoint that rank 0 writes
        second.load_state_dict(saved)  # and all ranks read
        list(train(second))
        found |= {"whole": whole.air.state_dict(), "second": second.air.state_dict()}
        found |= {"state": saved, "drawn": torch.rand(4)}
        with group.main_first():
            if group.is_main:
                time.sleep(0.2)
            found["ran first"] = time.monotonic()
        found["gathered"] = group.all_gather({"rank": group.rank})
        found["refused"] = refuse(group, folder)
        torch.save(found, folder / f"{group.rank}.pt")


if __name__ == "__main__":
    main()
