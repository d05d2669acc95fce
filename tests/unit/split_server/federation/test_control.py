"""The operator pauses, resumes and closes; each change outlives a restart and counts once."""

from __future__ import annotations

import uuid

import pytest

from protocol.errors import Conflict, RunClosed
from protocol.messages import RoundStatus, RunStatus, Task
from split_server.federation.control import RunControl
from split_server.storage.events import IdempotentRequest
from tests.support.federation import FederationHarness, state_of


def key(run: str, what: str, text: str = "") -> IdempotentRequest:
    return IdempotentRequest.of(f"{run}/{what}", text or uuid.uuid4().hex)


def control(harness: FederationHarness) -> RunControl:
    return RunControl(harness.runs, harness.advancer)


def kinds(harness: FederationHarness, run: str) -> list[str]:
    return [event.kind for event in harness.reader.events(run, 0)]


def test_a_paused_run_ends_its_round_and_opens_no_other_until_it_is_resumed(
    harness: FederationHarness,
) -> None:
    run = harness.create()
    a = harness.join(run, test=0)
    assert harness.task(run, a).task == Task.TRAIN
    control(harness).pause(run, key(run, "pause"))
    harness.update(run, a, state_of(1.0))
    assignment = harness.task(run, a)
    assert (assignment.task, assignment.round) == (Task.WAIT, 1)
    assert assignment.waiting == "its operator has paused the run"
    assert harness.reader.views()[0].paused
    harness.close()
    harness.open()  # a restart
    assert harness.task(run, a).task == Task.WAIT
    control(harness).resume(run, key(run, "resume"))
    assert (harness.task(run, a).task, harness.task(run, a).round) == (Task.TRAIN, 2)
    assert kinds(harness, run).count("run_paused") == kinds(harness, run).count("run_resumed") == 1


def test_a_repeated_request_changes_nothing(harness: FederationHarness) -> None:
    run = harness.create()
    control(harness).pause(run, key(run, "pause", "once"))
    control(harness).resume(run, key(run, "resume", "once"))
    assert control(harness).pause(run, key(run, "pause", "once")).paused  # the first response
    assert not harness.reader.views()[0].paused
    assert kinds(harness, run)[-1] == "run_resumed"


def test_a_closed_round_averages_what_is_there_also_after_a_restart(
    harness: FederationHarness,
) -> None:
    run = harness.create(min_participants=2, evaluate_every=0)
    a, b = harness.join(run, "a"), harness.join(run, "b")
    assert harness.task(run, a).task == harness.task(run, b).task == Task.TRAIN
    with pytest.raises(Conflict, match="too few updates") as caught:
        control(harness).close_round(run, key(run, "close-round"))
    assert (caught.value.limit, caught.value.value) == (1, 0)
    harness.update(run, a, state_of(1.0))
    assert harness.runs.snapshot(run).closed_rounds == 0
    control(harness).close_round(run, key(run, "close-round"))
    closed = harness.reader.results(run).rounds[0]
    assert (closed.status, closed.updated) == (RoundStatus.CLOSED, (a,))


def test_the_request_is_on_disk_before_it_has_an_effect(
    harness: FederationHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = harness.create(min_participants=2, evaluate_every=0)
    a, b = harness.join(run, "a"), harness.join(run, "b")
    harness.task(run, b)
    harness.update(run, a, state_of(1.0))
    monkeypatch.setattr(harness.advancer, "try_advance", lambda _run: None)  # it is killed here
    control(harness).close_round(run, key(run, "close-round"))
    harness.close()
    harness.open()
    harness.time.now += 61  # everybody who is there has had time to call
    harness.advancer.advance(run)
    assert harness.runs.snapshot(run).closed_rounds == 1


def test_nothing_but_an_open_round_of_an_open_run_is_closed(harness: FederationHarness) -> None:
    run = harness.create(min_participants=2)
    with pytest.raises(Conflict, match="no round"):
        control(harness).close_round(run, key(run, "close-round"))
    harness.federation.cancel(run, key(run, "cancel"))
    assert harness.runs.snapshot(run).status == RunStatus.CANCELLED
    with pytest.raises(RunClosed):
        control(harness).pause(run, key(run, "pause"))
