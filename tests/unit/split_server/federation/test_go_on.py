"""Requests that arrive while a run's step fails or takes long."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import pytest

from protocol.messages import Task
from split_server.federation import transitions
from split_server.storage.events import IdempotentRequest
from tests.support.federation import FederationHarness, state_of, state_value


@dataclass
class Disk:
    """Simulates a full disk under a step of a run."""

    full: bool = True
    attempts: int = 0

    def patch(self, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
        real: Any = getattr(transitions, step)

        def written(*given: Any) -> Any:
            self.attempts += 1
            if self.full:
                raise OSError("no space left")
            return real(*given)

        monkeypatch.setattr(transitions, step, written)


def test_an_update_counts_although_the_aggregation_fails(
    harness: FederationHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = harness.create(min_participants=2, evaluate_every=0)
    a, b = harness.join(run, "a"), harness.join(run, "b")
    harness.update(run, a, state_of(1.0))
    disk = Disk()
    disk.patch(monkeypatch, "average")
    harness.update(run, b, state_of(3.0))
    assert disk.attempts == 1
    # A poll does not repeat the failed step; its task is to wait.
    for one in (a, b):
        assert not harness.advancer.is_due(run)
        harness.advancer.try_advance(run)
        assert harness.federation.assignment(run, one).task is Task.WAIT
    harness.join(run, "c")
    assert disk.attempts == 1
    harness.time.now += 5
    assert harness.advancer.is_due(run)
    harness.advancer.try_advance(run)
    assert disk.attempts == 2
    assert state_value(harness, run) == 0.0
    disk.full = False
    harness.time.now += 5
    harness.advancer.try_advance(run)
    assert disk.attempts == 3
    assert state_value(harness, run) == 2.0
    assert harness.reader.results(run).rounds[0].updated == (a, b)


def test_an_evaluation_counts_although_closing_the_round_fails(
    harness: FederationHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = harness.create(rounds=1)
    a = harness.join(run)
    harness.update(run, a, state_of(1.0))
    disk = Disk()
    disk.patch(monkeypatch, "apply")
    harness.evaluate(run, a, samples=10, correct=9)
    assert harness.federation.assignment(run, a).task is Task.WAIT
    disk.full = False
    harness.time.now += 5
    assert harness.task(run, a).task is Task.STOP
    assert harness.reader.results(run).rounds[0].accuracy == 0.9


def test_joining_and_leaving_succeed_although_a_step_fails(
    harness: FederationHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = harness.create(min_participants=2)
    disk = Disk()
    disk.patch(monkeypatch, "apply")
    a, b = harness.join(run, "a"), harness.join(run, "b")
    assert disk.attempts == 1
    harness.time.now += 5
    harness.federation.leave(run, b, IdempotentRequest.of(f"{run}/{b}/leave", "k"))
    assert [member.id for member in harness.runs.snapshot(run).present] == [a]


def test_a_paused_run_does_not_delay_another(
    harness: FederationHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [harness.create(evaluate_every=0) for _ in range(2)]
    first, second = (harness.join(run) for run in runs)
    disk = Disk()
    disk.patch(monkeypatch, "average")
    harness.update(runs[0], first, state_of(1.0))
    disk.full = False
    harness.update(runs[1], second, state_of(4.0))
    assert state_value(harness, runs[0]) == 0.0
    assert state_value(harness, runs[1]) == 4.0


def test_polls_do_not_wait_for_an_aggregation(
    harness: FederationHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = harness.create(min_participants=2, evaluate_every=0)
    a, b = harness.join(run, "a"), harness.join(run, "b")
    harness.update(run, a, state_of(1.0))
    at_work, over, real = threading.Event(), threading.Event(), transitions.average

    def long(*given: Any) -> Any:
        at_work.set()
        assert over.wait(20)
        return real(*given)

    monkeypatch.setattr(transitions, "average", long)
    last = threading.Thread(target=lambda: harness.update(run, b, state_of(3.0)))
    last.start()
    polls = [
        threading.Thread(target=lambda: harness.advancer.try_advance(run, wait=False))
        for _ in range(3)
    ]
    try:
        assert at_work.wait(20)
        assert harness.advancer.is_due(run)
        for poll in polls:
            poll.start()
        for poll in polls:
            poll.join(5)
        assert not any(poll.is_alive() for poll in polls)
        assert harness.federation.assignment(run, a).task is Task.WAIT
    finally:
        over.set()
        last.join(20)
        for poll in polls:
            poll.join(20)
    assert state_value(harness, run) == 2.0
