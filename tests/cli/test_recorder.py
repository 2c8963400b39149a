"""Every event of training is kept in the run folder, and shown on the live page."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EVALUATION, PROGRESS, trainer

from air.cli.flags import DEFAULTS
from air.cli.recorder import Recorder
from air.storage.checkpoint import read_weights
from air.storage.run_folder import RunFolder
from air.training.events import CheckpointDue, Evaluated, SnapshotDue
from air.visualization.snapshots import Snapshot, snapshot_files
from air.visualization.visdom_panes import ON_PAGE


class Page:
    """Stands in for a dashboard; remembers the calls."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.records: list[Any] = []
        self.drawn: list[tuple[int, int]] = []

    def record(self, record: Any) -> None:  # noqa: ANN401
        self.records.append(record)

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def draw(self, snapshot: Snapshot) -> None:
        self.drawn.append((snapshot.step, len(snapshot.scenes.images)))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", 0)


def test_every_event_is_kept(run: RunFolder, tmp_path: Path) -> None:
    config = {**DEFAULTS, "save": str(tmp_path / "weights.pt")}
    running, page = trainer(), Page(every=20)
    recorder = Recorder(run, running, config, "abc", page)  # type: ignore[arg-type]
    running.step = 20
    evaluated = Evaluated(20, 3, EVALUATION, 480.0, None)
    for event in (PROGRESS, evaluated, SnapshotDue(20), CheckpointDue(20)):
        recorder.handle(event)
    assert run.read_metrics() == page.records == [PROGRESS.record(), evaluated.record()]
    assert list(snapshot_files(run.snapshots)) == [20]
    assert [step for step, _ in page.drawn] == [20, 20]
    assert page.drawn[0][1] <= ON_PAGE
    state = run.load()
    assert (state["step"], state["config"], state["data_sha256"]) == (20, config, "abc")
    weights, _ = read_weights(tmp_path / "weights.pt")
    assert all(torch.equal(weights[k], v) for k, v in running.air.state_dict().items())
    recorder.handle(replace(PROGRESS, step=30))  # not due on the page
    assert len(page.drawn) == 2


def test_without_a_page(run: RunFolder) -> None:
    recorder = Recorder(run, trainer(), DEFAULTS, "", None)
    recorder.handle(PROGRESS)
    recorder.handle(SnapshotDue(0))
    assert len(run.read_metrics()) == len(snapshot_files(run.snapshots)) == 1
