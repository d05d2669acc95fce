"""Devices that end, fall silent or never answer: who is drawn, who is waited for, what is said."""

from __future__ import annotations

import pytest

from protocol.errors import InvalidField
from protocol.messages import RoundStatus, RunStatus, Task
from tests.support.federation import FederationHarness, state_of


def sampled(harness: FederationHarness, run: str) -> tuple[str, ...] | None:
    opened = harness.runs.snapshot(run).open_round
    return opened.sampled if opened else None


def test_a_run_pauses_while_its_only_device_is_away_and_goes_on_with_it(
    harness: FederationHarness,
) -> None:
    run = harness.create(round_timeout_s=10, max_repeats=0, rounds=1)
    a = harness.join(run, "kitchen")
    for attempt in range(1, 6):
        harness.time.now += 42
        harness.advancer.advance(run)
        assert harness.runs.snapshot(run).status is RunStatus.RUNNING
        assert sampled(harness, run) is None, "the silent are not drawn"
        waiting = harness.reader.results(run).waiting
        assert waiting == "0 of 1 devices; 1 more needed"
        back = harness.task(run, a)
        assert (back.task, back.attempt) == (Task.TRAIN, attempt)
    harness.update(run, a, state_of(1.0), attempt=5)
    harness.evaluate(run, a, attempt=5)
    assert harness.runs.snapshot(run).status is RunStatus.FINISHED


def test_a_device_that_missed_a_round_is_drawn_again_once_it_is_heard_from(
    harness: FederationHarness,
) -> None:
    run = harness.create(round_timeout_s=10, min_participants=2, evaluate_every=0, rounds=9)
    a, b = harness.join(run, "a"), harness.join(run, "b")
    harness.update(run, a, state_of(1.0))
    harness.time.now += 11
    assert harness.task(run, a).round == 2
    assert sampled(harness, run) == (a,), "b is silent, although its window is not over"
    harness.task(run, b)
    harness.update(run, a, state_of(1.0), round_=2)
    assert sampled(harness, run) == (a, b)


def test_a_device_that_polls_and_never_answers_is_asked_less_and_less_often(
    harness: FederationHarness,
) -> None:
    run = harness.create(round_timeout_s=10, min_participants=2, evaluate_every=0, rounds=20)
    a, mute = harness.join(run, "a"), harness.join(run, "mute")
    asked = []
    for round_ in range(1, 21):
        harness.task(run, mute)
        assert harness.task(run, a).round == round_
        asked += [round_] if mute in (sampled(harness, run) or ()) else []
        harness.update(run, a, state_of(1.0), round_=round_)
        harness.task(run, mute)
        if asked and asked[-1] == round_:
            harness.time.now += 10
            harness.task(run, mute)
    assert asked == [1, 2, 4, 8, 16]


def test_a_round_goes_on_at_once_without_a_device_that_has_told_that_it_ends(
    harness: FederationHarness,
) -> None:
    run = harness.create(min_participants=2, rounds=2)
    a, b = harness.join(run, "a"), harness.join(run, "b")
    harness.update(run, a, state_of(1.0))
    harness.federation.end(run, b, "its images cannot be used any more")
    assert harness.task(run, a).task is Task.EVALUATE
    harness.evaluate(run, a)
    assert sampled(harness, run) == (a,)
    [told] = [e.data for e in harness.reader.events(run, 0) if e.kind == "participant_ended"]
    assert told == {"participant": b, "reason": "its images cannot be used any more"}
    harness.task(run, b)
    harness.update(run, a, state_of(1.0), round_=2)
    assert harness.task(run, b).task is Task.EVALUATE, "it has come back"


def test_a_device_that_ended_and_comes_back_in_time_trains_in_the_same_attempt(
    harness: FederationHarness,
) -> None:
    run = harness.create(min_participants=1, rounds=1)
    a = harness.join(run, "a")
    harness.federation.end(run, a, "it was stopped")
    harness.federation.end(run, a, "it was stopped")
    again = harness.task(run, a)
    assert (again.task, again.attempt) == (Task.TRAIN, 0)
    assert harness.kinds(run).count("participant_ended") == 1


def test_who_is_missing_is_said_to_devices_and_to_the_operator(harness: FederationHarness) -> None:
    run = harness.create(min_participants=3)
    a = harness.join(run, "kitchen")
    expected = "1 of 3 devices: kitchen; 2 more needed"
    assert harness.task(run, a).waiting == expected
    assert harness.reader.results(run).waiting == expected
    b = harness.join(run, "hall\x1b[2J")
    assert harness.task(run, b).waiting == "2 of 3 devices: hall?[2J, kitchen; 1 more needed"
    harness.join(run, "attic")
    assert harness.task(run, a).waiting is None
    assert harness.reader.results(run).waiting is None


def test_the_last_state_of_a_run_is_measured_by_who_comes_back(harness: FederationHarness) -> None:
    run = harness.create(round_timeout_s=10, min_participants=2, rounds=1)
    a, b = harness.join(run, "trains", test=0), harness.join(run, "measures")
    for one in (a, b):
        harness.update(run, one, state_of(1.0))
    harness.time.now += 500
    harness.task(run, a)
    (only,) = harness.reader.results(run).rounds
    assert only.status is RoundStatus.EVALUATING
    waiting = harness.reader.results(run).waiting
    assert waiting == "one of these devices has to measure the last state: measures"
    assert harness.task(run, b).task is Task.EVALUATE
    harness.evaluate(run, b)
    (only,) = harness.reader.results(run).rounds
    assert (harness.runs.snapshot(run).status, only.accuracy) == (RunStatus.FINISHED, 0.5)


def test_a_second_device_of_a_name_is_refused_while_the_first_is_there(
    harness: FederationHarness,
) -> None:
    run = harness.create(min_participants=2)
    a = harness.join(run, "kitchen")
    with pytest.raises(InvalidField, match="under this name"):
        harness.join(run, "kitchen")
    harness.join(run, "kitchen", train=0, test=0)  # one that only reads
    harness.time.now += 61
    b = harness.join(run, "kitchen")
    assert b != a, "a device that has lost its identity is not shut out"
