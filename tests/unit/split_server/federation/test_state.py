"""Who is there, who is silent, and what a run waits for, as the operator sees it."""

from __future__ import annotations

import uuid
from typing import Any

from protocol.messages import Task
from protocol.run_state import RunState
from split_server.engine.metrics import RunFigures
from split_server.federation.presence import RETURNED, SILENT, Presence
from split_server.federation.state import RunStates
from split_server.storage.events import IdempotentRequest
from tests.support.federation import FederationHarness, state_of


class Engine:
    """The figures of an engine that has computed nothing."""

    def figures(self, _run: str) -> RunFigures:
        return RunFigures()


def state(harness: FederationHarness, run: str) -> RunState:
    engine: Any = Engine()
    return RunStates(harness.runs, harness.liveness, engine).of(run)


def statuses(harness: FederationHarness, run: str) -> dict[str, str]:
    return {device.name: str(device.status) for device in state(harness, run).devices}


def note(harness: FederationHarness, run: str) -> list[tuple[str, str]]:
    """Note changes, and return all of them so far."""
    presence = Presence(harness.runs, harness.liveness)
    if presence.has_changed(run):
        presence.note(run)
    assert not presence.has_changed(run)
    events = harness.reader.events(run, 0)
    return [(each.kind, each.data["name"]) for each in events if each.kind in (SILENT, RETURNED)]


def test_a_run_says_whom_it_waits_for_and_when_it_goes_on(harness: FederationHarness) -> None:
    run = harness.create(min_participants=2, round_timeout_s=120)
    a = harness.join(run, "kitchen")
    assert state(harness, run).summary == "The run waits: 1 of 2 devices: kitchen; 1 more needed."
    assert state(harness, run).closes_at is None
    b = harness.join(run, "garage")
    harness.task(run, b)
    seen = state(harness, run)
    assert seen.summary == "Round 1 of 2 waits for the updates of garage, kitchen."
    assert seen.closes_at == round(harness.runs.clock.wall() + 120)
    assert statuses(harness, run) == {"kitchen": "training", "garage": "training"}
    harness.update(run, a, state_of(1.0))
    assert state(harness, run).summary == "Round 1 of 2 waits for the updates of garage."
    assert statuses(harness, run) == {"kitchen": "waiting", "garage": "training"}


def test_a_silent_device_is_named_noted_once_and_not_drawn(harness: FederationHarness) -> None:
    run = harness.create(min_participants=2, evaluate_every=0, round_timeout_s=300)
    a, b = harness.join(run, "kitchen"), harness.join(run, "garage")
    harness.task(run, a)
    joined_at = round(harness.runs.clock.wall())
    harness.time.now += 61
    harness.task(run, a)
    assert statuses(harness, run) == {"kitchen": "training", "garage": "silent"}
    assert state(harness, run).devices[1].heard_at == joined_at
    assert "garage (silent)" in state(harness, run).summary
    assert note(harness, run) == note(harness, run) == [(SILENT, "garage")]
    harness.update(run, a, state_of(1.0))
    harness.time.now += 240
    assert harness.task(run, a).task == Task.TRAIN
    open_round = harness.runs.snapshot(run).open_round
    assert open_round is not None
    assert open_round.round == 2
    assert open_round.sampled == (a,)  # in round 2 the silent one is not drawn
    harness.task(run, b)
    assert ("participant_returned", "garage") in note(harness, run)
    assert statuses(harness, run)["garage"] == "waiting"


def test_who_said_goodbye_is_gone_and_not_silent(harness: FederationHarness) -> None:
    run = harness.create(min_participants=3)
    a, b = harness.join(run, "kitchen"), harness.join(run, "garage")
    harness.federation.end(run, a, "stopped")
    harness.federation.leave(run, b, IdempotentRequest.of("leave", uuid.uuid4().hex))
    harness.time.now += 1000
    assert statuses(harness, run) == {"kitchen": "gone", "garage": "gone"}
    assert note(harness, run) == []
