"""Shared by tests: small models and trainers, scenes, servers, the program in this process."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import programs
import pyro
import pytest
import torch
from PIL import Image
from pyro.infer import TraceGraph_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, fx
from torch.nn.functional import affine_grid, grid_sample

from air import AIR
from air.data.scenes import Array, DataError
from air.data.synthetic.digits import MNIST_FILES
from air.evaluation.counting import CountScores
from air.evaluation.metrics import Evaluation, HeldOut
from air.marginal import MarginalAIR
from air.storage.checkpoint import FORMAT, load_weights_strict, read_weights, write_state
from air.training.compiled_svi import CompiledSVI, Compiler
from air.training.events import Progress
from air.training.svi import SVI, make_optimizer
from air.training.trainer import Trainer
from air.training.training_settings import TrainingSettings
from air.visualization.snapshots import InferredScenes, Snapshot

ROOT = Path(__file__).parent.parent
Run = Callable[..., subprocess.CompletedProcess[str]]  # of the fixture `succeeds`
SCENES = "--no-survey --num-scenes 300 --num-test-scenes 40"
SMALL = (
    f"{SCENES} -n 4 -b 8 --rnn-hidden-size 16 --encoder-latent-size 5 --encoder-net 12 "
    "--decoder-net 12 --predict-net 8 --bl-predict-net 8 --progress-every 2"
)


def small_air(**arguments: object) -> AIR:
    """A small AIR in which nothing is square by accident."""
    sizes = {
        **{"num_steps": 3, "x_size": 12, "window_size": 7, "z_what_size": 5},
        **{"rnn_hidden_size": 11, "encoder_net": [9], "decoder_net": [8], "predict_net": [6]},
        **{"bl_predict_net": [4]},
    }
    return AIR(**{**sizes, **arguments})  # type: ignore[arg-type]


SIZES = {  # of `small_air`, as flags
    "model_steps": 3, "window_size": 7, "encoder_latent_size": 5, "rnn_hidden_size": 11,
    "encoder_net": [9], "decoder_net": [8], "predict_net": [6], "bl_predict_net": [4],
}  # fmt: skip


def save_checkpoint(air: AIR, path: Path, **config: object) -> Path:
    """Writes a checkpoint with the parts that `load_air` needs."""
    settings = {**SIZES, "x_size": air.x_size, "channels": air.channels, **config}
    state = {"format": FORMAT, "step": 3, "config": settings, "optimizer": {}}
    write_state(path, {**state, "model": air.state_dict()})
    return path


def pixels_of(air: AIR) -> list[int]:
    """The shape of its images: [H, H] or [C, H, H]."""
    return [air.channels] * (air.channels > 1) + [air.x_size] * 2


def values(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(module: torch.nn.Module, before: dict[str, Tensor]) -> set[str]:
    """The names of parameters and buffers that have other values than before."""
    return {n for n, value in module.state_dict().items() if not torch.equal(value, before[n])}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def count_on(air: AIR, t: int, logit: float) -> None:
    """Makes the guide's z_pres the same for every image: on up to step t, then off."""
    with torch.no_grad():
        for parameter in air.predict.parameters():
            parameter.zero_()
        air.predict.mlp.seq[-1].bias[0] = logit


def exit_code(program: Callable[..., int | None], words: list[str], **options: Any) -> int:  # noqa: ANN401
    """Runs a program in this process."""
    try:
        return program(words, **options) or 0
    except SystemExit as ended:
        return int(ended.code or 0)


def run(
    line: str,
    folder: Path,
    environment: Mapping[str, str] = os.environ,
    program: Callable[..., int | None] | None = None,
    dpi: int | None = None,
    **options: Any,  # noqa: ANN401
) -> subprocess.CompletedProcess[str]:
    """Runs a program from flags to exit code in this process, which is faster than to start it.

    Args:
        line: Its flags.
        folder: Working folder.
        environment: Variables of its environment.
        program: A function `main`; None for that of main.py.
        dpi: Resolution of figures; without one, runs are not drawn.
        options: Of the function.
    """
    from air import viz
    from main import main  # here, for most tests do without

    program = program or main
    said, complained = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        mock.patch.dict(os.environ, environment),
        mock.patch("sys.argv", [f"{program.__module__.removeprefix('air.')}.py"]),
        mock.patch.object(viz, "DPI", dpi) if dpi else programs.draw_no_figures(),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(complained),
    ):
        code = exit_code(program, line.split(), **options)
    return subprocess.CompletedProcess(line, code, said.getvalue(), complained.getvalue())


