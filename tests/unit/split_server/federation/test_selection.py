"""The best state: which states replace it, and what a run does when they do not."""

from __future__ import annotations

import pytest

from protocol.messages import RunStatus, Task
from split_server.federation.selection import Report, compare
from tests.support.federation import FederationHarness, state_of, state_value


def losses(*values: float, samples: int = 10) -> dict[str, Report]:
    return {f"p{at}": Report(value, samples) for at, value in enumerate(values)}


def test_a_state_that_most_devices_find_worse_is_not_kept() -> None:
    verdict = compare(losses(1.2, 1.1, 0.9), losses(1.0, 1.0, 1.0))
    assert verdict is not None
    assert not verdict.is_kept
    assert verdict.change == pytest.approx(0.1 / 3)


@pytest.mark.parametrize("lie", [1e-9, 0.5, 1e9])
def test_one_device_of_three_cannot_decide_alone(lie: float) -> None:
    best = losses(1.0, 1.0, 1e9)
    worse = losses(1.3, 1.01, 1e9 - lie)
    better = losses(0.7, 0.99, 1e9)
    assert not compare(worse, best).is_kept  # type: ignore[union-attr]
    assert compare(better, losses(1.0, 1.0, 1e9 - lie)).is_kept  # type: ignore[union-attr]


def test_a_device_that_claims_a_million_samples_counts_for_two() -> None:
    best, new = losses(1.0, 1.0, 1.0, 1.0), losses(1.1, 1.1, 1.1, 0.9)
    best["p3"], new["p3"] = Report(1.0, 10**6), Report(0.9, 10**6)
    assert compare(new, best).change == pytest.approx(0.1 * (3 - 2) / 5)  # type: ignore[union-attr]


def test_only_devices_that_measured_both_states_count() -> None:
    new, best = losses(5.0, 1.0), losses(1.0)
    del new["p0"]
    assert compare(new, best) is None
    assert compare(losses(1.0), {}) is None


def test_a_small_gain_is_kept_and_is_no_progress() -> None:
    verdict = compare(losses(0.9995), losses(1.0))
    assert verdict is not None
    assert (verdict.is_kept, verdict.is_progress) == (True, False)
    assert compare(losses(0.99), losses(1.0)).is_progress  # type: ignore[union-attr]


def run_rounds(harness: FederationHarness, run: str, who: str, *measured: float | None) -> None:
    """Run a round for each selection loss; round n makes a state of n."""
    for round_, loss in enumerate(measured, start=1):
        harness.update(run, who, state_of(float(round_)), round_=round_)
        harness.evaluate(run, who, round_=round_, selection_loss=loss)


def test_a_worse_state_is_discarded_and_the_rates_are_halved(harness: FederationHarness) -> None:
    run = harness.create(rounds=5)
    a = harness.join(run)
    run_rounds(harness, run, a, 1.0, 0.8, 0.9)
    assert state_value(harness, run) == 2.0
    assignment = harness.task(run, a)
    assert (assignment.task, assignment.round, assignment.rate_scale) == (Task.TRAIN, 4, 0.5)
    views = harness.reader.results(run).rounds
    assert [view.kept for view in views if view.accuracy is not None] == [True, True, False]
    harness.update(run, a, state_of(9.0), round_=4)
    harness.evaluate(run, a, round_=4, selection_loss=0.7)
    assert state_value(harness, run) == 9.0
    best = harness.reader.results(run).best
    assert best is not None
    assert best.round == 4


def test_a_restarted_server_remembers_the_best_state(harness: FederationHarness) -> None:
    run = harness.create(rounds=5)
    a = harness.join(run)
    run_rounds(harness, run, a, 1.0)
    harness.update(run, a, state_of(7.0), round_=2)
    harness.close()
    harness.open()
    assert state_value(harness, run) == 7.0
    harness.evaluate(run, a, round_=2, selection_loss=1.5)
    assert state_value(harness, run) == 1.0
    harness.close()


def test_a_run_without_progress_finishes_with_its_best_state(harness: FederationHarness) -> None:
    run = harness.create(rounds=9, patience=2)
    a = harness.join(run)
    run_rounds(harness, run, a, 1.0, 0.5, 0.4999, 0.6)
    last = harness.task(run, a)
    assert (last.task, last.status) == (Task.STOP, RunStatus.FINISHED)
    assert "2 rounds" in str(last.reason)
    assert state_value(harness, run) == 3.0


@pytest.mark.parametrize(("keep", "loss"), [(False, 2.0), (True, None)])
def test_nothing_is_discarded_if_switched_off_or_not_measured(
    harness: FederationHarness, keep: bool, loss: float | None
) -> None:
    run = harness.create(rounds=9, keep_best=keep)
    a = harness.join(run)
    run_rounds(harness, run, a, 1.0, loss, loss, loss, loss)
    assert state_value(harness, run) == 5.0
    assert harness.task(run, a).rate_scale == 1.0


def test_a_loss_above_that_of_guessing_is_reported_from_the_second_round_on(
    harness: FederationHarness,
) -> None:
    run = harness.create(rounds=4)
    a = harness.join(run)
    for round_, loss in enumerate((2.4, 2.2, 2.4, 2.5), start=1):  # guessing loses ln 10 = 2.3
        harness.update(run, a, state_of(1.0), round_=round_)
        harness.evaluate(run, a, round_=round_, loss_sum=10 * loss)
    events = harness.reader.events(run, 0)
    told = [event.data for event in events if event.kind == "loss_above_guessing"]
    assert told == [{"round": 4, "loss": 2.5, "guessing": pytest.approx(2.302585)}]
