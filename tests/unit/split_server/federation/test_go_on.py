"""Requests that arrive while a run's step fails or takes long."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from protocol.messages import Task
from split_server.federation import transitions
from split_server.storage.events import IdempotentRequest
from tests.support.federation import FederationHarness, bench, everywhere, state_of


@pytest.fixture
def site(tmp_path: Path) -> Iterator[FederationHarness]:
    with bench(tmp_path) as made:
        yield made


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
    site: FederationHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = site.create(min_participants=2, evaluate_every=0)
    a, b = site.join(run, "a"), site.join(run, "b")
    site.update(run, a, state_of(1.0))
    disk = Disk()
    disk.patch(monkeypatch, "average")
    site.update(run, b, state_of(3.0))
    assert disk.attempts == 1
    # A poll does not repeat the failed step; its task is to wait.
    for one in (a, b):
        assert not site.advancer.is_due(run)
        site.advancer.try_advance(run)
        assert site.federation.assignment(run, one).task is Task.WAIT
    site.join(run, "c")
    assert disk.attempts == 1
    site.time.now += 5
    assert site.advancer.is_due(run)
    site.advancer.try_advance(run)
    assert disk.attempts == 2
    assert everywhere(site, run) == 0.0
    disk.full = False
    site.time.now += 5
    site.advancer.try_advance(run)
    assert disk.attempts == 3
    assert everywhere(site, run) == 2.0
    assert site.federation.results(run).rounds[0].updated == (a, b)


def test_an_evaluation_counts_although_closing_the_round_fails(
    site: FederationHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = site.create(rounds=1)
    a = site.join(run)
    site.update(run, a, state_of(1.0))
    disk = Disk()
    disk.patch(monkeypatch, "apply")
    site.evaluate(run, a, samples=10, correct=9)
    assert site.federation.assignment(run, a).task is Task.WAIT
    disk.full = False
    site.time.now += 5
    assert site.task(run, a).task is Task.STOP
    assert site.federation.results(run).rounds[0].accuracy == 0.9


def test_joining_and_leaving_succeed_although_a_step_fails(
    site: FederationHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = site.create(min_participants=2)
    disk = Disk()
    disk.patch(monkeypatch, "apply")
    a, b = site.join(run, "a"), site.join(run, "b")
    assert disk.attempts == 1
    site.time.now += 5
    site.federation.leave(run, b, IdempotentRequest.of(f"{run}/{b}/leave", "k"))
    assert [member.id for member in site.runs.snapshot(run).present] == [a]


def test_a_paused_run_does_not_delay_another(
    site: FederationHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [site.create(evaluate_every=0) for _ in range(2)]
    first, second = (site.join(run) for run in runs)
    disk = Disk()
    disk.patch(monkeypatch, "average")
    site.update(runs[0], first, state_of(1.0))
    disk.full = False
    site.update(runs[1], second, state_of(4.0))
    assert everywhere(site, runs[0]) == 0.0
    assert everywhere(site, runs[1]) == 4.0


def test_polls_do_not_wait_for_an_aggregation(
    site: FederationHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = site.create(min_participants=2, evaluate_every=0)
    a, b = site.join(run, "a"), site.join(run, "b")
    site.update(run, a, state_of(1.0))
    at_work, over, real = threading.Event(), threading.Event(), transitions.average

    def long(*given: Any) -> Any:
        at_work.set()
        assert over.wait(20)
        return real(*given)

    monkeypatch.setattr(transitions, "average", long)
    last = threading.Thread(target=lambda: site.update(run, b, state_of(3.0)))
    last.start()
    polls = [
        threading.Thread(target=lambda: site.advancer.try_advance(run, wait=False))
        for _ in range(3)
    ]
    try:
        assert at_work.wait(20)
        assert site.advancer.is_due(run)
        for poll in polls:
            poll.start()
        for poll in polls:
            poll.join(5)
        assert not any(poll.is_alive() for poll in polls)
        assert site.federation.assignment(run, a).task is Task.WAIT
    finally:
        over.set()
        last.join(20)
        for poll in polls:
            poll.join(20)
    assert everywhere(site, run) == 2.0
