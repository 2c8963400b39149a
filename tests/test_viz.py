"""The figures of a run, drawn from its folder alone."""

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from helpers import EVALUATION, NAMES, RECORDS, make_snapshot
from PIL import Image, ImageSequence

from air import viz
from air.storage.run_folder import RunFolder
from air.training.events import Evaluated
from air.visualization import drawing
from air.visualization.curves import History
from air.visualization.snapshots import save_snapshot


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures at 50 dpi take a fraction of the time."""
    assert viz.DPI == 300
    monkeypatch.setattr(viz, "DPI", 50)


def load(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return picture.convert("RGB")


def make_run(path: Path, *steps: int, **options: Any) -> RunFolder:  # noqa: ANN401
    run = RunFolder.create(path, seed=0)
    for step in steps:
        save_snapshot(run.snapshots, make_snapshot(step, **options))
    for record in RECORDS:
        run.log(record)
    return run


@pytest.mark.slow
@pytest.mark.parametrize(("count", "wrong", "steps"), [(1, 0, 1), (70, 40, 3)])
def test_the_last_snapshot_of_a_run_is_drawn(
    tmp_path: Path, count: int, wrong: int, steps: int
) -> None:
    options = {"count": count, "wrong": wrong, "steps": steps}
    run = make_run(tmp_path / "run", 900, 1000, **options)
    (run.figures / "inferred.png").write_text("old")  # is replaced
    viz.draw_run(run)
    assert {path.name for path in run.figures.iterdir()} == {f"{name}.png" for name in NAMES}
    assert all(min(load(path).size) >= 100 for path in run.figures.iterdir())
    snapshot = make_snapshot(1000, **options)
    expected = {**drawing.sheets(snapshot, 8, 4), "scenes": drawing.overview(snapshot, 4)}
    for name, sheet in expected.items():
        np.testing.assert_array_equal(load(run.figures / f"{name}.png"), sheet)
    with Image.open(run.figures / "inferred.png") as picture:
        assert picture.info["dpi"] == pytest.approx((viz.DPI, viz.DPI), abs=0.1)


@pytest.mark.slow
def test_an_animation_shows_one_snapshot_after_another(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", *range(0, 1000, 20))
    viz.draw_run(run, gif=True)
    with Image.open(run.figures / "learning.gif") as gif:
        assert gif.n_frames == viz.FRAMES
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(gif)]
        assert gif.info["duration"] == viz.LAST_MS
    for frame, step in ((frames[0], 0), (frames[-1], 980)):  # of 255: a GIF has few colours
        expected = drawing.overview(make_snapshot(step), 2).astype(int)
        assert np.abs(frame - expected).mean() < 1
        boxes = (expected == drawing.STEP_COLOURS[0]).all(-1)
        assert np.abs(frame[boxes] - drawing.STEP_COLOURS[0]).max() < 20
    assert (frames[0] != frames[1]).any()  # the number of the step


@pytest.mark.slow
def test_figures_are_the_same_whatever_matplotlibrc_says_and_stay_after_a_failed_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LaTeX may be missing."""
    run = make_run(tmp_path / "run", 1, count=4)
    viz.draw_run(run)
    before = {path.name: path.read_bytes() for path in run.figures.iterdir()}
    with mpl.rc_context({"savefig.dpi": 99, "savefig.bbox": "tight", "font.size": 30}):
        mpl.rcParams["text.usetex"] = True
        viz.draw_run(run)
    assert {path.name: path.read_bytes() for path in run.figures.iterdir()} == before
    monkeypatch.delattr(Path, "replace")
    with pytest.raises(AttributeError, match="replace"):
        viz.draw_run(run)
    assert {path.name: path.read_bytes() for path in run.figures.iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "records",
    [
        [], RECORDS[-1:], [{"step": 0, "elbo": -math.inf}],
        [*RECORDS, {"step": 20, "eval_elbo": 410.0, "accuracy_mode": None, "confusion": None}],
        [*RECORDS, {"step": 21, "elbo": math.nan}, {"step": 22, "reliability": None}],
        [{"step": 5, "confusion": np.arange(12).reshape(3, 4).tolist(), "grad_norm": 0.0}],
        [{"step": step, "grad_norm": 10.0**-step, "kl_pres": -0.1} for step in range(9)],
        [Evaluated(7, 3, EVALUATION, 480.0, None).record()],
    ],
)  # fmt: skip
def test_curves_draw_what_is_there(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    path = tmp_path / "curves.png"
    viz.save_figure(path, viz.curves(History(records)))
    picture = load(path)
    assert picture.width == 355
    assert (len(picture.getcolors(1 << 24) or []) > 1) == bool(records)


def test_reliability_is_drawn_with_its_intervals() -> None:
    bins = [[10.0, 0.05, 1.0], [0.0] * 3, *([10.0**m, 0.1 * m, 1 - 0.1 * m] for m in range(1, 9))]
    (axes,) = viz.curves(History([{"step": 5, "reliability": bins}])).axes
    used = np.array([each for each in bins if each[0]])
    (points, _, (intervals,)) = axes.containers[0]
    np.testing.assert_allclose(np.transpose(points.get_data()), used[:, 1:])
    for (scenes, confidence, accuracy), ends in zip(used, intervals.get_segments(), strict=True):
        np.testing.assert_allclose(ends[:, 0], confidence)
        for end in ends[:, 1]:  # Wilson's interval ends where the accuracy is 1.96 errors away
            error = 1.96 * math.sqrt(end * (1 - end) / scenes)
            assert abs(accuracy - end) == pytest.approx(error, rel=1e-3, abs=1e-9)


@pytest.mark.slow
def test_the_program_draws_a_run_or_says_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", 5)
    assert viz.main([str(run.path), "--gif"]) == 0
    assert str(run.figures) in capsys.readouterr().out
    assert (run.figures / "learning.gif").is_file()
    (tmp_path / "empty").mkdir()
    torn = make_run(tmp_path / "torn", 5)
    (torn.snapshots / "00000005.npz").write_bytes(b"PK")
    odd = make_run(tmp_path / "odd", 5)
    odd.metrics.write_text("{]\n")
    for name in ("empty", "torn", "odd", "missing"):
        with pytest.raises(SystemExit) as ended:
            viz.main([str(tmp_path / name)])
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        assert name in said
