"""Learns to count and find the digits in multi-MNIST scenes, with no labels: AIR in Pyro.

    python main.py                       the best recipe known: minutes on two CPU cores
    python main.py -n 3000 --seed 1      fewer steps, another seed
    python main.py --resume runs/RUN     goes on with a run that was interrupted

The model is in ``air/``, its nets in ``modules.py``, the scenes in ``multi_mnist.py``.
"""

import logging
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pyro
import torch
from tqdm import tqdm

import multi_mnist
import viz
from air import AIR, flags
from air.checkpoint import CheckpointError, RunFolder, fit_weights, load_weights, save_weights
from air.evaluation import HeldOut, forked_rng, infer
from air.priors import geometric_count_prior
from air.spatial_transformer import window_boxes
from air.training import CheckpointDue, Evaluated, Progress, Trainer, TrainingSettings
from multi_mnist import SceneSettings

PICTURES = 64  # held-out scenes in the figures
QUIET_SECONDS = 10.0  # between progress lines where there is no terminal for a progress bar

Config = dict[str, Any]  # every flag's value by name

# The settings of the scenes and their flags: --seed is that of training here.
SCENE_FLAGS = {
    field.name: "data_seed" if field.name == "seed" else field.name
    for field in fields(SceneSettings)
}
DEFAULTS: Config = {
    **flags.DEFAULTS,
    **{flag: getattr(SceneSettings(), name) for name, flag in SCENE_FLAGS.items()},
    **dict.fromkeys(("cache_dir", "mnist_dir")),
}


class Session(NamedTuple):
    """All that training needs."""

    config: Config
    data_sha256: str
    trainer: Trainer
    run: RunFolder
    dashboard: viz.Dashboard | None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    parser = build_parser()
    given = vars(parser.parse_args(argv))
    try:
        save_as = given.get("save")
        if save_as and Path(save_as).exists() and "resume" not in given:
            raise ValueError(f"--save never overwrites, and {save_as} exists; name another file")
        session = prepare(given)
    except (ValueError, ConnectionError, ModuleNotFoundError) as error:  # what the user can mend
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted before training began\n")
    try:
        return train(session)
    except FloatingPointError as error:
        parser.exit(1, f"{parser.prog}: error: {error}; the last checkpoint is whole\n")


def build_parser() -> flags.Parser:
    """A parser of all flags."""
    parser = flags.build_parser(__doc__ or "")
    multi_mnist.add_arguments(parser, seed_flag="--data-seed")
    return parser


def prepare(given: Config) -> Session:
    """From the flags given to everything in place; writes nothing before all has been checked.

    Raises:
        ValueError: If flags, data or files do not fit; the message is one line for the user.
        ConnectionError: If visdom is asked for and no server answers.
    """
    config, state, run = flags.plain({**DEFAULTS, **given}), None, None
    if config["resume"]:
        run = RunFolder.open(Path(config["resume"]))
        state = run.load()
        config = flags.merge_resumed(state["config"], flags.plain(given))
    device = flags.pick_device(config["device"])
    scenes = load_scenes(config)
    trainer = build_trainer(config, scenes, device)
    if run and state:
        if state["data_sha256"] != scenes.sha256:
            raise CheckpointError(f"{run.path} was trained on other scenes than these")
        fit_weights(trainer.air, state["model"], run.checkpoint)
        trainer.load_state_dict(state)
        if trainer.step > config["num_steps"]:
            raise ValueError(
                f"--num-steps must be at least the {trainer.step} that {run.path} has taken, "
                f"got {config['num_steps']}"
            )
    dashboard = viz.Dashboard(config["visdom_env"]) if config["viz"] else None
    if run is None:
        output_dir = config["output_dir"]
        run = RunFolder.create(output_dir and Path(output_dir), config["seed"])
    run.rewind_metrics(trainer.step)
    about = {"data_sha256": scenes.sha256, "versions": versions()}
    run.write_json("config.json", {**config, **about})
    if config["verbose"]:
        print(trainer.air, config, sep="\n")
    return Session(config, scenes.sha256, trainer, run, dashboard)


def build_trainer(config: Config, scenes: multi_mnist.SceneSplits, device: torch.device) -> Trainer:
    """The model, seeded and with the weights of --load, and what trains it."""
    torch.set_num_threads(config["threads"])
    pyro.enable_validation(False)  # its checks read from the device at every site of every step
    pyro.set_rng_seed(config["seed"])
    arguments = {name: config[flag] for name, flag in flags.AIR_ARGUMENTS.items()}
    if config["estimator"] == "marginal":
        arguments["use_baselines"] = False  # nothing is left for them to do
    air = AIR(x_size=scenes.train.x.shape[-1], **arguments)
    if config["load"]:
        load_weights(air, Path(config["load"]))
    test = {n: a if a is None else torch.from_numpy(a) for n, a in scenes.test._asdict().items()}
    known = (test["counts"], test["boxes"], test["overlaps"])
    return Trainer(
        air.to(device),
        torch.from_numpy(scenes.train.x).to(device),
        HeldOut(torch.from_numpy(scenes.test.x), *known),
        TrainingSettings(**{f.name: config[f.name] for f in fields(TrainingSettings)}),
    )


def load_scenes(config: Config) -> multi_mnist.SceneSplits:
    """The scenes of --data, or those that the other data flags describe, made if need be."""
    if config["data"]:
        return multi_mnist.load_file(Path(config["data"]))
    settings = SceneSettings(**{name: config[flag] for name, flag in SCENE_FLAGS.items()})
    folders = {name: config[name] and Path(config[name]) for name in ("cache_dir", "mnist_dir")}
    return multi_mnist.load_scenes(settings, **folders)


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    packages = {name: version(name) for name in ("torch", "pyro-ppl", "numpy")}
    return {"python": sys.version.split()[0], **packages}


