"""Learns to count and find the digits in multi-MNIST scenes, with no labels: AIR in Pyro.

    python main.py                       the best recipe known: minutes on two CPU cores
    python main.py -n 3000 --seed 1      fewer steps, another seed
    python main.py --resume runs/RUN     resumes a run that was interrupted

The model is in ``air/``, its nets in ``modules.py``, the scenes in ``multi_mnist.py``. Under
torchrun every rank runs this program; rank 0 alone writes, draws and prints.
"""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, closing
from enum import Enum, auto
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pyro
import torch

import multi_mnist
import viz
from air import AIR
from air.cli.config import (
    IMAGE_KEYS,
    SCENE_KEYS,
    check_config,
    resolve_config,
    to_json_types,
    with_image_size,
)
from air.cli.device import pick_device
from air.cli.errors import explain
from air.cli.flags import DEFAULTS, Config, Parser, build_parser, settings_named_by_flag
from air.cli.progress import ProgressBar
from air.cli.recorder import Recorder, final_evaluations, restore_trainer
from air.data.scenes import DataError
from air.data.user_images.preparation import ImageSettings
from air.data.user_images.sources import load_data
from air.data.user_images.survey import data_hints
from air.evaluation import HeldOut
from air.images import to_tensor
from air.model_settings import ModelSettings, NetFactory
from air.process.signals import Signals, exit_code, interrupt_on_signals
from air.process.streams import steady_streams
from air.settings import as_arguments, from_config
from air.storage.checkpoint import check_image_size, load_weights_strict, read_weights
from air.storage.run_folder import RunFolder, versions
from air.training import Trainer, TrainingSettings
from air.training.compiled_svi import Compiler, inductor
from air.training.events import CheckpointDue, Evaluated, Progress, SnapshotDue
from air.training.parallel import ProcessGroup, RankLostError, process_group
from air.visualization.dashboard import Dashboard, connect


class Outcome(Enum):
    """How training ended."""

    FINISHED = auto()
    INTERRUPTED = auto()  # by a signal; the run can be resumed
    COLLAPSED = auto()  # and is to start over with the next seed


class Context(NamedTuple):
    """The parts of a run that its configuration does not name."""

    group: ProcessGroup
    nets: NetFactory | None
    compiler: Compiler


class Session(NamedTuple):
    """A run that is ready to train. Rank 0 alone has a folder and a recorder."""

    config: Config
    trainer: Trainer
    recorder: Recorder | None

    @property
    def run(self) -> RunFolder | None:
        """The run's folder."""
        return self.recorder.run if self.recorder else None


def main(
    argv: Sequence[str] | None = None,
    nets: NetFactory | None = None,
    compiler: Compiler = inductor,
) -> int:
    """Runs the program; returns its exit code.

    Args:
        argv: The words of the command line; None for those of the process.
        nets: Makes nets of one's own from the settings of the model; see `AIR`.
        compiler: Compiles the captured step.
    """
    warnings.filterwarnings("ignore", "Encountered NaN")  # Pyro's; such steps are skipped
    with steady_streams(), process_group() as group, interrupt_on_signals() as signals:
        logging.basicConfig(format="%(levelname)s: %(message)s")
        context = Context(group, nets, compiler)
        parser = build_parser(__doc__ or "", quiet=not group.is_main)
        cli_args = to_json_types(vars(parser.parse_args(argv)))
        if cli_args.get("suggest"):
            from air.cli.suggestion import print_suggestion  # SciPy would make every start slower

            return print_suggestion(parser, cli_args, argv)
        session: Session | None = None
        try:
            while True:
                with ExitStack() as exit_stack:
                    session = prepare(parser, cli_args, context, session, exit_stack)
                    outcome, signaled = train(session, signals)
                    if outcome is not Outcome.COLLAPSED:
                        return finish(session, signaled)
                    leave_collapsed(session)
        except KeyboardInterrupt as interrupt:
            run = session and session.run
            hint = run.resume_hint() if run else "Training had not begun"
            parser.exit(exit_code(interrupt), f"{parser.prog}: interrupted. {hint}\n")
        except Exception as error:
            line = explain(error, session.run if session else None)
            if line is None:
                raise
            if group.world_size > 1:  # torchrun sends SIGTERM when a rank ends: too early
                signals.ignore()
            end_by_error(parser, group, error, line)


