"""The loop: its events, and that a resumed run ends as one that never stopped."""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pyro
import pytest
import torch
from helpers import SETTINGS, capture_only, run_until, saved, small_air, trainer, weights

from air.inference import infer
from air.priors import geometric_presence, presence_from_counts
from air.storage.checkpoint import check_progress
from air.training.events import CheckpointDue, Evaluated, Progress, SnapshotDue
from air.training.schedules import learning_rate_factor
from air.training.trainer import MAX_SKIPPED, SYNC_EVERY
from air.training.training_settings import Estimator, TrainingSettings


def without_times(event: Any) -> Any:  # noqa: ANN401
    times = {"images_per_second": 0.0, "steps_per_second": 0.0, "seconds": 0.0}
    return replace(event, **times) if isinstance(event, Progress) else event


def test_events_come_when_they_are_due() -> None:
    events = list(trainer().train())
    steps = {
        kind: [e.step for e in events if isinstance(e, kind)]
        for kind in (Progress, Evaluated, CheckpointDue, SnapshotDue)
    }
    assert steps == {
        Progress: [3, 6, 9, 12], Evaluated: [4, 8, 12], CheckpointDue: [5, 10, 12],
        SnapshotDue: [0, 4, 5, 8, 10, 12],
    }  # fmt: skip
    assert [e.scenes for e in events if isinstance(e, Evaluated)] == [5, 5, 7]


def test_zero_means_only_at_the_end() -> None:
    rarely = replace(SETTINGS, progress_every=0, eval_every=0, save_every=0)
    kinds = [type(e) for e in trainer(rarely).train()]
    early, last = [SnapshotDue, SnapshotDue], [Progress, CheckpointDue, Evaluated, SnapshotDue]
    assert kinds == early + last


def test_most_snapshots_are_of_the_beginning() -> None:
    rarely = replace(SETTINGS, progress_every=0, eval_every=0, save_every=0, num_steps=3000)
    running = trainer(rarely)
    running._take_step = lambda: setattr(running, "step", running.step + 1)  # type: ignore[method-assign]
    steps = [e.step for e in running.train() if isinstance(e, SnapshotDue)]
    assert steps == [0, 10, 20, 50, 100, 200, 500, 1000, 2000, 3000]


def test_cosine_schedule_falls_from_one_to_a_hundredth() -> None:
    factors = [learning_rate_factor("cosine", step, 100) for step in range(101)]
    assert factors == sorted(factors, reverse=True)
    assert [factors[0], factors[50], factors[100]] == pytest.approx([1.0, 0.505, 0.01])
    assert learning_rate_factor("constant", 70, 100) == 1.0


def test_progress_tells_of_rates_prior_and_gradients() -> None:
    settings = replace(SETTINGS, lr_schedule="cosine", learning_rate=0.5, num_steps=3)
    settings = replace(settings, progress_every=1)
    running = trainer(settings)
    norms, told = [], []
    for event in running.train():
        if isinstance(event, Progress):
            norms.append(float(running.phase.svi.grad_norm))
            told.append(event)
    factors = [learning_rate_factor("cosine", step, 3) for step in range(3)]
    assert [event.learning_rate for event in told] == pytest.approx([0.5 * f for f in factors])
    rates = [group["lr"].item() for group in running.optimizer.param_groups]
    assert rates == pytest.approx([0.5 * factors[-1], 1e-2 * factors[-1]])
    assert [event.grad_norm for event in told] == pytest.approx(norms)
    assert told[-1].z_pres_prior_p == pytest.approx([float(running.prior(t)) for t in range(3)])
    assert told[0].z_pres_prior_p[0] > told[-1].z_pres_prior_p[0]
    assert all(event.images_per_second == 4 * event.steps_per_second for event in told)


@pytest.mark.slow
def test_same_seed_same_run_and_evaluations_change_nothing() -> None:
    def run(settings: TrainingSettings, seed: int) -> tuple[list[float], list[torch.Tensor]]:
        running = trainer(settings, seed)
        return [e.elbo for e in running.train() if isinstance(e, Progress)], weights(running)

    elbos, final = run(SETTINGS, 0)
    same_elbos, same_final = run(replace(SETTINGS, eval_every=1), 0)
    assert elbos == same_elbos
    assert all(torch.equal(x, y) for x, y in zip(final, same_final, strict=True))
    assert elbos != run(SETTINGS, 1)[0]


