"""Learns to count and find the digits in multi-MNIST scenes, with no labels: AIR in Pyro.

    python main.py                       sets what follows from the scenes, and trains: minutes
    python main.py --data pictures       the same for your own pictures
    python main.py -n 3000 --seed 1      fewer steps, another seed
    python main.py --resume runs/RUN     resumes a run that was interrupted

The model is in ``air/``, its nets in ``modules.py``, the scenes in ``multi_mnist.py``. Under
torchrun every rank runs this program; rank 0 alone writes, draws and prints.
"""

import errno
import logging
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch

from air import AIR, multi_mnist, viz
from air.cli.config import Config, as_restarted, check_config, config_hints, resolve_config
from air.cli.device import pick_device, torch_settings_of_a_run
from air.cli.errors import explained_errors
from air.cli.flags import build_parser, settings_named_by_flag
from air.cli.progress import ProgressBar
from air.cli.recipe import (
    Found,
    describe,
    find_image_settings,
    find_recipe_settings,
    find_settings,
    is_surveyed,
    unlike_training,
)
from air.cli.recorder import Recorder, SilentRecorder, final_evaluations, restore_trainer
from air.data.scenes import DataError, SceneSplits
from air.data.survey import data_hints, survey
from air.data.synthetic.scene_settings import SOLIDS
from air.data.user_images.sources import load_data
from air.evaluation import HeldOut
from air.storage.checkpoint import check_image_size, load_weights_strict, read_state, read_weights
from air.storage.files import quoted
from air.storage.pretrained import explain
from air.storage.run_folder import RunFolder, versions
from air.support.images import to_tensor
from air.support.model_settings import ModelSettings, NetFactory
from air.terminal.signals import Signals, interrupt_on_signals
from air.terminal.streams import steady_streams
from air.training import Trainer, TrainingSettings
from air.training.compiled_svi import Compiler, inductor
from air.training.events import CheckpointDue, Evaluated, Progress, SnapshotDue
from air.training.ranks import any_rank, is_main, joined_ranks, local_rank
from air.visualization.dashboard import Dashboard, connect


def main(
    argv: Sequence[str] | None = None,
    nets: NetFactory | None = None,
    compiler: Compiler = inductor,
) -> int:
    """Runs the program; returns its exit code.

    Args:
        argv: The words of the command line; None for those of the process.
        nets: Makes your own nets from the settings of the model; see `AIR`.
        compiler: Compiles the captured step.
    """
    with (
        warnings.catch_warnings(),
        steady_streams(),
        joined_ranks(),
        torch_settings_of_a_run(),
        interrupt_on_signals() as signals,
    ):
        warnings.filterwarnings("ignore", "Encountered NaN")  # Pyro's; such steps are skipped
        parser = build_parser(__doc__ or "")
        cli_args = as_restarted(vars(parser.parse_args(argv)))
        with explained_errors(parser) as run_begins, ExitStack() as exit_stack:
            saved = read_saved(cli_args, exit_stack)
            found = survey_source(cli_args)
            config = resolve_config(cli_args, saved.config, found)
            check_steps(config, saved)
            device = pick_device(config.program.device)
            scenes = load_scenes(config)
            found = survey_scenes(cli_args, found, scenes)
            if config.program.suggest:
                return 0
            config = resolve_config(cli_args, saved.config, found)
            config = config.with_image_size(scenes.x_size, scenes.channels)
            show_hints(config, scenes, saved)
            trainer = build_trainer(config, scenes, device, nets, compiler)
            restore(trainer, saved, scenes.sha256)
            recorder = open_recorder(config, trainer, scenes.sha256, saved.run, exit_stack)
            run_begins(recorder.run)
            signaled = train(config, trainer, recorder, signals)
            return finish(config, trainer, recorder, signaled)


# Preparing a run. Nothing is written before all input is read.


class Saved(NamedTuple):
    """The run to resume, or the weights to load; by default neither."""

    source: Path = Path()
    config: Mapping[str, Any] = {}  # of the run, or of the run that left the weights, if known
    weights: dict[str, torch.Tensor] | None = None
    run: RunFolder | None = None
    state: dict[str, Any] | None = None  # of the run