def end_by_error(parser: Parser, group: ProcessGroup, error: Exception, line: str) -> NoReturn:
    """Prints the line and exits. Other ranks are silent about errors that rank 0 reports."""
    if not group.is_main and not isinstance(error, RankLostError | FloatingPointError):
        print(f"{parser.prog}: rank {group.rank}: {line}", file=sys.stderr)
    parser.exit(1, f"{parser.prog}: error: {line}\n")


# Preparing a run.


def prepare(
    parser: Parser,
    cli_args: Config,
    context: Context,
    collapsed: Session | None,
    exit_stack: ExitStack,
) -> Session:
    """Prepares the run of the command line or, after a collapse, the run that starts over.

    Nothing is written before all ranks are ready. Input that one of them cannot use ends the
    program with exit code 2.
    """
    session, problem = None, None
    try:
        if collapsed is None:
            session = prepare_run(cli_args, context, exit_stack)
        else:
            session = start_over(collapsed, context, exit_stack)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        problem = str(error)
    problems = context.group.all_gather(problem)
    failed = [rank for rank, its_problem in enumerate(problems) if its_problem is not None]
    if failed:  # the first rank that failed reports it
        parser.quiet = context.group.rank != failed[0]
        parser.error(f"{problem}" if failed[0] == 0 else f"rank {failed[0]}: {problem}")
    assert session is not None
    return session


def prepare_run(cli_args: Config, context: Context, exit_stack: ExitStack) -> Session:
    """A new run, or the run that --resume names, restored from its checkpoint."""
    run, state, weights, model = None, None, None, None
    if "resume" in cli_args:
        run = RunFolder.open(Path(cli_args["resume"]), lock=context.group.is_main)
        exit_stack.callback(run.close)
        state = run.load()
        check_config(state["config"], run.source)
        weights = state["model"]
    elif "load" in cli_args:
        weights, model = read_weights(Path(cli_args["load"]))
        check_config(model, Path(cli_args["load"]))
    config = resolve_config(cli_args, state and state["config"], model)
    check_flags(config, cli_args, state["config"] if state else DEFAULTS)
    trainer, config, data_sha256 = build_trainer(config, context)
    if weights is not None:
        source = run.source if run else Path(config["load"])
        check_image_size(trainer.air, weights, model or {}, source)
        load_weights_strict(trainer.air, weights, source)
    if run and state:
        restore_trainer(trainer, state, run.source, data_sha256)
    if trainer.step > config["num_steps"]:
        taken, given = trainer.step, config["num_steps"]
        raise ValueError(f"--num-steps must be at least the {taken} already taken, got {given}")
    if not context.group.is_main:
        return Session(config, trainer, None)
    server = config["visdom_server"] if config["viz"] else None
    client = connect(server, config["visdom_port"], config["viz_log"])
    return open_run(config, trainer, data_sha256, run, client, exit_stack)


def start_over(collapsed: Session, context: Context, exit_stack: ExitStack) -> Session:
    """A run with the next seed, in a folder beside that of the collapsed run, which is kept."""
    config, recorder, seed = collapsed.config, collapsed.recorder, collapsed.config["seed"] + 1
    changes = {"seed": seed, "restarts": config["restarts"] - 1, "resume": None}
    client = None
    if recorder is not None:
        stem = str(recorder.run.path).removesuffix(f"-seed{config['seed']}")
        changes["output_dir"] = f"{stem}-seed{seed}"
        # Not a new client: the server may be away for a while.
        client = recorder.dashboard.client if recorder.dashboard else None
    trainer, config, data_sha256 = build_trainer({**config, **changes}, context)
    if recorder is None:
        return Session(config, trainer, None)
    return open_run(config, trainer, data_sha256, None, client, exit_stack)


