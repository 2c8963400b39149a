"""Learns to count and find the digits in multi-MNIST scenes, with no labels: AIR in Pyro.

    python main.py                       the best recipe known: minutes on two CPU cores
    python main.py -n 3000 --seed 1      fewer steps, another seed
    python main.py --resume runs/RUN     goes on with a run that was interrupted

The model is in ``air/``, its nets in ``modules.py``, the scenes in ``multi_mnist.py``.
"""

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from tqdm import tqdm

import multi_mnist
import viz
from air import AIR
from air.cli import flag_values, flags
from air.cli.config import AIR_ARGUMENTS, is_compiled, merge_new, merge_resumed, pick_device, plain
from air.cli.config import DEFAULTS as OWN_DEFAULTS
from air.cli.faults import exit_code, explain, stop_on_signals, terminate_like_interrupt
from air.cli.recorder import Recorder, restore_trainer, versions
from air.data.shards import Shards, load_data
from air.evaluation.metrics import HeldOut
from air.storage.checkpoint import check_unpacked_size, load_weights_strict, read_weights
from air.storage.run_folder import RunFolder
from air.subsampling import StreamedImages
from air.training.events import CheckpointDue, Evaluated, Event, Progress, SnapshotDue
from air.training.ranks import Ranks, join_ranks
from air.training.settings import TrainingSettings
from air.training.trainer import Trainer
from air.visualization.dashboard import Dashboard, connect
from multi_mnist import SceneSettings

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
    trainer: Trainer
    run: RunFolder
    recorder: Recorder


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code."""
    warnings.filterwarnings("ignore", "Encountered NaN")  # Pyro's; such steps are skipped
    with join_ranks() as ranks:
        return ranks.follow(assemble) if ranks.rank > 0 else lead(argv, ranks)


def lead(argv: Sequence[str] | None, ranks: Ranks) -> int:
    """What rank 0 does, in most cases the one process: from the flags to the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    ranks.others_wait()
    parser = build_parser()
    given = plain(vars(parser.parse_args(argv)))
    session, code = None, None
    with terminate_like_interrupt():
        while code is None:
            run = None
            try:
                with ExitStack() as held:
                    session = prepare(given, held, ranks, session)
                    run = session.run
                    ranks.go()
                    if session.recorder.dashboard:
                        held.enter_context(session.recorder.dashboard)
                    code = train(session)
                    given = given if code is not None else with_next_seed(session)
            except KeyboardInterrupt as signaled:
                how = run.resume_hint() if run else "Training had not begun"
                parser.exit(exit_code(signaled), f"{parser.prog}: interrupted. {how}\n")
            except Exception as error:
                ranks.end_by_error()
                if run is None and isinstance(error, ValueError | OSError | ModuleNotFoundError):
                    parser.error(str(error))  # the user can mend it
                if (line := explain(error, run)) is None:
                    raise
                parser.exit(1, f"{parser.prog}: error: {line}\n")
    return code


def build_parser() -> flags.Parser:
    """A parser of all flags."""
    parser = flags.build_parser(__doc__ or "")
    multi_mnist.add_arguments(parser, seed_flag="--data-seed")
    return parser


def prepare(
    given: Config, held: ExitStack, ranks: Ranks, collapsed: Session | None = None
) -> Session:
    """From the flags given to everything in place; writes nothing before all has been checked.

    Args:
        given: The flags.
        held: Lets go of the run's folder.
        ranks: The processes that train together.
        collapsed: The run in whose place this one begins.

    Raises:
        ValueError: If flags, data or files do not fit; the message is one line for the user.
        ConnectionError: If visdom is asked for and no server answers.
    """
    config, run, state, weights = merge_new({}, given), None, None, None
    if given.get("resume"):
        run = RunFolder.open(Path(given["resume"]))
        held.callback(run.close)
        state = run.load()
        flag_values.check_values(build_parser(), state["config"], DEFAULTS, run.source)
        config = merge_resumed(state["config"], given)
        weights = state["model"]
    elif given.get("load"):
        weights, saved = read_weights(Path(given["load"]))
        flag_values.check_values(build_parser(), saved, DEFAULTS, Path(given["load"]))
        config = merge_new(saved, given)
    config = {**DEFAULTS, **config}
    before = state["config"] if state else collapsed.config if collapsed else {}
    check_flags(config, given, before)
    config["compile"] = is_compiled(config)
    trainer, sha256 = assemble(config, ranks)
    if weights:
        load_weights_strict(trainer.air, weights, run.source if run else Path(config["load"]))
    if run and state:
        restore_trainer(trainer, state, run.source, sha256)
    if (taken := trainer.step) > (wanted := config["num_steps"]):
        raise ValueError(f"--num-steps must be at least the {taken} already taken, got {wanted}")
    if collapsed:  # its server may be away for a while
        visdom = collapsed.recorder.dashboard and collapsed.recorder.dashboard.client
    else:
        server = config["visdom_server"] if config["viz"] else None
        visdom = connect(server, config["visdom_port"], config["viz_log"])
    ranks.lead(config, sha256, trainer.state_dict())
    if run is None:
        run = RunFolder.create(config["output_dir"], config["seed"])
        held.callback(run.close)
    return begin(config, trainer, sha256, run, visdom)


def begin(
    config: Config,
    trainer: Trainer,
    data_sha256: str,
    run: RunFolder,
    visdom: Any,  # noqa: ANN401
) -> Session:
    """Makes the run's folder ready, and its live page where `visdom` is a client."""
    run.truncate_after(trainer.step, trainer.step == config["num_steps"])
    run.write_json("config.json", config | {"data_sha256": data_sha256, "versions": versions()})
    if config["verbose"]:
        print(trainer.air, config, sep="\n")
    env = config["visdom_env"] or f"air_{run.path.resolve().name}"
    dashboard = visdom and Dashboard(visdom, env, config, run.read_metrics(), config["viz_every"])
    return Session(config, trainer, run, Recorder(run, trainer, config, data_sha256, dashboard))


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
        if path and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise ValueError(f"{flag}: there is no folder {path.parent} to write {path.name} into")


