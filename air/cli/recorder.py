"""Writes the events of training: metrics, checkpoints, snapshots, and the live page."""

import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from air.storage.checkpoint import CheckpointError, check_progress, save_weights
from air.storage.run_folder import RunFolder
from air.training.events import CheckpointDue, Event, Progress, SnapshotDue, with_error
from air.training.trainer import Trainer
from air.visualization.dashboard import ON_PAGE, Dashboard
from air.visualization.snapshots import SCENES, Snapshot, save_snapshot, take_snapshot


@dataclass(eq=False)
class Recorder:
    """Keeps a run's folder, and its live page if there is one."""

    run: RunFolder
    trainer: Trainer  # the source of the events
    config: Mapping[str, Any]  # every flag's value
    data_sha256: str  # of the scenes
    dashboard: Dashboard | None  # the live page

    def handle(self, event: Event) -> None:
        """Writes an event to the run's folder, and shows it on the live page."""
        if isinstance(event, CheckpointDue):
            self.save()
        elif isinstance(event, SnapshotDue):
            snapshot = self._take_snapshot(SCENES)
            save_snapshot(self.run.snapshots, snapshot)
            if self.dashboard:
                self.dashboard.draw(snapshot)
        else:
            record = event.record()
            self.run.log(record)
            if self.dashboard:
                self.dashboard.record(record)
                if isinstance(event, Progress) and self.dashboard.due(event.step):
                    self.dashboard.draw(self._take_snapshot(ON_PAGE))

    def save(self) -> None:
        """Writes the checkpoint, and the weights alone for --save."""
        about = {"config": dict(self.config), "data_sha256": self.data_sha256}
        self.run.save({**about, **self.trainer.state_dict()})
        if self.config["save"]:
            save_weights(self.trainer.air, Path(self.config["save"]))

    def _take_snapshot(self, num_scenes: int) -> Snapshot:
        trainer = self.trainer
        return take_snapshot(
            trainer.air,
            trainer.held_out,
            trainer.step,
            trainer.settings.seed,
            trainer.miscounted,
            num_scenes,
            trainer.prior.learnt,
        )


class SilentRecorder:
    """In place of a `Recorder` in all processes but the first: writes nothing."""

    run = None
    dashboard = None

    def handle(self, event: Event) -> None:
        """Ignores an event."""

    def save(self) -> None:
        """Writes nothing."""


def restore_trainer(
    trainer: Trainer, state: dict[str, Any], source: Path, data_sha256: str
) -> None:
    """Restores a trainer from the checkpoint of its run.

    Raises:
        CheckpointError: If it is the checkpoint of another run, or of other scenes.
    """
    if state.get("data_sha256") != data_sha256:
        raise CheckpointError(f"{source} was trained on other scenes than these")
    try:
        with warnings.catch_warnings(action="ignore"):
            check_progress(state)
            trainer.load_state_dict(state)
    except Exception as error:  # a foreign file can hold anything
        raise CheckpointError(f"{source} holds no state of this run: {error!r}") from error


def final_evaluations(trainer: Trainer, run: RunFolder, config: Mapping[str, Any]) -> Iterator[str]:
    """The evaluations of --evaluate and --refine; writes them, and yields a line about each."""
    num_scenes = len(trainer.held_out.images)
    if config["evaluate"]:
        evaluated = trainer.evaluate(num_scenes, iwae_samples=config["iwae_samples"])
        run.write_json("evaluation.json", evaluated.record())
        bound, error = evaluated.result.bound, evaluated.result.bound_se
        assert bound is not None
        assert error is not None
        yield f"log p(x) is at least {with_error(bound, error)} nats."
    if config["refine"]:
        start = time.perf_counter()
        evaluated = trainer.evaluate(num_scenes, refine=True)
        seconds = (time.perf_counter() - start) / num_scenes
        run.write_json("refined.json", {**evaluated.record(), "seconds_per_scene": seconds})
        result = evaluated.result
        found = f"scenes by inferred count {result.count_histogram}"
        if result.counts is not None:
            found = f"count accuracy {result.counts.accuracy_mode:.1%} by mode"
        yield f"With refined latents, in {1e3 * seconds:.1f} ms a scene: {found}."
