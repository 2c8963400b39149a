"""Every event of training is kept in the run folder, and shown on the live page."""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import EVALUATION, PROGRESS, trainer

from air.cli.flags import DEFAULTS
from air.cli.recorder import Recorder
from air.storage.checkpoint import read_state, read_weights
from air.storage.run_folder import RunFolder
from air.training.events import CheckpointDue, Evaluated, SnapshotDue
from air.visualization.dashboard import ON_PAGE, Dashboard
from air.visualization.snapshots import snapshot_files


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", 0)


def test_every_event_is_kept(run: RunFolder, tmp_path: Path) -> None:
    config = {**DEFAULTS, "save": str(tmp_path / "weights.pt")}
    running, page = trainer(), mock.create_autospec(Dashboard, instance=True)
    page.due.side_effect = lambda step: step % 20 == 0
    recorder = Recorder(run, running, config, "abc", page)
    running.step = 20
    evaluated = Evaluated(20, 3, EVALUATION, 480.0, None)
    for event in (PROGRESS, evaluated, SnapshotDue(20), CheckpointDue(20)):
        recorder.handle(event)
    recorder.handle(replace(PROGRESS, step=30))  # not due on the page
    records = [PROGRESS.record(), evaluated.record(), PROGRESS.record() | {"step": 30}]
    assert run.read_metrics() == [call.args[0] for call in page.record.mock_calls] == records
    assert list(snapshot_files(run.snapshots)) == [20]
    drawn = [call.args[0] for call in page.draw.mock_calls]
    assert [snapshot.step for snapshot in drawn] == [20, 20]
    assert len(drawn[0].scenes.images) <= ON_PAGE
    state = read_state(run.checkpoint)
    assert (state["step"], state["config"], state["data_sha256"]) == (20, config, "abc")
    weights, _ = read_weights(tmp_path / "weights.pt")
    assert all(torch.equal(weights[k], v) for k, v in running.air.state_dict().items())