def assert_refused(path: Path | str, problem: str, *ways: Callable[[], object]) -> None:
    """Each way ends with one line, which begins with the path and has the problem, a pattern."""
    for way in ways:
        with pytest.raises(DataError) as error:
            way()
        message = str(error.value)
        assert message.startswith(str(path)), message
        assert re.search(problem, message), message
        assert "\n" not in message


def broken_pipe() -> io.TextIOWrapper:
    """A stream into a pipe that nothing reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", buffering=1)


def write_idx(folder: Path, digits: list[Array], *, packed: bool = True) -> Path:
    """Writes digits in the form in which MNIST is published."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(MNIST_FILES, digits, strict=True):
        data = np.array([2048 + array.ndim, *array.shape], ">u4").tobytes() + array.tobytes()
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(data, 1) if packed else data)
    return folder


def make_scenes(count: int, steps: int = 3) -> InferredScenes:
    """Up to two rings in each scene, as busy as digits are."""
    rng = np.random.default_rng(0)
    images = np.zeros((count, 50, 50))
    boxes = np.full((count, steps, 4), np.nan, np.float32)
    counts = rng.integers(0, min(steps, 2) + 1, count)
    for i, objects in enumerate(counts):
        for step in range(objects):
            x, y = rng.integers(0, 29, 2)
            radius = np.hypot(*np.mgrid[-10:11, -10:11] / rng.uniform(0.6, 1, (2, 1, 1)))
            images[i, y : y + 21, x : x + 21] += np.exp(-((radius - 8) ** 2) / 2)
            boxes[i, step] = np.array([x, y, x + 21, y + 21]) + rng.normal(0, 1, 4)
    bytes_, doubled = ((255 * np.clip(k * images, 0, 1)).astype(np.uint8) for k in (1, 1.3))
    return InferredScenes(bytes_, doubled, boxes, counts, counts.copy())


def make_snapshot(step: int = 0, count: int = 20, steps: int = 3, wrong: int = 1) -> Snapshot:
    """Scenes of `make_scenes`, of which so many further ones are counted wrongly."""
    scenes, errors = make_scenes(count, steps), make_scenes(wrong, steps)
    apart = min(count, 5)
    rng = np.random.default_rng(step)
    return Snapshot(
        step,
        scenes,
        errors._replace(true_counts=errors.counts + 1),
        make_scenes(7, steps)._replace(true_counts=None),
        rng.integers(0, 255, (apart, steps, 9, 9), np.uint8),
        rng.integers(0, 255, (apart, steps, 50, 50), np.uint8),
        rng.uniform(size=(apart, steps)),
    )


def write_scenes(path: Path, size: int = 50) -> None:
    """Writes an .npz file of 60 images of noise."""
    np.savez(path, x=np.random.default_rng(0).integers(0, 255, (60, size, size), np.uint8))


def write_pictures(folder: Path) -> None:
    """Writes 20 RGBA pictures of noise, whose names tell a count."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 100, (20, 60, 70, 4), np.uint8)
    for k, each in enumerate(pixels):
        Image.fromarray(each).save(folder / f"{k}, {k % 3}-objects.png")


@contextlib.contextmanager
def visdom_server(
    folder: Path, port: int | None = None, site: Path | None = None, login: str | None = None
) -> Iterator[tuple[int, BaseProcess]]:
    """A real server, with its environments in that folder.

    Args:
        folder: For the environments.
        port: To listen at; None for a free one.
        site: Folder of a package visdom to take in place of the one installed.
        login: User and password, which are the same.
    """
    if port is None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
    (folder / ".visdom").mkdir(parents=True, exist_ok=True)  # for a cookie
    environment = {**os.environ, "HOME": str(folder)}
    arguments = serve_visdom, folder, port, site, login
    server = programs.start(*arguments, folder=folder, environment=environment)
    try:
        for _ in range(3000):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.01)
        yield port, server
    finally:
        server.kill()
        server.join()


def serve_visdom(folder: Path, port: int, site: Path | None, login: str | None) -> None:
    """Never ends."""
    if site:
        sys.path.insert(0, str(site))
    from visdom.server import run_server

    user = None
    if login:
        sent = hashlib.sha256(login.encode()).hexdigest()
        user = {"username": login, "password": run_server.hash_password(sent)}
        run_server.set_cookie(os.urandom(8).hex())
    run_server.start_server(
        port=port, env_path=str(folder), bind_local=True, base_url="", user_credential=user
    )


def panes(port: int, env: str) -> dict[str, Any]:
    """The panes of an environment on the server, by name; empty if there is no environment."""
    query = json.dumps({"win": None, "eid": env}).encode()
    try:
        return dict(json.loads(ask(f"{port}/win_data", query)))
    except urllib.error.HTTPError:
        return {}


def ask(url: str, body: bytes | None = None) -> str:
    """The answer of a server on this machine, at port/path."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"http://127.0.0.1:{url}", body, timeout=20) as answer:
        return str(answer.read().decode())