def train(session: Session) -> int:
    """Trains to the end or a signal; prints, logs, draws and saves on the way."""
    trainer, run = session.trainer, session.run
    total, shown_at = trainer.settings.num_steps, -QUIET_SECONDS
    bar = tqdm(total=total, initial=trainer.step, unit="step", disable=None, dynamic_ncols=True)
    with stop_on_signals(trainer) as received, bar:
        for event in trainer.train():
            if isinstance(event, CheckpointDue):
                save(session)
                continue
            run.log(event.record())
            show(session, event)
            if isinstance(event, Evaluated):
                bar.write(str(event))
                if event.alarm:
                    bar.write(f"WARNING: {event.alarm}")
                if event.alarm and session.config["restarts"] > 0:
                    break
                continue
            bar.set_postfix_str(str(event), refresh=False)
            bar.update(event.step - bar.n)
            if bar.disable and time.monotonic() - shown_at > QUIET_SECONDS:
                shown_at = time.monotonic()
                print(f"step {event.step:,} of {total:,}: {event}", flush=True)
        else:
            return finish(session, received)
    return start_over(session)


def start_over(session: Session) -> int:
    """Trains from the next seed, in a folder of its own beside that of the collapsed run."""
    save(session)
    config, folder = session.config, session.config["output_dir"]
    seed = config["seed"] + 1
    print(f"Starting over with --seed {seed}; {session.run.path} is left as it is.", flush=True)
    changed = {"seed": seed, "restarts": config["restarts"] - 1, "resume": None}
    changed["output_dir"] = folder and f"{folder}-seed{seed}"
    return train(prepare({**config, **changed}))


def finish(session: Session, received: Sequence[int]) -> int:
    """Draws, saves where there is a need to, and says how the run ended."""
    trainer, run, total = session.trainer, session.run, session.trainer.settings.num_steps
    draw_figures(session)
    if trainer.step < total:
        save(session)
        print(
            f"Interrupted, and saved at step {trainer.step:,} of {total:,}. "
            f"Go on with: python main.py --resume {run.path}"
        )
        return 128 + received[0]
    if session.config["evaluate"]:
        found = trainer.evaluate(len(trainer.held_out.images), session.config["iwae_samples"])
        run.write_json("evaluation.json", found.record())
        print(f"log p(x) is at least {found.result.bound:.1f} ± {found.result.bound_se:.1f} nats.")
    print(f"Done. Pictures and curves are in {run.figures}, all else in {run.path}.")
    return 0


@contextmanager
def stop_on_signals(trainer: Trainer) -> Iterator[list[int]]:
    """Lets Ctrl-C and SIGTERM end training after the step at hand; a second one ends at once."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        trainer.stop_requested = True
        signal.signal(number, previous[signal.Signals(number)])

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def save(session: Session) -> None:
    """Writes the checkpoint, and the weights alone where --save asks for them."""
    trainer, file = session.trainer, session.config["save"]
    about = {"config": session.config, "data_sha256": session.data_sha256}
    session.run.save({**about, **trainer.state_dict()})
    if file:
        save_weights(trainer.air, Path(file))


def inferred_scenes(trainer: Trainer, number: int) -> viz.InferredScenes:
    """What the model finds in the first held-out scenes, for drawing."""
    scenes = trainer.held_out.first(number)
    inference = infer(trainer.air, scenes.images.to(trainer.images.device))
    return viz.InferredScenes(
        scenes.images.numpy(),
        inference.reconstructions.cpu().numpy(),
        inference.boxes.cpu().numpy(),
        inference.counts.cpu().numpy(),
        None if scenes.counts is None else scenes.counts.numpy(),
    )


def prior_samples(trainer: Trainer, number: int) -> tuple[Any, Any, Any]:
    """Scenes drawn from the prior, with boxes and counts, for drawing.

    All counts are drawn alike here: under the count prior of training nearly all are empty.
    """
    air = trainer.air
    presence = geometric_count_prior(1.0, air.num_steps)
    with torch.no_grad(), forked_rng(trainer.settings.seed, trainer.images.device):
        (z_where, z_pres), canvas = air.prior(number, presence.__getitem__)
    boxes = window_boxes(torch.stack(z_where, 1), air.x_size)
    counts = torch.cat(z_pres, 1).sum(1).long()
    return canvas.cpu().numpy(), boxes.cpu().numpy(), counts.cpu().numpy()


def draw_figures(session: Session) -> None:
    """Draws the run's figures anew."""
    trainer, run = session.trainer, session.run
    scenes = inferred_scenes(trainer, PICTURES)
    viz.save_scene_figures(run.figures, scenes, *prior_samples(trainer, PICTURES))
    viz.save_curves(run.figures / "curves.png", run.read_metrics())


def show(session: Session, event: Progress | Evaluated) -> None:
    """Draws on the visdom server, where one is asked for, every --viz-every steps."""
    dashboard, every = session.dashboard, session.config["viz_every"]
    if dashboard is None:
        return
    if isinstance(event, Evaluated):
        dashboard.errors(inferred_scenes(session.trainer, PICTURES))
    elif event.step % every < session.config["progress_every"]:
        dashboard.curves(session.run.read_metrics())
        dashboard.scenes(inferred_scenes(session.trainer, 16))
        dashboard.samples(*prior_samples(session.trainer, 16))


if __name__ == "__main__":
    sys.exit(main())