def read_saved(cli_args: Mapping[str, Any], exit_stack: ExitStack) -> Saved:
    """Reads the files that --resume or --load names."""
    if "resume" in cli_args:
        run = RunFolder.open(Path(cli_args["resume"]), lock=is_main())
        exit_stack.callback(run.close)
        state = read_state(run.checkpoint)
        check_config(state["config"], run.checkpoint)
        return Saved(run.checkpoint, state["config"], state["model"], run, state)
    if "load" in cli_args:
        path = Path(cli_args["load"])
        if (line := explain(path)) and is_main():
            print(line)
        weights, config = read_weights(path)
        check_config(config, path)
        return Saved(path, config, weights)
    return Saved()


def check_steps(config: Config, saved: Saved) -> None:
    """Refuses to resume a run that has taken more steps than it is to take."""
    taken, given = saved.state["step"] if saved.state else 0, config.training.num_steps
    if taken > given:
        raise ValueError(
            f"--num-steps: expected at least the {taken} steps already taken, got {given}"
        )


def load_scenes(config: Config) -> SceneSplits:
    """The scenes of --data, or those that the flags describe, which are generated if need be."""
    try:
        if config.program.data:
            hold_out_all = config.training.num_steps == 0
            return load_data(config.program.data, config.images, hold_out_all=hold_out_all)
        assert config.scenes is not None
        return multi_mnist.load_scenes(config.scenes, **vars(config.folders))
    except DataError as error:
        if config.program.resume:  # its paths may be relative to another folder
            flag = "--data" if config.program.data else "--mnist-dir"
            raise DataError(f"{error}; if it has moved, give its new path by {flag}") from error
        raise


def survey_source(cli_args: Mapping[str, Any]) -> Found:
    """What follows from the source of the images: how to prepare those of --data."""
    if cli_args.get("recipe") in SOLIDS and not cli_args.get("survey", True):
        raise ValueError("--no-survey: expected without solids, which no default suits")
    if "data" not in cli_args and is_surveyed({**cli_args, "num_steps": None}):
        return find_recipe_settings(cli_args)  # without images, so that -n 0 has it too
    if not is_surveyed(cli_args):
        return {}
    return find_image_settings(Path(cli_args["data"]), cli_args)


def survey_scenes(cli_args: Mapping[str, Any], of_source: Found, scenes: SceneSplits) -> Found:
    """All settings that follow from a survey of the training scenes; prints them."""
    if not is_surveyed(cli_args):
        if cli_args.get("suggest"):
            raise ValueError("--suggest: expected a new run, whose settings follow from its images")
        return of_source
    seen, found = None, of_source
    if "data" in cli_args or not of_source:  # otherwise a recipe brings its settings
        seen = survey(scenes.train.spot_images[0], scenes.x_size)
        found = of_source | find_settings(seen, scenes, cli_args)
    for line in describe(seen, found) if is_main() else ():
        print(line)
    return found


def show_hints(config: Config, scenes: SceneSplits, saved: Saved) -> None:
    """Warns of settings and scenes that are probably not what the user means."""
    loaded = {} if saved.run else saved.config
    on_black = config.model.background_model == config.model.renderer == "none"
    hints = [
        *config_hints(config),
        *data_hints(scenes, config.model.num_steps, on_black),
    ]
    if config.program.data:
        hints += unlike_training(scenes.test.x, loaded)
    elif loaded.get("data"):
        hints.append(f"the model was trained on {loaded['data']}; --data is missing")
    for hint in hints if is_main() else ():
        logging.getLogger("air").warning(hint)


def build_trainer(
    config: Config,
    scenes: SceneSplits,
    device: torch.device,
    nets: NetFactory | None = None,
    compiler: Compiler = inductor,
) -> Trainer:
    """The model, seeded, and its trainer."""
    torch.set_num_threads(config.program.threads)
    pyro.set_rng_seed(config.training.seed)
    is_score = config.training.estimator == "score"  # the only estimator that has baselines
    settings = replace(config.model, use_baselines=config.model.use_baselines and is_score)
    with settings_named_by_flag(ModelSettings):
        air = AIR.from_settings(settings, nets).to(device)
    test = scenes.test
    images = to_tensor(scenes.train.x)
    parts = test.x, test.counts, test.boxes, test.overlaps, test.labels, test.solid_poses
    held_out = HeldOut._make(part if part is None else to_tensor(part) for part in parts)
    with settings_named_by_flag(TrainingSettings):
        return Trainer(air, images, held_out, config.training, compiler, scenes.train.spot_images)


