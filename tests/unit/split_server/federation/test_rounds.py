"""The decisions about rounds, without a server, a database or a clock."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from protocol.errors import RunClosed, StaleRound
from protocol.messages import BlobRef, RoundStatus, RunStatus, Task
from protocol.settings import RunSettings
from split_server.federation import permissions, rounds
from split_server.federation.rounds import (
    Aggregate,
    CloseRound,
    FailRun,
    OpenTraining,
    Rebuild,
    Repeat,
    assignment_for,
    decide,
)
from split_server.federation.snapshot import OpenRound, Participant, RunSnapshot
from split_server.storage.run_files import StateRefs
from tests.support.federation import run_settings
from tuning_methods.custom.settings import Custom
from tuning_methods.proxies.settings import DistillationSettings

BLOB = BlobRef(sha256="0" * 64, nbytes=1)

NOW = 100.0


def participant(number: int, *, train: int = 10, test: int = 5, left: bool = False) -> Participant:
    return Participant(f"p{number}", f"device-{number}", number, train, test, left)


def a_run(participants: int = 3, *, closed: int = 0, **federation: Any) -> RunSnapshot:
    return RunSnapshot(
        id="r1",
        status=RunStatus.RUNNING if closed else RunStatus.WAITING,
        reason=None,
        settings=Custom.of(run_settings(**federation)),
        created_at=0.0,
        finished_at=None,
        backbone_path="",
        backbone_bytes=1,
        head=BLOB,
        state=StateRefs(BLOB),
        participants={f"p{n}": participant(n) for n in range(1, participants + 1)},
        open_round=None,
        closed_rounds=closed,
        repeats=0,
    )


def an_open_round(
    run: RunSnapshot,
    *,
    updated: set[str] | None = None,
    declined: set[str] | None = None,
    attempt: int = 0,
    evaluators: tuple[str, ...] | None = None,
    evaluated: set[str] | None = None,
) -> RunSnapshot:
    status = RoundStatus.TRAINING if evaluators is None else RoundStatus.EVALUATING
    return replace(
        run,
        status=RunStatus.RUNNING,
        deadline=NOW + 10,
        repeats=attempt,
        failures=attempt,
        open_round=OpenRound(
            round=run.closed_rounds + 1,
            attempt=attempt,
            status=status,
            sampled=tuple(run.participants),
            updated=frozenset(updated or ()),
            declined=frozenset(declined or ()),
            evaluators=evaluators or (),
            evaluated=frozenset(evaluated or ()),
        ),
    )


def everybody(run: RunSnapshot) -> set[str]:
    return set(run.participants)


def next_step(run: RunSnapshot, now: float = NOW) -> rounds.Action | None:
    return decide(run, everybody(run), now, settled=True)


def test_the_first_round_waits_for_min_participants() -> None:
    assert next_step(a_run(2, min_participants=3)) is None
    assert isinstance(next_step(a_run(3, min_participants=3)), OpenTraining)


def test_participants_that_left_do_not_count() -> None:
    run = a_run(3, min_participants=3)
    gone = {**run.participants, "p2": replace(run.participants["p2"], left=True)}
    assert next_step(replace(run, participants=gone)) is None


def test_a_later_round_opens_without_min_participants() -> None:
    step = next_step(a_run(1, closed=1, min_participants=3))
    assert step == OpenTraining(2, 0, ("p1",))


def test_only_live_participants_with_training_samples_are_sampled() -> None:
    run = a_run(4)
    participants = {**run.participants, "p3": participant(3, train=0)}
    step = decide(replace(run, participants=participants), {"p1", "p3", "p4"}, NOW, settled=True)
    assert step == OpenTraining(1, 0, ("p1", "p4"))


def test_a_round_waits_for_min_updates_candidates() -> None:
    run = a_run(3, min_updates=2)
    assert decide(run, {"p1"}, NOW, settled=True) is None
    assert decide(run, {"p1", "p2"}, NOW, settled=True) == OpenTraining(1, 0, ("p1", "p2"))


def test_after_a_restart_a_round_waits_for_all_participants_or_the_window() -> None:
    run = a_run(3)
    assert decide(run, {"p1", "p2"}, NOW, settled=False) is None
    assert decide(run, {"p1", "p2", "p3"}, NOW, settled=False) is not None
    assert decide(run, {"p1", "p2"}, NOW, settled=True) is not None


def test_the_sample_depends_on_the_seed() -> None:
    def draw(seed: int, repeats: int = 0) -> tuple[str, ...]:
        run = replace(a_run(20, participants_per_round=5, seed=seed), repeats=repeats)
        step = next_step(run)
        assert isinstance(step, OpenTraining)
        return step.sampled

    assert draw(1) == draw(1)
    assert len(set(draw(1))) == 5
    assert len({draw(seed) for seed in range(10)}) > 5
    assert draw(1) != draw(1, repeats=1), "an attempt is drawn anew"


def test_the_sample_does_not_depend_on_the_order_of_joining() -> None:
    def draw(order: list[int]) -> set[str]:
        run = a_run(0, participants_per_round=3, seed=4)
        participants = {
            f"p{place}": Participant(f"p{place}", f"device-{n}", place, 10, 5, False)
            for place, n in enumerate(order)
        }
        step = next_step(replace(run, participants=participants))
        assert isinstance(step, OpenTraining)
        return {participants[one].name for one in step.sampled}

    assert draw([1, 2, 3, 4, 5, 6]) == draw([6, 3, 1, 5, 2, 4])


def test_training_ends_when_all_sampled_have_answered() -> None:
    run = a_run(3)
    assert next_step(an_open_round(run, updated={"p1", "p2"})) is None
    step = next_step(an_open_round(run, updated={"p1", "p2", "p3"}))
    assert isinstance(step, Aggregate)
    assert step.updated == ("p1", "p2", "p3")


def test_the_deadline_ends_training_without_stragglers() -> None:
    run = an_open_round(a_run(3), updated={"p2"})
    assert next_step(run, NOW + 9.9) is None
    step = next_step(run, NOW + 10)
    assert isinstance(step, Aggregate)
    assert step.updated == ("p2",)


def test_a_round_does_not_wait_for_participants_that_left_or_declined() -> None:
    run = an_open_round(a_run(3), updated={"p1"}, declined={"p2"})
    participants = {**run.participants, "p3": replace(run.participants["p3"], left=True)}
    assert isinstance(next_step(replace(run, participants=participants)), Aggregate)


def test_too_few_updates_repeat_the_round_and_then_fail_the_run() -> None:
    run = a_run(3, min_updates=2, max_repeats=1)
    refused = {"p2", "p3"}
    assert next_step(an_open_round(run, updated={"p1"}, declined=refused)) == Repeat(1)
    again = next_step(an_open_round(run, updated={"p1"}, declined=refused, attempt=1))
    assert isinstance(again, FailRun)
    assert "1 of at least 2 updates" in again.reason


def test_a_round_that_devices_miss_is_repeated_however_often() -> None:
    run = an_open_round(a_run(3, min_updates=2, max_repeats=0), updated={"p1"}, attempt=7)
    assert next_step(run, NOW + 9) is None
    assert next_step(run, NOW + 10) == Repeat(1, is_failure=False)


def test_a_round_does_not_wait_for_participants_that_have_told_that_they_end() -> None:
    run = an_open_round(a_run(3), updated={"p1", "p2"})
    step = decide(run, everybody(run), NOW, settled=True, away={"p3"})
    assert isinstance(step, Aggregate)
    measured = an_open_round(a_run(2), evaluators=("p1", "p2"), evaluated={"p1"})
    assert isinstance(decide(measured, {"p1"}, NOW, settled=True, away={"p2"}), CloseRound)


def test_a_round_with_too_few_updates_waits_until_its_deadline_for_who_is_away() -> None:
    run = an_open_round(a_run(2, min_updates=2), updated={"p1"})
    assert decide(run, {"p1"}, NOW, settled=True, away={"p2"}) is None
    step = decide(run, {"p1"}, NOW + 10, settled=True, away={"p2"})
    assert step == Repeat(1, is_failure=False)


def test_who_misses_rounds_is_left_out_unless_too_few_others_are_there() -> None:
    run = a_run(3, min_updates=2)
    step = decide(run, everybody(run), NOW, settled=True, pausing={"p2"})
    assert step == OpenTraining(1, 0, ("p1", "p3"))
    step = decide(run, {"p1", "p2"}, NOW, settled=True, pausing={"p2"})
    assert step == OpenTraining(1, 0, ("p1", "p2"))


def test_the_last_state_waits_for_an_evaluation_however_late_it_comes() -> None:
    run = a_run(2, closed=1, rounds=2)
    step = decide(an_open_round(run, updated={"p1", "p2"}), set(), NOW, settled=True)
    assert isinstance(step, Aggregate)
    assert step.evaluators == ("p1", "p2")
    late = an_open_round(run, evaluators=("p1", "p2"))
    assert next_step(late, NOW + 1000) is None
    one = an_open_round(run, evaluators=("p1", "p2"), evaluated={"p2"})
    assert isinstance(next_step(one, NOW + 1000), CloseRound)


def test_a_round_without_updates_is_not_aggregated() -> None:
    run = an_open_round(a_run(2), declined={"p1", "p2"})
    assert next_step(run) == Repeat(0)


@pytest.mark.parametrize(
    ("every", "closed", "evaluates"),
    [(1, 0, True), (2, 0, False), (2, 1, True), (0, 0, False), (0, 2, False), (5, 2, True)],
)
def test_rounds_are_evaluated_at_the_interval_and_at_the_end(
    every: int, closed: int, evaluates: bool
) -> None:
    run = a_run(2, closed=closed, rounds=3, evaluate_every=every)
    step = next_step(an_open_round(run, updated={"p1", "p2"}))
    assert isinstance(step, Aggregate)
    assert bool(step.evaluators) is evaluates


def test_only_live_participants_with_test_samples_evaluate() -> None:
    run = a_run(3)
    run = replace(run, participants={**run.participants, "p1": participant(1, test=0)})
    opened = an_open_round(run, updated={"p1", "p2", "p3"})
    step = decide(opened, {"p1", "p2"}, NOW, settled=True)
    assert isinstance(step, Aggregate)
    assert step.evaluators == ("p2",)


def test_an_evaluation_ends_with_its_last_report_or_at_the_deadline() -> None:
    run = an_open_round(a_run(2), evaluators=("p1", "p2"), evaluated={"p1"})
    assert next_step(run) is None
    assert isinstance(next_step(run, NOW + 10), CloseRound)
    done = an_open_round(a_run(2), evaluators=("p1", "p2"), evaluated={"p1", "p2"})
    assert isinstance(next_step(done), CloseRound)


def test_a_run_that_is_over_does_nothing() -> None:
    run = replace(an_open_round(a_run(1)), status=RunStatus.CANCELLED)
    assert next_step(run, NOW + 99) is None


def test_assignments_follow_the_phase() -> None:
    run = an_open_round(a_run(2), updated={"p1"})
    assert assignment_for(run, "p1", NOW).task is Task.WAIT
    train = assignment_for(run, "p2", NOW)
    assert (train.task, train.round, train.attempt, train.remaining_s) == (Task.TRAIN, 1, 0, 10.0)
    measuring = an_open_round(a_run(2), evaluators=("p1",))
    assert assignment_for(measuring, "p1", NOW).task is Task.EVALUATE
    assert assignment_for(measuring, "p2", NOW).task is Task.WAIT
    over = replace(run, status=RunStatus.FAILED, reason="nobody came")
    stop = assignment_for(over, "p1", NOW)
    assert (stop.task, stop.reason) == (Task.STOP, "nobody came")


def test_the_task_after_leaving_is_to_stop() -> None:
    run = a_run(1)
    run = replace(run, participants={"p1": participant(1, left=True)})
    assert assignment_for(run, "p1", NOW).task is Task.STOP


def test_a_request_must_name_the_open_round_attempt_and_phase() -> None:
    run = an_open_round(a_run(2), attempt=1)
    assert permissions.require_phase(run, 1, 1, RoundStatus.TRAINING).attempt == 1
    for round_, attempt, status in (
        (2, 1, RoundStatus.TRAINING),
        (1, 0, RoundStatus.TRAINING),
        (1, 1, RoundStatus.EVALUATING),
    ):
        with pytest.raises(StaleRound):
            permissions.require_phase(run, round_, attempt, status)
    with pytest.raises(RunClosed):
        permissions.require_phase(
            replace(run, status=RunStatus.FINISHED), 1, 1, RoundStatus.TRAINING
        )
    with pytest.raises(StaleRound):
        permissions.require_trainer(run, participant(9), 1, 1)


@pytest.mark.parametrize(
    ("closed", "renewed", "due"),
    [(0, 0, False), (1, 0, False), (2, 0, True), (2, 2, False), (3, 2, False), (4, 2, True)],
)
def test_a_round_waits_for_a_due_rebuild(closed: int, renewed: int, due: bool) -> None:
    run = replace(a_run(closed=closed, rounds=6), renewed=renewed)
    again = {"name": "fedpft", "distillation": {"epochs": 1, "every": 2}}
    values = run.settings.model_dump() | {"method": again}
    run = replace(run, settings=RunSettings.model_validate(values))
    everybody = set(run.participants)
    action = decide(run, everybody, NOW, settled=True)
    assert action == Rebuild(closed) if due else isinstance(action, OpenTraining)
    assert assignment_for(run, "p1", NOW).head == run.head
    never = replace(run, settings=Custom.of(run_settings(rounds=6)))
    assert isinstance(decide(never, everybody, NOW, settled=True), OpenTraining)
    assert "head" not in assignment_for(never, "p1", NOW).model_dump_json()


def test_nothing_is_distilled_after_the_last_round() -> None:
    again = DistillationSettings(epochs=1, every=3)
    assert [again.is_due(round_, 7) for round_ in range(8)] == [
        *[False, False, False, True, False, False],
        *[True, False],
    ]
    assert not again.is_due(6, 6)
    assert not DistillationSettings(epochs=1).is_due(6, 7)
