"""The run's folder: what is written, what is refused, and in which words."""

import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from conftest import small_air

from air import AIR
from air.checkpoint import (
    FORMAT,
    CheckpointError,
    RunFolder,
    load_weights,
    save_weights,
    write_atomically,
)


def test_saved_and_loaded_state_is_the_same(tmp_path: Path, air: AIR) -> None:
    run = RunFolder.create(tmp_path / "run", 0)
    about = {"config": {"a": [1, None, "x"]}, "optimizer": {}}
    run.save({"step": 3, "model": air.state_dict(), **about})
    state = RunFolder.open(run.path).load()
    assert state["step"] == 3
    assert state["config"] == {"a": [1, None, "x"]}
    other = small_air()
    load_weights(other, run.checkpoint)
    for a, b in zip(air.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_alone_are_a_plain_state_dict(tmp_path: Path, air: AIR) -> None:
    save_weights(air, tmp_path / "weights.pt")
    assert set(torch.load(tmp_path / "weights.pt", weights_only=True)) == set(air.state_dict())
    load_weights(small_air(), tmp_path / "weights.pt")


def test_the_default_folder_carries_time_and_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunFolder.create(None, 17).path.match("runs/20*-seed17")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(CheckpointError, match=r"--output-dir must be .* not empty.*--resume"):
        RunFolder.create(tmp_path, 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write into --output-dir"):
        RunFolder.create(tmp_path / "file" / "run", 0)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no folder of a run"):
        RunFolder.open(tmp_path / "missing")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint.pt"
    target.write_text("good")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, fail)
    assert target.read_text() == "good"
    assert list(tmp_path.iterdir()) == [target]


def test_metrics_are_lines_of_json(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", 0)
    assert run.read_metrics() == []
    run.log({"step": 1, "elbo": 2.5})
    run.log({"step": 2, "elbo": math.nan})
    with run.metrics.open("a") as file:
        file.write('{"step": 3, "el')  # cut off by a kill
    assert run.read_metrics() == [{"step": 1, "elbo": 2.5}, {"step": 2, "elbo": None}]
    for step in (0, 1, 2, 30):
        run.snapshots.mkdir(exist_ok=True)
        (run.snapshots / f"{step:08}.npz").write_text("")
    run.rewind(1)
    assert sorted(path.name for path in run.snapshots.iterdir()) == ["00000000.npz", "00000001.npz"]
    run.log({"step": 2, "elbo": 3.0})
    lines = run.metrics.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "elbo": 2.5},
        {"step": 2, "elbo": 3.0},
    ]


def test_no_pickle_is_ever_executed(tmp_path: Path, air: AIR) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"model": Trap()}, tmp_path / "trap.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Trap()))
    for name in ("trap.pt", "raw.pt"):
        with pytest.raises(CheckpointError, match="no readable file of weights"):
            load_weights(air, tmp_path / name)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 no zip"])
def test_foreign_files_are_refused(tmp_path: Path, air: AIR, content: bytes) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights\.pt is no readable file of weights"):
        load_weights(air, path)
    with pytest.raises(CheckpointError, match="there is no file"):
        load_weights(air, tmp_path / "missing.pt")


def test_truncated_checkpoints_are_refused(tmp_path: Path, air: AIR) -> None:
    run = RunFolder.create(tmp_path / "run", 0)
    run.save({"step": 3, "model": air.state_dict()})
    whole = run.checkpoint.read_bytes()
    for size in (1, len(whole) // 2, len(whole) - 1):
        run.checkpoint.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="no readable file of weights"):
            run.load()


def test_newer_formats_and_plain_weights_are_no_checkpoints(tmp_path: Path, air: AIR) -> None:
    run = RunFolder.create(tmp_path / "run", 0)
    torch.save({"format": FORMAT + 1}, run.checkpoint)
    with pytest.raises(CheckpointError, match="newer than this program's"):
        run.load()
    torch.save({"format": FORMAT}, run.checkpoint)
    with pytest.raises(CheckpointError, match="is no whole checkpoint"):
        run.load()
    save_weights(air, run.checkpoint)
    with pytest.raises(CheckpointError, match="is no checkpoint of a run"):
        run.load()


def test_runs_begun_in_the_same_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "now")
    paths = [RunFolder.create(None, seed).path.name for seed in (4, 4, 5, 4)]
    assert paths == ["now-seed4", "now-seed4-2", "now-seed5", "now-seed4-3"]


def test_constants_of_the_prior_must_be_those_of_the_flags(tmp_path: Path) -> None:
    save_weights(small_air(scale_prior_sd=0.1), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"z_where_scale_prior is \[0.1.* by the flags \[0.2"):
        load_weights(small_air(), tmp_path / "weights.pt")
    load_weights(small_air(scale_prior_sd=0.1), tmp_path / "weights.pt")


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    save_weights(small_air(z_what_size=4), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"do not fit these settings: .* expected .* more"):
        load_weights(small_air(), tmp_path / "weights.pt")
    save_weights(small_air(embed_net=[5]), tmp_path / "embedded.pt")
    with pytest.raises(CheckpointError, match=r"embed\.seq\.0\.weight is unknown"):
        load_weights(small_air(), tmp_path / "embedded.pt")
