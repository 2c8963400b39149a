"""The run's folder: what is written, what is refused, and in which words."""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from helpers import ROOT, load_weights, small_air

from air import AIR
from air.storage.checkpoint import CheckpointError, read_state
from air.storage.files import quoted
from air.storage.run_folder import RunFolder


def test_saved_and_loaded_state_is_the_same(tmp_path: Path, air: AIR) -> None:
    run = RunFolder.create(tmp_path / "run", 0)
    about = {"config": {"a": [1, None, "x"]}, "optimizer": {}}
    run.save({"step": 3, "model": air.state_dict(), **about})
    path, checkpoint = run.path, run.checkpoint
    del run
    state = RunFolder.open(path).load()
    assert state["step"] == 3
    assert state["config"] == {"a": [1, None, "x"]}
    other = small_air()
    load_weights(other, checkpoint)
    for a, b in zip(air.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


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


def test_metrics_are_lines_of_json(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", 0)
    assert run.read_metrics() == []
    run.log({"step": 1, "elbo": 2.5})
    run.log({"step": 2, "elbo": math.nan, "bins": [[1, math.inf], [0.5]]})
    with run.metrics.open("a") as file:
        file.write('{"step": 3, "el')  # cut off by a kill
    assert run.read_metrics() == [
        {"step": 1, "elbo": 2.5},
        {"step": 2, "elbo": None, "bins": [[1, None], [0.5]]},
    ]
    for step in (0, 1, 2, 30):
        run.snapshots.mkdir(exist_ok=True)
        (run.snapshots / f"{step:08}.npz").write_text("")
    run.truncate_after(1)
    assert sorted(path.name for path in run.snapshots.iterdir()) == ["00000000.npz", "00000001.npz"]
    run.log({"step": 2, "elbo": 3.0})
    lines = run.metrics.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "elbo": 2.5},
        {"step": 2, "elbo": 3.0},
    ]


def test_runs_begun_in_the_same_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "now")
    paths = [RunFolder.create(None, seed).path.name for seed in (4, 4, 5, 4)]
    assert paths == ["now-seed4", "now-seed4-2", "now-seed5", "now-seed4-3"]


def save(run: RunFolder, air: AIR, step: int) -> None:
    run.save({"step": step, "model": air.state_dict(), "config": {}, "optimizer": {}})


def test_the_checkpoint_before_is_offered_where_the_last_is_damaged(
    tmp_path: Path, air: AIR
) -> None:
    run = RunFolder.create(tmp_path / "run", 0)
    for step in (1000, 2000):
        save(run, air, step)
        run.log({"step": step})
    path, checkpoint, previous = run.path, run.checkpoint, run.previous
    del run
    with pytest.raises(CheckpointError, match=r"checkpoint.pt is whole: --resume"):
        RunFolder.open(previous).load()  # or what came after it would be lost
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt is no .* before it is whole: --"):
        RunFolder.open(path).load()
    run = RunFolder.open(previous)
    assert run.load()["step"] == 1000
    run.truncate_after(1000)
    assert [read_state(file)["step"] for file in (checkpoint, previous)] == [1000, 1000]
    assert [record["step"] for record in run.read_metrics()] == [1000]
    del run
    previous.write_bytes(b"")
    checkpoint.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt is no readable") as refused:
        RunFolder.open(path).load()
    assert "the one before" not in str(refused.value)


def test_only_the_checkpoints_of_a_run_are_gone_on_with(tmp_path: Path, air: AIR) -> None:
    run = RunFolder.create(tmp_path / "run", 0)
    save(run, air, 1)
    shutil.copy(run.checkpoint, run.path / "copy.pt")
    for name in ("copy.pt", "metrics.jsonl"):
        with pytest.raises(CheckpointError, match="is no folder of a run"):
            RunFolder.open(run.path / name)


