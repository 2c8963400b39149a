"""What training tells: lines for metrics.jsonl and for reading."""

from dataclasses import replace

from helpers import EVALUATION

from air.training.events import Evaluated, Progress


def test_progress_for_the_log_and_beside_a_bar() -> None:
    progress = Progress(20, 601.26, 0, 45.0, 1e-3, [1e-4, 1e-4], 1234.5, 19.3, 3.5)
    assert {"step", "elbo", "skipped", "grad_norm", "seconds"} <= set(progress.record())
    assert str(progress) == "ELBO 601.3 nats, 1234 images/s"
    assert "3 steps skipped" in str(replace(progress, skipped=3))


def test_an_evaluation_for_the_log() -> None:
    record = Evaluated(7, 3, EVALUATION, 480.0, "alarm").record()
    assert record["step"] == 7
    assert record["eval_elbo"] == 630.12
    assert record["eval_scenes"] == 3
    assert record["alarm"] == "alarm"
    assert record["confusion"] == [[1, 0, 0], [1, 0, 1]]
    assert "elbo" not in record  # that of training batches


def test_an_evaluation_for_reading() -> None:
    first, header, *rows, last = str(Evaluated(7, 3, EVALUATION, 480.0, None)).splitlines()
    assert "3 held-out scenes: ELBO 630.1 ± 0.5 nats, count accuracy 50.0% by mode" in first
    assert header.split() == ["true", "\\", "inferred", "0", "1", "2"]
    assert [row.split() for row in rows] == [
        ["0", "1", "0", "0", "100.0%", "right"], ["1", "1", "0", "1", "0.0%", "right"]
    ]  # fmt: skip
    accuracies = "below 11 px 50.0%, 11 to 17 px 75.0%, above 17 px 100.0%"
    assert last == f"  count accuracy by distance of centres: {accuracies}"
    some = EVALUATION._replace(accuracy_by_distance=[None, 0.75, None])
    assert str(Evaluated(7, 3, some, 480.0, None)).endswith(" of centres: 11 to 17 px 75.0%")
    for unknown in (None, [None] * 3):
        text = str(Evaluated(7, 3, EVALUATION._replace(accuracy_by_distance=unknown), 480.0, None))
        assert len(text.splitlines()) == 4
    many = EVALUATION._replace(confusion=[[1, 0, 0], [0, 0, 0], [0, 1, 1], [0, 0, 2]])
    text = str(Evaluated(7, 3, many, 480.0, None))
    assert "  count off by at most one: 75.0%" in text.splitlines()
    assert [line.endswith("right") for line in text.splitlines()[2:6]] == [True, False, True, False]
    blind = EVALUATION._replace(confusion=None, accuracy_mode=None, accuracy_sample=None)
    assert "by inferred count [2, 0, 1]" in str(Evaluated(7, 3, blind, 480.0, None))