EVALUATION = Evaluation(
    elbo=630.12, elbo_se=0.5, log_likelihood=660.0, kl_pres=1.0, kl_where=9.0, kl_what=20.0,
    kl_background=2.0, count_histogram=[2, 0, 1], baseline_error=7.5,
    counts=CountScores(
        accuracy_mode=0.5, accuracy_sample=0.25, accuracy_within_one=0.75,
        accuracy_by_distance=[0.5, 0.75, 1.0], accuracy_by_overlap=[1.0, 0.5, None],
        calibration_error=0.125, reliability=[*[[0.0] * 3] * 9, [3.0, 0.96, 0.5]],
        confusion=[[1, 0, 0], [1, 0, 1]], miscounted=[1],
    ),
)  # fmt: skip


PROGRESS = Progress(20, 601.2, 0, 45.0, 1e-3, [1e-4, 1e-5], 1280.0, 20.0, 3.5)


RECORDS = [
    *({"step": step, "elbo": 400.0 + step, "grad_norm": float("inf")} for step in range(1, 21)),
    {
        "step": 10, "eval_elbo": 410.5, "accuracy_mode": 0.5, "baseline_error": 9.0,
        "accuracy_by_distance": [0.25, None, 0.75], "calibration_error": 0.25,
    },
    {
        "step": 20, "eval_elbo": 420.5, "count_histogram": [3, 0, 1], "confusion": [[3, 0], [0, 1]],
        "reliability": [*[[0, 0, 0]] * 8, [1, 0.85, 1.0], [2, 0.95, 0.5]],
    },
]  # fmt: skip