def check_flags(config: Config, cli_args: Config, before: Config) -> None:
    """Refuses flags without effect, and files that would overwrite those of another run."""
    about = "scenes made here, but --data brings its own"
    if not config["data"]:
        about = "images of one's own; name them by --data"
    for key in SCENE_KEYS if config["data"] else set(IMAGE_KEYS) - {"x_size"}:
        if key in cli_args and cli_args[key] != before.get(key, DEFAULTS[key]):
            raise ValueError(f"--{key.replace('_', '-')} is about {about}")
    if config["refine"] and config["background_model"] != "none":
        raise ValueError("--refine: expected no --background-model, which it cannot refine")
    for key, flag in (("save", "--save"), ("viz_log", "--viz-log")):
        path = config[key] and Path(config[key])
        if path and path.exists() and config[key] != before.get(key):
            raise ValueError(f"{flag} never overwrites, and {path} exists; name another file")
        if path and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise ValueError(f"{flag}: there is no folder {path.parent} to write {path.name} into")


def build_trainer(config: Config, context: Context) -> tuple[Trainer, Config, str]:
    """The seeded model with its trainer, the configuration, and the SHA-256 of the scenes.

    The configuration returned has the size of the images.
    """
    group = context.group
    device = pick_device(config["device"], group.local_rank)
    with group.main_first():  # which makes the scenes, where they are not cached yet
        scenes = load_scenes(config)
    on_black = config["background_model"] == "none"
    for hint in data_hints(scenes, config["model_steps"], on_black) if group.is_main else ():
        logging.getLogger("air").warning(hint)
    x, test = group.shard(scenes.train.x), scenes.test
    channels = x.shape[1] if x.ndim == 4 else 1
    config = with_image_size(config, x.shape[-1], channels)
    torch.set_num_threads(config["threads"])
    torch.set_float32_matmul_precision(config["matmul_precision"])
    pyro.enable_validation(False)  # its checks read from the device at every site of every step
    pyro.set_rng_seed(config["seed"])
    uses_baselines = config["use_baselines"] and config["estimator"] == "score"
    with settings_named_by_flag(ModelSettings):
        settings = from_config(ModelSettings, {**config, "use_baselines": uses_baselines})
    air = AIR.from_settings(settings, context.nets)
    images = to_tensor(x).to(device)
    held_out = HeldOut.from_numpy(
        test.x, counts=test.counts, boxes=test.boxes, overlaps=test.overlaps
    )
    with settings_named_by_flag(TrainingSettings):
        training = from_config(TrainingSettings, config)
        trainer = Trainer(air.to(device), images, held_out, training, group, context.compiler)
    return trainer, config, scenes.sha256


def load_scenes(config: Config) -> multi_mnist.SceneSplits:
    """The scenes of --data, or those that the flags describe, which are made if need be."""
    try:
        if config["data"]:
            with settings_named_by_flag(ImageSettings):
                images = from_config(ImageSettings, config)
            return load_data(config["data"], images, hold_out_all=config["num_steps"] == 0)
        with settings_named_by_flag(multi_mnist.SceneSettings):
            settings = from_config(multi_mnist.SceneSettings, config)
        folders = from_config(multi_mnist.FolderSettings, config)
        return multi_mnist.load_scenes(settings, **as_arguments(folders))
    except DataError as error:
        if config.get("resume"):  # its paths may be relative to another folder
            moved = "--data" if config["data"] else "--mnist-dir"
            raise DataError(f"{error}; if it has moved, say by {moved} where it is now") from error
        raise


