"""Writes down what training tells: metrics, checkpoints, snapshots, and the live page."""

import sys
import time
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from air.storage.checkpoint import CheckpointError, save_weights
from air.storage.run_folder import RunFolder
from air.training.events import CheckpointDue, Event, Progress, SnapshotDue
from air.training.trainer import Trainer
from air.visualization.dashboard import Dashboard
from air.visualization.snapshots import SCENES, Snapshot, save_snapshot, take_snapshot
from air.visualization.visdom_panes import ON_PAGE


class Recorder:
    """Keeps a run's folder, and its live page where there is one.

    Args:
        run: The folder.
        trainer: What trains.
        config: Every flag's value.
        data_sha256: The hash of the scenes.
        dashboard: The live page, or None.
    """

    def __init__(
        self,
        run: RunFolder,
        trainer: Trainer,
        config: Mapping[str, Any],
        data_sha256: str,
        dashboard: Dashboard | None,
    ) -> None:
        self.run, self.trainer, self.dashboard = run, trainer, dashboard
        self._config = dict(config)
        self._data_sha256 = data_sha256

    def handle(self, event: Event) -> None:
        """Writes down what an event brings, and draws it where that is asked for."""
        if isinstance(event, CheckpointDue):
            self.save()
        elif isinstance(event, SnapshotDue):
            snapshot = self._look(SCENES)
            save_snapshot(self.run.snapshots, snapshot)
            if self.dashboard:
                self.dashboard.draw(snapshot)
        else:
            record = event.record()
            self.run.log(record)
            if self.dashboard:
                self.dashboard.record(record)
            if self.dashboard and isinstance(event, Progress) and self.dashboard.due(event.step):
                start = time.monotonic()
                self.dashboard.draw(self._look(ON_PAGE), time.monotonic() - start)

    def save(self) -> None:
        """Writes the checkpoint, and the weights alone where --save asks for them."""
        about = {"config": self._config, "data_sha256": self._data_sha256}
        self.run.save({**about, **self.trainer.state_dict()})
        if self._config["save"]:
            save_weights(self.trainer.air, Path(self._config["save"]))

    def _look(self, number: int) -> Snapshot:
        """At the first held-out scenes, with the model as it is."""
        trainer = self.trainer
        what = trainer.held_out, trainer.step, trainer.settings.seed, trainer.miscounted
        return take_snapshot(trainer.air, *what, number, trainer.learnt_prior)


def restore_trainer(
    trainer: Trainer, state: dict[str, Any], source: Path, data_sha256: str
) -> None:
    """Takes a trainer to where its run was saved.

    Raises:
        CheckpointError: If it was another run, or other scenes.
    """
    if state.get("data_sha256") != data_sha256:
        raise CheckpointError(f"{source} was trained on other scenes than these")
    try:
        with warnings.catch_warnings(action="ignore"):
            trainer.load_state_dict(state)
    except Exception as error:  # whatever a file can hold that was not written here
        raise CheckpointError(f"{source} holds no state of this run: {error!r}") from error


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    packages = ("torch", "pyro-ppl", "numpy")
    return {"python": sys.version.split()[0]} | {name: version(name) for name in packages}
