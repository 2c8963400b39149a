"""The run's folder: the files in it, the folders that are refused, and in which words."""

import contextlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import load_weights, small_air

from air.storage.checkpoint import CheckpointError, read_state
from air.storage.files import quoted
from air.storage.run_folder import RunFolder, fcntl


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """The folder of a run, with a checkpoint."""
    run = RunFolder.create(tmp_path / "run", 0)
    config = {"a": [1, None, "x"]}
    run.save({"step": 3, "model": small_air().state_dict(), "config": config, "optimizer": {}})
    return run


def test_the_default_folder_carries_time_and_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunFolder.create(None, 17).path.match("runs/20*-seed17")
    monkeypatch.setattr("time.strftime", lambda form: "now")  # in the same second
    paths = [RunFolder.create(None, seed).path.name for seed in (4, 4, 5, 4)]
    assert paths == ["now-seed4", "now-seed4-2", "now-seed5", "now-seed4-3"]


def test_nothing_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(CheckpointError, match=r"--output-dir: .* not empty.*--resume"):
        RunFolder.create(tmp_path, 0)
    (tmp_path / "runs").symlink_to("unmounted")
    for path in ("mine.txt/run", "mine.txt", None):
        with pytest.raises(CheckpointError, match="cannot write into --output-dir"):
            RunFolder.create(path, 0)


def test_a_run_is_opened_by_its_folder_or_its_checkpoint(run: RunFolder) -> None:
    run.close()
    shutil.copy(run.checkpoint, run.path / "copy.pt")
    for name in ("copy.pt", "figures", "missing"):
        message = rf"{name} is not a run folder: checkpoint\.pt is missing"
        with pytest.raises(CheckpointError, match=message):
            RunFolder.open(run.path / name)
    for path in (run.path, run.checkpoint):
        with contextlib.closing(RunFolder.open(path)) as opened:
            assert opened.path == run.path
            state = read_state(opened.checkpoint)
    assert (state["step"], state["config"]) == (3, {"a": [1, None, "x"]})
    load_weights(saved := small_air(), run.checkpoint)
    assert all(torch.equal(state["model"][name], w) for name, w in saved.state_dict().items())


@pytest.mark.skipif(fcntl is None, reason="a system without locks")
def test_a_folder_is_of_one_run_at_a_time(tmp_path: Path) -> None:
    run = RunFolder.create(path := tmp_path / "run", 0)
    run.save({})
    for begin in (RunFolder.open, lambda path: RunFolder.create(path, 0)):
        with pytest.raises(CheckpointError, match="run is in use by another process"):
            begin(path)
    assert RunFolder.open(path, lock=False).read_metrics() == []
    del run  # as at the end of its process
    RunFolder.open(path)


def test_metrics_are_lines_of_json(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", 0)
    assert run.read_metrics() == []
    run.log({"step": 1, "elbo": 2.5})
    run.log({"step": 2, "elbo": math.nan, "bins": [[1, math.inf], [0.5]]})
    with run.metrics.open("a") as file:
        file.write('{"step": 3, "el')  # cut off by a kill
    first, second = {"step": 1, "elbo": 2.5}, {"step": 2, "elbo": None, "bins": [[1, None], [0.5]]}
    assert run.read_metrics() == [first, second]
    assert run.read_metrics(until=1) == [first]
    for step in (0, 1, 2, 30):
        run.snapshots.mkdir(exist_ok=True)
        (run.snapshots / f"{step:08}.npz").write_text("")
    run.truncate_after(1)
    assert sorted(path.name for path in run.snapshots.iterdir()) == ["00000000.npz", "00000001.npz"]
    run.log({"step": 1, "eval_elbo": 3.0})
    assert [*map(json.loads, run.metrics.read_text().splitlines())][1:] == [
        {"step": 1, "eval_elbo": 3.0}
    ]
    run.truncate_after(1, finished=True)  # its last evaluation is done again
    assert run.read_metrics() == [first]


def test_a_damaged_line_is_refused(run: RunFolder) -> None:
    for line in (b"{]", b"3", b"[1, 2]", b"{}", b'{"step": "x"}', b'{"step": "\xff"}'):
        run.metrics.write_bytes(b'{"step": 1}\n' + line + b"\n")
        for read in (run.read_metrics, lambda: run.truncate_after(2)):
            with pytest.raises(CheckpointError, match=r"metrics\.jsonl: line 2 is damaged"):
                read()
        run.truncate_after(1)  # writes it again
        assert run.read_metrics() == [{"step": 1}]


def test_temporary_files_of_a_killed_run_are_deleted(run: RunFolder) -> None:
    run.snapshots.mkdir()
    halves = [
        run.path / ".checkpoint.pt.77.tmp", run.path / ".config.json.77.tmp",
        run.path / ".metrics.jsonl.77.tmp", run.snapshots / ".00000004.npz.77.tmp",
        run.figures / ".curves.png.77.tmp",
    ]  # fmt: skip
    for path in (*halves, run.path / ".mine.tmp"):
        path.write_text("half")
    run.truncate_after(1)
    assert not any(half.exists() for half in halves)
    assert (run.path / ".mine.tmp").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
def test_a_full_disk_is_found_in_logging(run: RunFolder) -> None:
    run.metrics = Path("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        run.log({"step": 1})


@pytest.mark.skipif(os.name != "posix", reason="a shell of Unix")
def test_a_printed_path_can_be_copied_into_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ["o 11", "it's", "$HOME", "a;b", "-x", "~", "*", "caf\u00e9", "a\\b"]:
        word = quoted(Path(name))
        assert word.isprintable()
        copied = subprocess.check_output(["bash", "-c", f"printf %s {word}"])
        assert os.path.normpath(os.fsdecode(copied)) == name
        assert not copied.startswith(b"-")
    assert quoted("runs/20260101-seed0") == "runs/20260101-seed0"
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        given = quoted(r"C:\my runs\1"), quoted(r"runs\1")
    assert given == (r'"C:\my runs\1"', r"runs\1")


def test_every_advice_names_the_folder_so_that_it_can_be_copied(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "o 11", 0)
    assert run.resume_hint() == "No checkpoint was written yet"
    run.save({})
    advice = f" --resume {shlex.quote(str(run.path))}"
    assert run.resume_hint().endswith(run.resume_command())
    assert run.resume_command().endswith(advice)
    run.close()
    with pytest.raises(CheckpointError) as refused:
        RunFolder.create(run.path, 0)
    assert str(refused.value).endswith(advice)


def test_the_command_names_the_program_as_it_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def start(*words: str) -> str:
        """The start of the command by a program that was started so."""
        monkeypatch.setattr(sys, "argv", [*words])
        return RunFolder(Path("runs/1")).resume_command().removesuffix(" --resume runs/1")

    for script in ("main.py", "my programs/my_air.py", str(tmp_path / "main.py")):
        Path(script).parent.mkdir(exist_ok=True)
        Path(script).write_text("")
        assert start(script, "-n", "3") == f"python {shlex.quote(script)}"
    installed = Path(pytest.__file__).with_name("__main__.py")
    assert installed.is_file()
    for other in (["-c"], [""], [], [str(installed)], ["bin/pytest"], ["no.py"]):
        assert start(*other) == "python main.py", other
    for console in ("/bin/air-train", "/bin/air-train.exe"):
        assert start(console) == console
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert start("main.py") == "the same torchrun command and"
