"""Learns to count and find the digits in multi-MNIST scenes, with no labels: AIR in Pyro.

    python main.py                       the best recipe known: minutes on two CPU cores
    python main.py -n 3000 --seed 1      fewer steps, another seed
    python main.py --resume runs/RUN     goes on with a run that was interrupted

The model is in ``air/``, its nets in ``modules.py``, the scenes in ``multi_mnist.py``.
"""

import logging
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from tqdm import tqdm

import multi_mnist
import viz
from air import AIR, flags
from air.checkpoint import CheckpointError, RunFolder, fit_weights, read_weights, save_weights
from air.config import AIR_ARGUMENTS, is_compiled, merge_loaded, merge_resumed, pick_device, plain
from air.config import DEFAULTS as OWN_DEFAULTS
from air.dashboard import Dashboard, connect
from air.evaluation import HeldOut
from air.events import CheckpointDue, Evaluated, Event, Progress, SnapshotDue
from air.snapshots import save_snapshot, take_snapshot
from air.svi import RecordingError
from air.training import Trainer, TrainingSettings
from multi_mnist import SceneSettings

ON_PAGE = 16  # scenes that are looked at for the live page alone
QUIET_SECONDS = 10.0  # between progress lines where there is no terminal for a progress bar
Config = dict[str, Any]  # every flag's value by name

# The settings of the scenes and their flags: --seed is that of training here.
SCENE_FLAGS = {
    field.name: "data_seed" if field.name == "seed" else field.name
    for field in fields(SceneSettings)
}
DEFAULTS: Config = plain(
    OWN_DEFAULTS
    | {flag: getattr(SceneSettings(), name) for name, flag in SCENE_FLAGS.items()}
    | dict.fromkeys(("cache_dir", "mnist_dir"))
)


class Session(NamedTuple):
    """All that training needs."""

    config: Config
    data_sha256: str
    trainer: Trainer
    run: RunFolder
    dashboard: Dashboard | None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    warnings.filterwarnings("ignore", "Encountered NaN")  # Pyro's; such steps are skipped
    parser = build_parser()
    given = plain(vars(parser.parse_args(argv)))
    session = None
    while True:
        try:
            session = prepare(given, session)
        except (ValueError, ConnectionError, ModuleNotFoundError) as error:  # the user can mend it
            parser.error(str(error))
        except KeyboardInterrupt:
            parser.exit(130, f"{parser.prog}: interrupted before training began\n")
        try:
            with session.dashboard or nullcontext():
                code = train(session)
        except (FloatingPointError, RecordingError) as error:
            parser.exit(1, f"{parser.prog}: error: {error}. {session.run.how_to_go_on()}\n")
        except KeyboardInterrupt:
            parser.exit(130, f"{parser.prog}: interrupted. {session.run.how_to_go_on()}\n")
        if code is not None:
            return code
        given = with_next_seed(session)


def build_parser() -> flags.Parser:
    """A parser of all flags."""
    parser = flags.build_parser(__doc__ or "")
    multi_mnist.add_arguments(parser, seed_flag="--data-seed")
    return parser