def squares(n: int, shape: tuple[int, int], side: int, most: int, channels: int = 1) -> Array:
    """Pictures with 0 to `most` bright squares that do not touch, [N, C, h, w]."""
    rng = np.random.default_rng(0)
    images = np.zeros((n, channels, *shape), np.uint8)
    cell = side + 2
    rows, columns = shape[0] // cell, shape[1] // cell
    for k, image in enumerate(images):
        for place in rng.permutation(rows * columns)[: k % (most + 1)]:
            y, x = cell * (place // columns), cell * (place % columns)
            level = rng.integers(128, 256, (channels, 1, 1), np.uint8)
            image[:, y : y + side, x : x + side] = level
    return images


SETTINGS = TrainingSettings(
    num_steps=12, batch_size=4, progress_every=3, eval_every=4, eval_scenes=5, save_every=5,
    anneal_prior="lin", anneal_prior_to=1e-3, anneal_prior_duration=10, z_pres_prior=0.5,
)  # fmt: skip


def load_weights(module: torch.nn.Module, path: Path) -> None:
    """Loads the weights in a checkpoint or a file of weights, as the program does."""
    load_weights_strict(module, read_weights(path)[0], path)


def capture_only(graph: fx.GraphModule) -> Any:  # noqa: ANN401
    """A compiler that runs the captured graph as it is: Inductor would take a minute."""
    return graph


def trainer(settings: TrainingSettings = SETTINGS, seed: int = 0, **options: Any) -> Trainer:  # noqa: ANN401
    torch.manual_seed(99)
    images, held_out, counts = torch.rand(20, 12, 12), torch.rand(7, 12, 12), torch.arange(7) % 3
    pyro.set_rng_seed(seed)
    return Trainer(small_air(), images, HeldOut(held_out, counts), settings, **options)


def run_until(running: Trainer, stop: int) -> list[Any]:
    """The events to the end of step `stop`, where the run ends as a signal would end it."""
    take_step = running._take_step

    def step_and_stop() -> None:
        take_step()
        running.stop_requested = running.step == stop

    running._take_step = step_and_stop  # type: ignore[method-assign]
    return list(running.train())


def saved(running: Trainer) -> dict[str, Any]:
    """The state of a run, gone through a file."""
    file = io.BytesIO()
    torch.save(running.state_dict(), file)
    file.seek(0)
    return dict(torch.load(file, weights_only=True))


def weights(done: Trainer) -> list[torch.Tensor]:
    return list(done.air.state_dict().values())


def make_svi(
    program: AIR | MarginalAIR,
    rates: tuple[float, float] = (0.01, 0.01),
    clip: float | None = None,
    compiler: Compiler | None = None,
    module: torch.nn.Module | None = None,
) -> SVI:
    """Our SVI, whose step is captured where there is a compiler."""
    optimizer = make_optimizer(air_of(program), *rates, clip)
    arguments = program.model, program.guide, optimizer, TraceGraph_ELBO()
    return CompiledSVI(*arguments, compiler, module) if compiler else SVI(*arguments)


def air_of(program: AIR | MarginalAIR) -> AIR:
    return program if isinstance(program, AIR) else program.air


def loss_and_gradients(
    program: AIR | MarginalAIR,
    images: Tensor,
    **options: Any,  # noqa: ANN401
) -> tuple[float, dict[str, Tensor]]:
    """Of Pyro's ELBO; afterwards no parameter has a gradient."""
    air = air_of(program)
    air.zero_grad()
    loss = TraceGraph_ELBO().loss_and_grads(program.model, program.guide, images, **options)
    found = {name: p.grad for name, p in air.named_parameters() if p.grad is not None}
    air.zero_grad()
    return float(loss), found


class GivenNoise(Messenger):
    """Draws latents from given noise, by their names: z_pres from uniform numbers, or by a count.

    Where the noise has no such name, or handlers inside have chosen a value, this one does nothing.
    """

    def __init__(self, noise: Mapping[str, Tensor], count: int | None = None) -> None:
        super().__init__()
        self.noise, self.count = noise, count

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name, fn = msg["name"], msg["fn"]
        if msg["value"] is not None:
            return
        if name.startswith("z_pres") and self.count is not None:
            on = float(self.count > int(name.rpartition("_")[2]))
            msg["value"], msg["done"] = torch.full_like(fn.mean, on), True
        elif name.startswith("z_pres") and name in self.noise:
            msg["value"], msg["done"] = (self.noise[name] < fn.mean).to(fn.mean.dtype), True
        elif name in self.noise:
            msg["value"], msg["done"] = fn.mean + fn.variance.sqrt() * self.noise[name], True


def by_grid_sample(pictures: Tensor, scale: Tensor, shift: Tensor, size: int) -> Tensor:
    """Squares of pictures, [B, (C,) H, H], by torch: place x is read at scale * x + shift."""
    pixels = pictures.reshape(len(pictures), -1, *pictures.shape[-2:])
    zero = torch.zeros_like(scale)
    rows = [torch.cat((scale, zero, shift[:, :1]), 1), torch.cat((zero, scale, shift[:, 1:]), 1)]
    shape = [*pixels.shape[:2], size, size]
    grid = affine_grid(torch.stack(rows, 1), shape, align_corners=False)
    sampled = grid_sample(pixels, grid, align_corners=False)
    return sampled.reshape(*pictures.shape[:-2], size, size)


def gradients(air: AIR) -> dict[str, Tensor]:
    found = {name: p for name, p in air.named_parameters() if p.grad is not None}
    assert all(p.grad.stride() == p.stride() for p in found.values())  # fused Adam goes by memory
    assert len({p.grad.data_ptr() for p in found.values()}) == len(found)  # clipped in place
    return {name: p.grad.clone() for name, p in found.items()}


@contextlib.contextmanager
def as_rank(rank: int, world_size: int = 2) -> Iterator[None]:
    """This process is one of several ranks, of which the others add nothing."""
    stand_ins = {
        "is_initialized": lambda: True,
        "get_rank": lambda: rank,
        "get_world_size": lambda: world_size,
        "all_reduce": lambda tensor: None,
    }
    with mock.patch.multiple("torch.distributed", **stand_ins):
        yield


PANES = {  # of the live page, without a model of the background
    "elbo", "kl", "accuracy", "inferred", "reconstructions", "objects", "scan", "prior_samples",
    "counts", "confusion", "errors", "grad_norm", "rates", "speed", "settings",
}  # fmt: skip


NAMES = {  # of the figures of a run
    "inputs", "inferred", "reconstructions", "objects", "scan", "prior_samples", "errors", "scenes",
    "curves",
}  # fmt: skip