def assemble(config: Mapping[str, Any], ranks: Ranks) -> tuple[Trainer, str]:
    """The model, seeded, and what trains it, on the scenes of that SHA-256."""
    device = pick_device(config["device"], ranks.local_rank)
    scenes = load_scenes(config)
    torch.set_num_threads(config["threads"])
    pyro.enable_validation(False)  # its checks read from the device at every site of every step
    pyro.set_rng_seed(config["seed"])
    arguments = {name: config[flag] for name, flag in AIR_ARGUMENTS.items()}
    if config["estimator"] == "marginal":
        arguments["use_baselines"] = False  # nothing is left for them to do
    x, test = ranks.part(scenes.train.x), scenes.test
    air = AIR(x_size=x.shape[-1], channels=x.shape[1] if x.ndim == 4 else 1, **arguments)
    streamed = isinstance(x, Shards)
    images = StreamedImages(x, device) if streamed else torch.from_numpy(x).to(device)
    held_out = HeldOut.from_numpy(test.x, test.counts, test.boxes, test.overlaps)
    settings = TrainingSettings(**{f.name: config[f.name] for f in fields(TrainingSettings)})
    return Trainer(air.to(device), images, held_out, settings, ranks), scenes.sha256


def load_scenes(config: Mapping[str, Any]) -> multi_mnist.SceneSplits:
    """The scenes of --data, or those that the other data flags describe, made if need be."""
    if config["data"]:
        check_unpacked_size(path := Path(config["data"]))
        return load_data(path, hold_out_all=config["num_steps"] == 0)
    try:
        settings = SceneSettings(**{name: config[flag] for name, flag in SCENE_FLAGS.items()})
    except ValueError as error:  # begins with the name of the setting
        name, problem = str(error).split(":", 1)
        raise ValueError(f"--{SCENE_FLAGS[name].replace('_', '-')}:{problem}") from error
    folders = {name: config[name] and Path(config[name]) for name in ("cache_dir", "mnist_dir")}
    return multi_mnist.load_scenes(settings, **folders)


def train(session: Session) -> int | None:
    """Trains to the end or a signal, and returns the exit code; None after a collapse."""
    if session.config["compile"] and session.trainer.step < session.config["num_steps"]:
        print("Compiling the step, a minute or two; --no-compile starts at once.", flush=True)
    if session.recorder.dashboard:
        print(session.recorder.dashboard, flush=True)
    trainer, collapsed = session.trainer, False
    total, shown_at = trainer.settings.num_steps, -QUIET_SECONDS
    bar = tqdm(total=total, initial=trainer.step, unit="step", disable=None, dynamic_ncols=True)
    with stop_on_signals(trainer) as received, bar:
        for event in events(session):
            session.recorder.handle(event)
            if isinstance(event, Evaluated):
                bar.write(str(event))
                if event.alarm:
                    bar.write(f"WARNING: {event.alarm}")
                collapsed = event.alarm is not None and session.config["restarts"] > 0
                trainer.stop_requested |= collapsed
            elif isinstance(event, Progress):
                bar.set_postfix_str(str(event), refresh=False)
                bar.update(event.step - bar.n)
                if bar.disable and time.monotonic() - shown_at > QUIET_SECONDS:
                    shown_at = time.monotonic()
                    print(f"step {event.step:,} of {total:,}: {event}", flush=True)
    trainer.ranks.others_wait()
    return None if collapsed and not received else finish(session, received)


def events(session: Session) -> Iterator[Event]:
    """What training tells; where it cannot go on, the run is saved as it is."""
    try:
        yield from session.trainer.train()
    except FloatingPointError:
        session.recorder.save()
        session.trainer.ranks.others_wait()
        raise


def with_next_seed(session: Session) -> Config:
    """The flags of a run that starts over, in a folder beside that of the collapsed one."""
    config, seed = session.config, session.config["seed"] + 1
    session.recorder.save()
    viz.draw_run(session.run)
    print(f"Starting over with --seed {seed}; {session.run.path} is left as it is.", flush=True)
    folder = str(session.run.path).removesuffix(f"-seed{config['seed']}") + f"-seed{seed}"
    anew = {"seed": seed, "output_dir": folder, "resume": None}
    return {**config, **anew, "restarts": config["restarts"] - 1}


def finish(session: Session, received: Sequence[int]) -> int:
    """Draws, saves where there is a need to, and says how the run ended."""
    trainer, run, total = session.trainer, session.run, session.config["num_steps"]
    if stopped := trainer.stopped or received:
        for event in (CheckpointDue(trainer.step), SnapshotDue(trainer.step)):
            session.recorder.handle(event)
    viz.draw_run(run)
    if stopped:
        print(
            f"Interrupted, and saved at step {trainer.step:,} of {total:,}. "
            f"Go on with: python main.py --resume {run.path}"
        )
        return 128 + (received[0] if received else signal.SIGTERM)  # else another rank's
    if session.config["evaluate"]:
        iwae = {name: session.config[name] for name in ("iwae_samples", "iwae_scenes")}
        found = trainer.evaluate(len(trainer.held_out.images), **iwae)
        run.write_json("evaluation.json", found.record())
        print(f"log p(x) is at least {found.result.bound:.1f} ± {found.result.bound_se:.1f} nats.")
    print(f"Done. Pictures and curves are in {run.figures}, all else in {run.path}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