def restore(trainer: Trainer, saved: Saved, data_sha256: str) -> None:
    """Gives the trainer the saved weights and, of a run to resume, its state."""
    if saved.weights is not None:
        check_image_size(trainer.air, saved.config, saved.source)
        load_weights_strict(trainer.air, saved.weights, saved.source)
    if saved.state:
        restore_trainer(trainer, saved.state, saved.source, data_sha256)


def open_recorder(
    config: Config,
    trainer: Trainer,
    data_sha256: str,
    run: RunFolder | None,
    exit_stack: ExitStack,
) -> Recorder | SilentRecorder:
    """Creates the folder of a new run, or cleans that of a resumed run; opens the live page."""
    if not is_main():
        return SilentRecorder()
    program, flat = config.program, config.flat()
    client = connect(program.visdom_server if program.viz else None)
    if run is None:
        run = RunFolder.create(program.output_dir, config.training.seed)
        exit_stack.callback(run.close)
    run.truncate_after(trainer.step, trainer.finished)
    run.write_json("config.json", flat | {"data_sha256": data_sha256, "versions": versions()})
    dashboard = None
    if client is not None:
        env = program.visdom_env or f"air_{run.path.resolve().name}"
        dashboard = Dashboard(client, env, flat, run.read_metrics(), program.viz_every)
        exit_stack.enter_context(dashboard)
    return Recorder(run, trainer, flat, data_sha256, dashboard)


# Training and finishing a run.


def train(
    config: Config, trainer: Trainer, recorder: Recorder | SilentRecorder, signals: Signals
) -> int | None:
    """Trains to the last step, or until a signal; returns the number of the signal."""
    num_steps = config.training.num_steps
    with closing(ProgressBar(num_steps, trainer.step, silent=not is_main())) as bar:
        if config.program.verbose:
            bar.write(f"{trainer.air}\n{config.flat()}")
        if config.training.compile and not trainer.finished:
            bar.write("Compiling the training step takes a minute or two; --no-compile skips it.")
        if recorder.dashboard:
            bar.write(str(recorder.dashboard))
        signals.ask_by(trainer.request_stop, ignore_repeated=local_rank() is not None)
        try:
            for event in trainer.train():
                recorder.handle(event)
                if isinstance(event, Progress):
                    bar.show(event)
                elif isinstance(event, Evaluated):
                    bar.write(f"{event}\nWARNING: {event.alarm}" if event.alarm else str(event))
        except FloatingPointError:
            recorder.save()
            raise
    signaled = signals.first()
    if any_rank(signaled is not None):
        return signaled or signal.SIGTERM  # if only another rank received it
    return None


def finish(
    config: Config,
    trainer: Trainer,
    recorder: Recorder | SilentRecorder,
    signaled: int | None,
) -> int:
    """Saves an interrupted run; draws the run, evaluates it, and returns the exit code."""
    if signaled is not None:
        recorder.handle(CheckpointDue(trainer.step))
        recorder.handle(SnapshotDue(trainer.step))
    if (run := recorder.run) is not None:
        draw_figures(run)
        if signaled is not None:
            print(
                f"Interrupted, and saved at step {trainer.step:,} of "
                f"{config.training.num_steps:,}. Resume with: {run.resume_command()}"
            )
        else:
            for line in final_evaluations(trainer, run, config.flat()):
                print(line)
            print(f"Done. Figures are in {run.figures}, everything else in {run.path}.")
    return 0 if signaled is None else 128 + signaled


def draw_figures(run: RunFolder) -> None:
    """Draws the run; a figure that fails must not cost the evaluations that follow."""
    try:
        viz.draw_run(run)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EROFS):
            raise  # nothing that follows could be written either
        text = "the figures of %s could not be drawn: %s; try: python viz.py %s"
        logging.getLogger("air").warning(text, run.path, error, quoted(run.path))


if __name__ == "__main__":
    sys.exit(main())