def prepare(given: Config, collapsed: Session | None = None) -> Session:
    """From the flags given to everything in place; writes nothing before all has been checked.

    Args:
        given: The flags.
        collapsed: The run in whose place this one begins.

    Raises:
        ValueError: If flags, data or files do not fit; the message is one line for the user.
        ConnectionError: If visdom is asked for and no server answers.
    """
    config, run, state, weights = given, None, None, None
    if given.get("resume"):
        run = RunFolder.open(Path(given["resume"]))
        state = run.load()
        config = merge_resumed(state["config"], given)
        weights = state["model"]
    elif given.get("load"):
        weights, saved = read_weights(Path(given["load"]))
        config = merge_loaded(saved, given)
    config = {**DEFAULTS, **config}
    before = state["config"] if state else collapsed.config if collapsed else {}
    check_flags(config, given, before)
    device = pick_device(config["device"])
    config["compile"] = is_compiled(config)
    scenes = load_scenes(config)
    trainer = build_trainer(config, scenes, device)
    if weights:
        fit_weights(trainer.air, weights, run.checkpoint if run else Path(config["load"]))
    if state and state["data_sha256"] != scenes.sha256:
        raise CheckpointError(f"{given['resume']} was trained on other scenes than these")
    if state:
        trainer.load_state_dict(state)
    if (taken := trainer.step) > (wanted := config["num_steps"]):
        raise ValueError(f"--num-steps must be at least the {taken} already taken, got {wanted}")
    if collapsed:  # its server may be away for a while
        visdom = collapsed.dashboard and collapsed.dashboard.client
    else:
        server = config["visdom_server"] if config["viz"] else None
        visdom = connect(server, config["visdom_port"], config["viz_log"])
    if run is None:
        run = RunFolder.create(config["output_dir"], config["seed"])
    run.rewind(trainer.step, trainer.step == config["num_steps"])
    run.write_json("config.json", config | {"data_sha256": scenes.sha256, "versions": versions()})
    if config["verbose"]:
        print(trainer.air, config, sep="\n")
    env = config["visdom_env"] or f"air_{run.path.resolve().name}"
    dashboard = visdom and Dashboard(visdom, env, config, run.read_metrics(), config["viz_every"])
    return Session(config, scenes.sha256, trainer, run, dashboard)


def check_flags(config: Config, given: Config, saved: Config) -> None:
    """Refuses flags that go nowhere, and files that would overwrite those of another run."""
    for flag in SCENE_FLAGS.values():
        if config["data"] and flag in given and given[flag] != saved.get(flag, DEFAULTS[flag]):
            name = flag.replace("_", "-")
            raise ValueError(f"--{name} is of scenes made here, but --data brings its own")
    for name, flag in (("save", "--save"), ("viz_log", "--viz-log")):
        path = config[name] and Path(config[name])
        if path and path.exists() and config[name] != saved.get(name):
            raise ValueError(f"{flag} never overwrites, and {path} exists; name another file")
        if path and not path.parent.is_dir():
            raise ValueError(f"{flag}: there is no folder {path.parent} for {path.name}")


def build_trainer(config: Config, scenes: multi_mnist.SceneSplits, device: torch.device) -> Trainer:
    """The model, seeded, and what trains it."""
    torch.set_num_threads(config["threads"])
    pyro.enable_validation(False)  # its checks read from the device at every site of every step
    pyro.set_rng_seed(config["seed"])
    arguments = {name: config[flag] for name, flag in AIR_ARGUMENTS.items()}
    if config["estimator"] == "marginal":
        arguments["use_baselines"] = False  # nothing is left for them to do
    air = AIR(x_size=scenes.train.x.shape[-1], **arguments)
    test = scenes.test
    return Trainer(
        air.to(device),
        torch.from_numpy(scenes.train.x).to(device),
        HeldOut.from_numpy(test.x, test.counts, test.boxes, test.overlaps),
        TrainingSettings(**{f.name: config[f.name] for f in fields(TrainingSettings)}),
    )


def load_scenes(config: Config) -> multi_mnist.SceneSplits:
    """The scenes of --data, or those that the other data flags describe, made if need be."""
    if config["data"]:
        return multi_mnist.load_file(Path(config["data"]), hold_out_all=config["num_steps"] == 0)
    try:
        settings = SceneSettings(**{name: config[flag] for name, flag in SCENE_FLAGS.items()})
    except ValueError as error:  # begins with the name of the setting
        name, problem = str(error).split(":", 1)
        raise ValueError(f"--{SCENE_FLAGS[name].replace('_', '-')}:{problem}") from error
    folders = {name: config[name] and Path(config[name]) for name in ("cache_dir", "mnist_dir")}
    return multi_mnist.load_scenes(settings, **folders)


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    packages = ("torch", "pyro-ppl", "numpy")
    return {"python": sys.version.split()[0]} | {name: version(name) for name in packages}