def open_run(
    config: Config,
    trainer: Trainer,
    data_sha256: str,
    run: RunFolder | None,
    client: Any,  # noqa: ANN401  # of visdom, or None
    exit_stack: ExitStack,
) -> Session:
    """Creates the folder of a new run, or cleans that of a resumed run; opens the live page."""
    if run is None:
        run = RunFolder.create(config["output_dir"], config["seed"])
        exit_stack.callback(run.close)
    run.truncate_after(trainer.step, trainer.step == config["num_steps"])
    run.write_json("config.json", config | {"data_sha256": data_sha256, "versions": versions()})
    dashboard = None
    if client is not None:
        env = config["visdom_env"] or f"air_{run.path.resolve().name}"
        dashboard = Dashboard(client, env, config, run.read_metrics(), config["viz_every"])
        exit_stack.enter_context(dashboard)
    return Session(config, trainer, Recorder(run, trainer, config, data_sha256, dashboard))


# Training and finishing a run.


def train(session: Session, signals: Signals) -> tuple[Outcome, int | None]:
    """Trains to the last step, a signal, or a collapse that allows another start.

    Returns:
        How training ended, and the number of the signal that interrupted it.
    """
    config, trainer, group = session.config, session.trainer, session.trainer.group
    announce(session)
    collapsed = False
    bar = ProgressBar(config["num_steps"], trainer.step, silent=not group.is_main)
    signals.ask_by(trainer.request_stop, ignore_repeated=group.local_rank is not None)
    with closing(bar):
        try:
            for event in trainer.train():
                if session.recorder:
                    session.recorder.handle(event)
                if isinstance(event, Progress):
                    bar.show(event)
                elif isinstance(event, Evaluated):
                    bar.write(str(event))
                    if event.alarm:
                        bar.write(f"WARNING: {event.alarm}")
                    if event.alarm and config["restarts"] > 0:
                        collapsed = True
                        trainer.request_stop()
        except FloatingPointError:
            if session.recorder:
                session.recorder.save()
            raise
    signaled = signals.first(group.all_gather)
    if signaled is not None:
        return Outcome.INTERRUPTED, signaled
    return (Outcome.COLLAPSED if group.any(collapsed) else Outcome.FINISHED), None


def announce(session: Session) -> None:
    """Prints the settings if asked to, and what the user waits for."""
    if session.recorder is None:
        return
    if session.config["verbose"]:
        print(session.trainer.air, session.config, sep="\n")
    if session.config["compile"] and session.trainer.step < session.config["num_steps"]:
        print("Compiling the step, a minute or two; --no-compile starts at once.", flush=True)
    if session.recorder.dashboard:
        print(session.recorder.dashboard, flush=True)


def leave_collapsed(session: Session) -> None:
    """Saves and draws a collapsed run, which is then left as it is."""
    if session.recorder is not None:
        session.recorder.save()
        viz.draw_run(session.recorder.run)
        seed, path = session.config["seed"] + 1, session.recorder.run.path
        print(f"Starting over with --seed {seed}; {path} is left as it is.", flush=True)


def finish(session: Session, signaled: int | None) -> int:
    """Draws the run, evaluates it if asked to, says how it ended, and returns the exit code."""
    config, trainer, run = session.config, session.trainer, session.run
    if session.recorder and signaled is not None:
        session.recorder.handle(CheckpointDue(trainer.step))
        session.recorder.handle(SnapshotDue(trainer.step))
    if run is not None:
        viz.draw_run(run)
    if signaled is not None:
        if run is not None:
            print(
                f"Interrupted, and saved at step {trainer.step:,} of {config['num_steps']:,}. "
                f"Resume with: {run.resume_command()}"
            )
        return 128 + signaled
    if run is None:
        return 0
    for line in final_evaluations(trainer, run, config):
        print(line)
    print(f"Done. Pictures and curves are in {run.figures}, all else in {run.path}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
