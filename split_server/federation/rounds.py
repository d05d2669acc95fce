"""What a run does next: decided from what is known, without touching anything."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass

from protocol.errors import Conflict, RunClosed, StaleRound
from protocol.messages import Assignment, RoundStatus, RunStatus, Task
from protocol.seeds import derive_seed
from split_server.federation.snapshot import Member, OpenRound, RunSnapshot
from split_server.storage.run_files import StateRefs


@dataclass(frozen=True)
class OpenTraining:
    """Open a round, or an attempt at it, for these participants."""

    round: int
    attempt: int
    sampled: tuple[str, ...]
    sampling_rate: float | None = None  # told where differential privacy takes account of it


@dataclass(frozen=True)
class Aggregate:
    """Average the updates that came; then let these measure the result (none: close)."""

    updated: tuple[str, ...]
    evaluators: tuple[str, ...]


@dataclass(frozen=True)
class Publish:
    """The average is on disk: make it the global state."""

    updated: tuple[str, ...]
    evaluators: tuple[str, ...]
    state: StateRefs


@dataclass(frozen=True)
class Repeat:
    """Too few updates came: close this attempt without a result."""

    updates: int


@dataclass(frozen=True)
class CloseRound:
    """Every evaluator has answered, left or run out of time."""


@dataclass(frozen=True)
class Redistill:
    """Distil the proxy again, with what this round's devices have told of its neurons."""

    round: int


@dataclass(frozen=True)
class FailRun:
    """The round has been repeated as often as it may be."""

    reason: str


Action = OpenTraining | Aggregate | Publish | Repeat | CloseRound | Redistill | FailRun


def decide(run: RunSnapshot, live: Collection[str], now: float, *, settled: bool) -> Action | None:
    """The next step of a run; None: wait.

    Args:
        run: the run.
        live: participants that have been heard of lately.
        now: seconds on the monotonic clock.
        settled: the server has been up long enough for everybody to have called. Before, a new
            round waits until all have, so that a restart does not shrink it.
    """
    if run.status.over:
        return None
    if run.open_round is None:
        if run.distilled_round:
            return Redistill(run.closed_rounds)
        return _open_next(run, live, settled=settled)
    if run.open_round.status == RoundStatus.TRAINING:
        return _end_training(run, run.open_round, live, now)
    if pending_evaluators(run, run.open_round) and not _is_late(run, now):
        return None
    return CloseRound()


def _open_next(run: RunSnapshot, live: Collection[str], *, settled: bool) -> OpenTraining | None:
    federation = run.plan.federation
    present = [m for m in run.present if m.train_samples > 0]
    candidates = [m.id for m in present if m.id in live]
    if run.closed_rounds == 0 and len(present) < federation.min_participants:
        return None
    if len(candidates) < federation.min_updates:
        return None
    if not settled and any(m.id not in live for m in present):
        return None
    round_, attempt = run.closed_rounds + 1, run.repeats
    count = federation.participants_per_round
    drawn = _draw(run, candidates, count, round_, attempt)
    rate = len(drawn) / len(candidates) if federation.dp_noise_multiplier else None
    return OpenTraining(round_, attempt, drawn, rate)


def _draw(
    run: RunSnapshot, candidates: list[str], count: int | None, round_: int, attempt: int
) -> tuple[str, ...]:
    if count is None or count >= len(candidates):
        return tuple(candidates)
    federation = run.plan.federation
    if federation.dp_noise_multiplier and federation.dp_seed is None:
        # A draw that participants can calculate would not add to anybody's privacy.
        drawn = random.SystemRandom().sample(candidates, count)
    else:
        seed = derive_seed(run.plan.seed, "sample", round_, attempt)
        drawn = random.Random(seed).sample(candidates, count)  # noqa: S311 - fairness, not secrecy
    return tuple(run.in_order(frozenset(drawn)))


def _end_training(
    run: RunSnapshot, open_round: OpenRound, live: Collection[str], now: float
) -> Action | None:
    if pending_trainers(run, open_round) and not _is_late(run, now):
        return None
    federation = run.plan.federation
    if len(open_round.updated) >= federation.min_updates:
        return Aggregate(
            updated=tuple(run.in_order(open_round.updated)),
            evaluators=_evaluators(run, open_round, live),
        )
    if open_round.attempt >= federation.max_repeats:
        return FailRun(
            f"round {open_round.round} got {len(open_round.updated)} of at least "
            f"{federation.min_updates} updates (attempt {open_round.attempt + 1} of "
            f"{federation.max_repeats + 1})"
        )
    return Repeat(len(open_round.updated))


def _evaluators(run: RunSnapshot, open_round: OpenRound, live: Collection[str]) -> tuple[str, ...]:
    federation = run.plan.federation
    every = federation.evaluate_every
    is_last = open_round.round >= federation.rounds
    if every == 0 or not (open_round.round % every == 0 or is_last):
        return ()
    return tuple(m.id for m in run.present if m.test_samples > 0 and m.id in live)


def pending_trainers(run: RunSnapshot, open_round: OpenRound) -> list[str]:
    """Those who were asked to train and of whom an answer can still come."""
    answered = open_round.updated | open_round.declined
    return [p for p in open_round.sampled if p not in answered and not run.members[p].left]


def pending_evaluators(run: RunSnapshot, open_round: OpenRound) -> list[str]:
    """Those who were asked to evaluate and of whom an answer can still come."""
    return [
        p
        for p in open_round.evaluators
        if p not in open_round.evaluated and not run.members[p].left
    ]