def test_the_teacher_begins_with_the_weights_that_were_loaded() -> None:
    running = trainer(replace(SETTINGS, added_scenes=5.0, added_scenes_from=0))
    with torch.no_grad():
        for parameter in running.air.parameters():
            parameter += torch.randn_like(parameter) / 10
    running._take_step()
    teacher = running.phase.teacher
    assert teacher
    for ours, theirs in zip(running.air.parameters(), teacher.air.parameters(), strict=True):
        if ours.grad is not None:
            torch.testing.assert_close(ours, theirs.requires_grad_(), atol=2e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "captured", "estimator", "added_scenes"),
    [
        (5, True, "score", 0), (11, False, "marginal", 0),
        (1, False, "marginal", 50), (7, True, "marginal", 50),  # captured before and after step 4
    ],
)  # fmt: skip
def test_resumed_is_as_if_never_stopped(
    stop: int,
    captured: bool,
    estimator: Estimator,
    added_scenes: float,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # With validation, no step can be captured; one of three objects takes long to capture.
    of_a_size = partial(small_air, num_steps=1 if captured else 3)
    with pyro.validation_enabled(not captured), mock.patch("helpers.small_air", of_a_size):
        _compare_with_resumed(stop, captured, estimator, added_scenes)
    assert not caplog.messages  # a step that cannot be captured is told


def _compare_with_resumed(
    stop: int, captured: bool, estimator: Estimator, added_scenes: float
) -> None:
    settings = replace(
        SETTINGS, compile=captured, estimator=estimator, lr_schedule="cosine",
        added_scenes=added_scenes, added_scenes_from=4,
    )  # fmt: skip
    whole = trainer(settings, compiler=capture_only)
    expected = [without_times(e) for e in whole.train() if e.step > stop]

    stopped = trainer(settings, compiler=capture_only)
    assert all(event.step <= stop for event in run_until(stopped, stop))
    state = saved(stopped)  # before the next one sets its seed
    resumed = trainer(settings, seed=7, compiler=capture_only)
    resumed.load_state_dict(state)
    found = [without_times(e) for e in resumed.train()]

    assert found == expected
    assert all(torch.equal(x, y) for x, y in zip(weights(whole), weights(resumed), strict=True))
    assert whole.miscounted == resumed.miscounted
    teachers = [each.phases[-1].teacher for each in (whole, resumed)]
    if all(teachers):
        ours, theirs = (each.air.parameters() for each in teachers if each)
        assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.slow
def test_a_learnt_count_prior_is_the_mean_of_q(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("air.training.trainer.LEARN_PRIOR_EVERY", 3)
    settings = replace(SETTINGS, anneal_prior="none", learn_count_prior_from=5)
    whole = trainer(settings)
    told = [e for e in whole.train() if isinstance(e, Progress)]
    before = geometric_presence(0.5, 3)
    assert [e.z_pres_prior_p == before for e in told] == [True, False, False, False]
    expected = infer(whole.air, whole.images).count_probs.mean(0).tolist()
    assert whole.prior.learnt == pytest.approx(expected, rel=1e-5)
    assert whole.prior.now == presence_from_counts(whole.prior.learnt or [])
    assert [float(whole.prior(t)) for t in range(3)] == pytest.approx(whole.prior.now)

    stopped = trainer(settings)
    run_until(stopped, 7)
    state = stopped.state_dict()
    resumed = trainer(settings, seed=7)
    resumed.load_state_dict(state)
    list(resumed.train())
    assert resumed.prior.learnt == whole.prior.learnt
    assert all(torch.equal(x, y) for x, y in zip(weights(whole), weights(resumed), strict=True))


@pytest.mark.slow
def test_annealing_goes_on_from_a_count_prior_that_was_given() -> None:
    settings = replace(SETTINGS, count_prior=[4.0, 3.0, 2.0, 1.0])
    whole, stopped = trainer(settings), trainer(settings)
    list(whole.train())
    run_until(stopped, 5)
    resumed = trainer(settings)
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.prior.now == stopped.prior.now != list(resumed.prior.start)
    list(resumed.train())
    assert resumed.prior.now == whole.prior.now == pytest.approx([1e-3] * 3)


@pytest.mark.slow
def test_a_prior_is_learnt_after_it_was_annealed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("air.training.trainer.LEARN_PRIOR_EVERY", 3)
    settings = replace(SETTINGS, learn_count_prior_from=10, num_steps=14, progress_every=1)
    whole = trainer(settings)
    told = [e.z_pres_prior_p for e in whole.train() if isinstance(e, Progress)]
    assert told[10] == pytest.approx([1e-3] * 3)
    assert told[11] == told[13] == presence_from_counts(whole.prior.learnt or [])
    assert told[11] != told[10]


def test_a_state_of_something_else_is_refused() -> None:
    done = trainer()
    list(done.train())
    for changes, message in [
        ({"step": -5}, "step is -5"),
        ({"step": True}, "step is True"),
        ({"seconds": "abc"}, "seconds are 'abc'"),
        ({"seconds": math.nan}, "seconds are nan"),
        ({"miscounted": [-1]}, r"miscounted scenes are \[-1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_progress({**done.state_dict(), **changes})
    check_progress(done.state_dict())
    with pytest.raises(ValueError, match="not among the held-out scenes"):
        trainer().load_state_dict({**done.state_dict(), "miscounted": [10**9]})
    state = done.state_dict()
    for moments in state["optimizer"]["state"].values():
        moments["exp_avg"] = torch.zeros(1)
    with pytest.raises(ValueError, match="optimiser's exp_avg is not of the shape of its weight"):
        trainer().load_state_dict(state)


@pytest.mark.parametrize("kind", ["mps", "cuda"])
def test_the_random_state_of_a_device_is_saved_and_restored(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the device. A run can also resume on another kind of device."""
    restored: list[torch.Tensor] = []
    monkeypatch.setattr(f"torch.{kind}.get_rng_state", lambda *_: torch.tensor([7]))
    monkeypatch.setattr(f"torch.{kind}.set_rng_state", lambda value, *_: restored.append(value))
    running = trainer()
    of_a_cpu = running._random_state()
    on_cpu = running.air
    running.air = SimpleNamespace(h_init=SimpleNamespace(device=torch.device(kind)))  # type: ignore[assignment]
    state = running._random_state()
    running._restore_random_state(state)
    assert [int(each) for each in restored] == [7]
    running._restore_random_state(of_a_cpu)
    running.air = on_cpu
    running._restore_random_state(state)
    assert len(restored) == 1


def test_a_run_that_is_done_only_evaluates_again() -> None:
    done = trainer()
    list(done.train())
    before = weights(done)
    for each in (done, trainer(replace(SETTINGS, num_steps=0))):
        assert [type(e) for e in each.train()] == [CheckpointDue, Evaluated, SnapshotDue]
    assert all(torch.equal(x, y) for x, y in zip(before, weights(done), strict=True))


def test_a_collapse_is_an_alarm_from_the_given_step_on() -> None:
    running = trainer(replace(SETTINGS, alarm_after=8, learning_rate=1e-9))
    with torch.no_grad():
        running.air.predict.mlp.seq[-1].bias[0] = -30.0
    alarms = {e.step: e.alarm for e in running.train() if isinstance(e, Evaluated)}
    assert alarms[4] is None
    assert "canvases without objects" in str(alarms[8])
    assert "canvases without objects" in str(alarms[12])


@pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")
@pytest.mark.parametrize("every", [0, 1])
def test_training_ends_where_all_steps_are_skipped(every: int) -> None:
    """A run that reports nothing ends too."""
    changes: dict[str, Any] = {"progress_every": every, "eval_every": 0, "save_every": 0}
    settings = replace(SETTINGS, num_steps=400, compile=False, **changes)
    running = trainer(settings)
    running.air.likelihood.sd = 1e-30
    events: list[Any] = []
    message = r"log_likelihood and .* for \d+ steps in a row"
    with pyro.validation_enabled(False), pytest.raises(FloatingPointError, match=message):
        events.extend(running.train())
    progress = [event for event in events if isinstance(event, Progress)]
    if every == 0:
        assert running.step <= MAX_SKIPPED + SYNC_EVERY
        return
    assert [event.step for event in progress] == list(range(1, MAX_SKIPPED + 1))
    assert all(event.skipped == 1 and math.isnan(event.elbo) for event in progress)