def test_two_processes_cannot_have_the_same_folder(tmp_path: Path, air: AIR) -> None:
    run = RunFolder.create(tmp_path / "run", 0)
    save(run, air, 1)
    code = (
        "import sys; from pathlib import Path; from air.storage.run_folder import RunFolder\n"
        "folder = Path(sys.argv[1])\n"
        "for begin in (lambda: RunFolder.open(folder), lambda: RunFolder.create(folder, 0)):\n"
        "    try: run = begin(); print('in'); del run\n"
        "    except ValueError as error: print(error)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(run.path)]
    root = ROOT
    said = subprocess.check_output(command, cwd=root, text=True).splitlines()
    assert said == [f"{run.path} is in use by another process"] * 2
    del run  # as at its end
    said = subprocess.check_output(command, cwd=root, text=True).splitlines()
    assert said[0] == "in"
    assert "is not empty" in said[1]


def test_what_a_killed_run_left_half_written_is_cleared_away(tmp_path: Path, air: AIR) -> None:
    run = RunFolder.create(tmp_path / "run", 0)
    save(run, air, 1)
    run.snapshots.mkdir()
    halves = [
        run.path / ".checkpoint.pt.77.tmp", run.path / ".checkpoint.previous.pt.77.tmp",
        run.path / ".config.json.77.tmp", run.path / ".metrics.jsonl.77.tmp",
        run.snapshots / ".00000004.npz.77.tmp", run.figures / ".curves.png.77.tmp",
    ]  # fmt: skip
    for path in (*halves, run.path / ".mine.tmp"):
        path.write_text("half")
    path = run.path
    del run
    RunFolder.open(path).truncate_after(1)
    assert not any(half.exists() for half in halves)
    assert (path / ".mine.tmp").exists()


def test_a_full_disk_is_found_in_logging(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", 0)
    run.metrics = Path("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        run.log({"step": 1})


def test_a_folder_of_runs_that_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to("unmounted")
    with pytest.raises(CheckpointError, match="cannot write into --output-dir"):
        RunFolder.create(None, 0)


def test_a_line_that_is_no_record_is_refused(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", 0)
    for line in (b"{]", b"3", b"[1, 2]", b"{}", b'{"step": "x"}', b'{"step": "\xff"}'):
        run.metrics.write_bytes(b'{"step": 1}\n' + line + b"\n")
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl: line 2 is no record"):
            run.read_metrics()
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl: line 2 is no record"):
            run.truncate_after(2)
        run.truncate_after(1)  # writes it again
        assert run.read_metrics() == [{"step": 1}]


ODD_NAMES = ["o 11", "it's", "$HOME", "a;b", "-x", "~", "*", "caf\u00e9", "two\nlines", "a\\b"]


@pytest.mark.skipif(os.name != "posix", reason="a shell of Unix")
def test_a_printed_path_can_be_copied_into_a_shell() -> None:
    for name in [*ODD_NAMES, "r\udcff\u00e91"]:  # the last is no text
        word = quoted(Path(name))
        assert word.isprintable()
        copied = subprocess.check_output(["bash", "-c", f"printf %s {word}"])
        assert os.path.normpath(os.fsdecode(copied)) == name
        assert not copied.startswith(b"-")
    assert quoted("runs/20260101-seed0") == "runs/20260101-seed0"


def test_on_windows_paths_are_quoted_for_its_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        given = quoted(r"C:\my runs\1"), quoted(r"runs\1")
    assert given == (r'"C:\my runs\1"', r"runs\1")


def test_every_advice_names_the_folder_so_that_it_can_be_copied(tmp_path: Path, air: AIR) -> None:
    run = RunFolder.create(tmp_path / "o 11", 0)
    for step in (1, 2):
        save(run, air, step)
    folder = shlex.quote(str(run.path))
    assert run.resume_command().endswith(f" --resume {folder}")
    assert run.resume_hint().endswith(f" --resume {folder}")
    run.close()
    with pytest.raises(CheckpointError) as refused:
        RunFolder.create(run.path, 0)
    assert str(refused.value).endswith(f"--resume {folder}")
    with pytest.raises(CheckpointError) as refused:
        RunFolder.open(run.previous).load()
    assert str(refused.value).endswith(f"--resume {folder}")
    run.checkpoint.write_bytes(b"")
    with pytest.raises(CheckpointError) as refused:
        RunFolder.open(run.path).load()
    assert str(refused.value).endswith(f"--resume {shlex.quote(str(run.previous))}")


def command(monkeypatch: pytest.MonkeyPatch, *started_as: str, **environment: str) -> str:
    """The command that resumes runs/1, printed by a program that was started so."""
    monkeypatch.setattr(sys, "argv", [*started_as])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return RunFolder(Path("runs/1")).resume_command()


def test_the_command_names_the_program_as_it_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    installed = Path(sysconfig.get_path("purelib"), "pytest", "__main__.py")
    assert installed.is_file()
    scripts = ["main.py", "my_air.py", "my programs/main.py", str(tmp_path / "main.py")]
    for script in scripts:
        Path(script).parent.mkdir(exist_ok=True)
        Path(script).write_text("")
        expected = f"python {shlex.quote(script)} --resume runs/1"
        assert command(monkeypatch, script, "-n", "3") == expected
    notebook, console = str(installed.parent / "other.py"), str(tmp_path / "bin" / "air-train")
    for other in (["-c"], [""], [], [str(installed)], ["bin/pytest"], ["no.py"], [notebook]):
        assert command(monkeypatch, *other) == "python main.py --resume runs/1", other
    assert command(monkeypatch, console) == f"{console} --resume runs/1"
    Path(console).write_text("#!/bin/sh\n")
    Path(console).chmod(0o755)
    assert command(monkeypatch, console) == "air-train --resume runs/1"
    assert command(monkeypatch, f"{console}.exe") == "air-train --resume runs/1"


def test_under_torchrun_the_command_starts_as_many_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("main.py").write_text("")
    ranks = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"}
    given = command(monkeypatch, "main.py", **ranks)
    assert given == "torchrun --nproc-per-node 2 main.py --resume runs/1"
    given = command(monkeypatch, "/nowhere/air-train")
    own = "/nowhere/air-train" if shutil.which("air-train") is None else "air-train"
    assert given == f"torchrun --nproc-per-node 2 --no-python {own} --resume runs/1"
    given = command(monkeypatch, "main.py", GROUP_WORLD_SIZE="2")
    assert given == "the same torchrun command and --resume runs/1"