def _is_late(run: RunSnapshot, now: float) -> bool:
    return run.deadline is not None and now >= run.deadline


def assignment_for(run: RunSnapshot, participant: str, now: float) -> Assignment:
    """What one participant is to do next."""
    open_round = run.open_round
    task, attempt = Task.WAIT, open_round.attempt if open_round else run.repeats
    remaining: float | None = None
    if run.status.over or run.members[participant].left:
        task = Task.STOP
    elif open_round is not None:
        if open_round.status == RoundStatus.TRAINING:
            busy = participant in pending_trainers(run, open_round)
            task = Task.TRAIN if busy else Task.WAIT
        elif participant in pending_evaluators(run, open_round):
            task = Task.EVALUATE
        if run.deadline is not None:
            remaining = max(0.0, run.deadline - now)
    reason = run.reason
    if task == Task.STOP and not run.status.over:
        reason = "you have left this run"
    return Assignment(
        task=task,
        round=run.round,
        attempt=attempt,
        state=run.state,
        remaining_s=remaining,
        status=run.status,
        reason=reason,
        head=run.head if run.plan.distillation.every else None,
    )


def require_running(run: RunSnapshot) -> None:
    """Refuse what only a run that is not over allows.

    Raises:
        RunClosed: the run is over.
    """
    if run.status.over:
        raise RunClosed(
            f"the run is {run.status}", field="run", limit=RunStatus.RUNNING, value=run.status
        )


def require_phase(
    run: RunSnapshot, round_: int, attempt: int | None, status: RoundStatus
) -> OpenRound:
    """The open round, if it is the one that a request speaks of.

    Args:
        run: the run.
        round_: the round that the request names.
        attempt: the attempt that it names; None: it names none.
        status: the phase that the request belongs to.

    Raises:
        RunClosed: the run is over.
        StaleRound: another round, attempt or phase is open, or none.
    """
    require_running(run)
    open_round = run.open_round
    if open_round is None or open_round.round != round_:
        raise StaleRound(
            "that round is not open", field="round", limit=open_number(run), value=round_
        )
    if attempt is not None and open_round.attempt != attempt:
        raise StaleRound(
            "that attempt at the round is not open",
            field="attempt",
            limit=open_round.attempt,
            value=attempt,
        )
    if open_round.status != status:
        raise StaleRound(
            f"the round is not {status} now",
            field="round",
            limit=str(status),
            value=str(open_round.status),
        )
    return open_round


def require_trainer(
    run: RunSnapshot, member: Member, round_: int, attempt: int | None
) -> OpenRound:
    """The open round, if this participant was asked to train in it.

    Raises:
        RunClosed: the run is over.
        StaleRound: the round is not open for training, or not for this participant.
    """
    open_round = require_phase(run, round_, attempt, RoundStatus.TRAINING)
    if member.id not in open_round.sampled:
        raise StaleRound(
            "this participant was not asked to train in this round", field="round", value=round_
        )
    return open_round


def require_pending_update(
    run: RunSnapshot, member: Member, round_: int, attempt: int
) -> OpenRound:
    """Return the open round if an update of this participant can still count in it.

    Raises:
        RunClosed: the run is over.
        StaleRound: as in `require_trainer`, or the update was counted or refused already.
    """
    open_round = require_trainer(run, member, round_, attempt)
    if member.id in open_round.updated or member.id in open_round.declined:
        raise StaleRound(
            "this participant's update was counted already", field="round", value=round_
        )
    return open_round


@dataclass(frozen=True)
class SenderPermission:
    """Decides whether a participant may send a request of the split plane now."""

    run: RunSnapshot
    participant: Member

    def require_running(self) -> None:
        """Raise `RunClosed` if the run is over."""
        require_running(self.run)

    def require_trainer(self, round_: int, attempt: int | None) -> None:
        """Raise as the function of this name does."""
        require_trainer(self.run, self.participant, round_, attempt)

    def require_pending_update(self, round_: int, attempt: int) -> None:
        """Raise as the function of this name does."""
        require_pending_update(self.run, self.participant, round_, attempt)


def require_any_trainer(run: RunSnapshot, member: Member) -> None:
    """Refuse a participant that no round waits for, whichever round it may mean.

    Raises:
        RunClosed: the run is over.
        StaleRound: no round is open for training, or not for this participant.
    """
    require_running(run)
    if run.open_round is None:
        raise StaleRound(
            "no round is open", field="round", limit="an open one", value=str(run.status)
        )
    require_trainer(run, member, run.open_round.round, None)


def require_first(already: Collection[str], participant: str, what: str) -> None:
    """Refuse a second answer to the same request.

    Raises:
        Conflict: one has been counted.
    """
    if participant in already:
        raise Conflict(
            f"this participant's {what} for this round has been counted already",
            field=what,
            limit=1,
            value=2,
        )


def open_number(run: RunSnapshot) -> int | None:
    """The number of the open round, if one is open."""
    return run.open_round.round if run.open_round else None


def require_evaluator(open_round: OpenRound, participant: str) -> None:
    """Refuse an evaluation by somebody who was not asked for one.

    Raises:
        StaleRound: this participant was not asked.
    """
    if participant not in open_round.evaluators:
        raise StaleRound(
            "this participant was not asked to evaluate this round",
            field="round",
            value=open_round.round,
        )