def train(session: Session) -> int | None:
    """Trains to the end or a signal, and returns the exit code; None after a collapse."""
    if session.config["compile"] and session.trainer.step < session.config["num_steps"]:
        print("Compiling the step, a minute or two; --no-compile starts at once.", flush=True)
    if session.dashboard:
        print(session.dashboard, flush=True)
    trainer, collapsed = session.trainer, False
    total, shown_at = trainer.settings.num_steps, -QUIET_SECONDS
    bar = tqdm(total=total, initial=trainer.step, unit="step", disable=None, dynamic_ncols=True)
    with trainer.stop_on_signals() as received, bar:
        for event in trainer.train():
            keep(session, event)
            if isinstance(event, Evaluated):
                bar.write(str(event))
                if event.alarm:
                    bar.write(f"WARNING: {event.alarm}")
                collapsed = event.alarm is not None and session.config["restarts"] > 0
            elif isinstance(event, Progress):
                bar.set_postfix_str(str(event), refresh=False)
                bar.update(event.step - bar.n)
                if bar.disable and time.monotonic() - shown_at > QUIET_SECONDS:
                    shown_at = time.monotonic()
                    print(f"step {event.step:,} of {total:,}: {event}", flush=True)
            elif collapsed:  # and the pictures of it are kept
                break
    return None if collapsed else finish(session, received)


def with_next_seed(session: Session) -> Config:
    """The flags of a run that starts over, in a folder beside that of the collapsed one."""
    config = session.config
    seed = config["seed"] + 1
    session.run.save(state_of(session))
    viz.draw_run(session.run)
    print(f"Starting over with --seed {seed}; {session.run.path} is left as it is.", flush=True)
    if folder := config["output_dir"]:
        folder = folder.removesuffix(f"-seed{config['seed']}") + f"-seed{seed}"
    changed = {"seed": seed, "restarts": config["restarts"] - 1, "output_dir": folder}
    return {**config, **changed, "resume": None}


def finish(session: Session, received: Sequence[int]) -> int:
    """Draws, saves where there is a need to, and says how the run ended."""
    trainer, run, total = session.trainer, session.run, session.config["num_steps"]
    interrupted = trainer.step < total
    if interrupted:
        keep(session, CheckpointDue(trainer.step))
        keep(session, SnapshotDue(trainer.step))
    viz.draw_run(run)
    if interrupted:
        print(
            f"Interrupted, and saved at step {trainer.step:,} of {total:,}. "
            f"Go on with: python main.py --resume {run.path}"
        )
        return 128 + received[0]
    if session.config["evaluate"]:
        iwae = {name: session.config[name] for name in ("iwae_samples", "iwae_scenes")}
        found = trainer.evaluate(len(trainer.held_out.images), **iwae)
        run.write_json("evaluation.json", found.record())
        print(f"log p(x) is at least {found.result.bound:.1f} ± {found.result.bound_se:.1f} nats.")
    print(f"Done. Pictures and curves are in {run.figures}, all else in {run.path}.")
    return 0


def state_of(session: Session) -> dict[str, Any]:
    """All that the checkpoint holds."""
    about = {"config": session.config, "data_sha256": session.data_sha256}
    return {**about, **session.trainer.state_dict()}


def save(session: Session) -> None:
    """Writes the checkpoint, and the weights alone where --save asks for them."""
    session.run.save(state_of(session))
    if session.config["save"]:
        save_weights(session.trainer.air, Path(session.config["save"]))


def keep(session: Session, event: Event) -> None:
    """Writes down what an event brings, and draws it where that is asked for."""
    trainer, run, dashboard = session.trainer, session.run, session.dashboard
    shown = trainer.held_out, trainer.step, session.config["seed"], trainer.miscounted
    if isinstance(event, CheckpointDue):
        save(session)
    elif isinstance(event, SnapshotDue):
        snapshot = take_snapshot(trainer.air, *shown)
        save_snapshot(run.snapshots, snapshot)
        if dashboard:
            dashboard.draw(snapshot)
    else:
        record = event.record()
        run.log(record)
        if dashboard:
            dashboard.record(record)
        if dashboard and isinstance(event, Progress) and dashboard.due(event.step):
            start = time.monotonic()
            dashboard.draw(take_snapshot(trainer.air, *shown, ON_PAGE), time.monotonic() - start)


if __name__ == "__main__":
    sys.exit(main())
