"""Decide the next step of a run, and which requests its open round accepts. No side effects."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass

from protocol.messages import Assignment, RoundStatus, Task
from protocol.seeds import derive_seed
from split_server.federation.snapshot import OpenRound, RunSnapshot
from split_server.storage.run_files import StateRefs


@dataclass(frozen=True)
class OpenTraining:
    """Open an attempt at a round for the sampled participants."""

    round: int
    attempt: int
    sampled: tuple[str, ...]
    sampling_rate: float | None = None  # None without differential privacy


@dataclass(frozen=True)
class Aggregate:
    """Average the updates; then the evaluators evaluate the result. None: close the round."""

    updated: tuple[str, ...]
    evaluators: tuple[str, ...]


@dataclass(frozen=True)
class Refusal:
    """An update that does not count.

    Attributes:
        participant: its sender.
        code: why, as in the event.
        value: what was measured.
        limit: of it.
    """

    participant: str
    code: str
    value: float
    limit: float


@dataclass(frozen=True)
class Publish:
    """Make the average, which is already on disk, the global state."""

    updated: tuple[str, ...]
    evaluators: tuple[str, ...]
    state: StateRefs
    refused: tuple[Refusal, ...] = ()
    left_out: tuple[str, ...] = ()  # updates that the aggregation rule does not use


@dataclass(frozen=True)
class Repeat:
    """Close this attempt without a result: too few updates arrived or could be counted.

    Attributes:
        updates: number of updates that can be counted.
        reason: why there are so few; None: they did not arrive.
        is_failure: whether the attempt counts against `max_repeats`: it does if participants
            answered, and not if they were away.
    """

    updates: int
    reason: str | None = None
    is_failure: bool = True


@dataclass(frozen=True)
class CloseRound:
    """Close the round: every evaluator has sent its evaluation, left or timed out."""


@dataclass(frozen=True)
class Rebuild:
    """Let the method rebuild the run's model after this round."""

    round: int


@dataclass(frozen=True)
class FailRun:
    """End the run: the round has been repeated as often as allowed."""

    reason: str


Action = OpenTraining | Aggregate | Publish | Repeat | CloseRound | Rebuild | FailRun


def decide(
    run: RunSnapshot,
    live: Collection[str],
    now: float,
    *,
    settled: bool,
    away: Collection[str] = (),
    pausing: Collection[str] = (),
) -> Action | None:
    """Return the next step of a run, or None to wait.

    Args:
        run: the run.
        live: ids of participants with a recent request.
        away: ids of participants that told that they end; no round waits for them.
        pausing: ids of participants that are drawn only if too few others are there.
        now: seconds on the monotonic clock.
        settled: the server has been up long enough for every live participant to call. Before
            that, a new round and an evaluation wait for all of them, so that a restart does not
            shrink them.
    """
    if run.status.is_over:
        return None
    if run.open_round is None:
        if run.paused:
            return None
        if run.needs_rebuild:
            return Rebuild(run.closed_rounds)
        return _open_next(run, live, pausing, settled=settled)
    if run.open_round.status == RoundStatus.TRAINING:
        return _end_training(run, run.open_round, live, away, now, settled=settled)
    if pending := pending_evaluators(run, run.open_round):
        if is_unmeasured(run, run.open_round):
            return None  # the last state of a run is measured, however long that takes
        if not _is_late(run, now) and not set(pending) <= set(away):
            return None
    return CloseRound()


def is_unmeasured(run: RunSnapshot, open_round: OpenRound) -> bool:
    """Whether an open evaluation is the last one of its run, and has no report yet."""
    is_evaluating = open_round.status == RoundStatus.EVALUATING
    return is_evaluating and _is_last(run, open_round) and not open_round.evaluated


def _open_next(
    run: RunSnapshot, live: Collection[str], pausing: Collection[str], *, settled: bool
) -> OpenTraining | None:
    federation = run.plan.federation
    present, drawable = run.trainers, run.drawable(live)
    if not _has_enough(run, drawable) or is_tuning_due(run):
        return None
    if not settled and any(participant.id not in live for participant in present):
        return None
    round_, attempt = run.next_round, run.repeats
    count = federation.participants_per_round
    reliable = [id_ for id_ in drawable if id_ not in pausing]
    if len(reliable) >= federation.min_updates:
        drawable = reliable
    sampled = _sample(run, drawable, count, round_, attempt)
    rate = len(sampled) / len(drawable) if federation.dp_noise_multiplier else None
    return OpenTraining(round_, attempt, sampled, rate)


def _has_enough(run: RunSnapshot, drawable: Collection[str]) -> bool:
    """Whether enough participants are there for the next round."""
    federation = run.plan.federation
    if run.closed_rounds == 0 and len(run.trainers) < federation.min_participants:
        return False
    return len(drawable) >= federation.min_updates


def is_tuning_due(run: RunSnapshot) -> bool:
    """Whether the server has to tune the run's body before its first round can begin."""
    if run.plan.training.server_tuning == "none" or run.body_tuned or run.status.is_over:
        return False
    is_first = run.open_round is None and not run.closed_rounds and not run.repeats
    return is_first and _has_enough(run, run.drawable(run.labelled))


def _sample(
    run: RunSnapshot, candidates: list[str], count: int | None, round_: int, attempt: int
) -> tuple[str, ...]:
    if count is None or count >= len(candidates):
        return tuple(candidates)
    federation = run.plan.federation
    if federation.dp_noise_multiplier and federation.dp_seed is None:
        # If participants could predict the sample, it would not amplify their privacy.
        sampled = random.SystemRandom().sample(candidates, count)
    else:
        seed = derive_seed(run.plan.seed, "sample", round_, attempt)
        sampled = random.Random(seed).sample(candidates, count)  # noqa: S311 - need not be secret
    return tuple(run.in_order(frozenset(sampled)))


def _end_training(
    run: RunSnapshot,
    open_round: OpenRound,
    live: Collection[str],
    away: Collection[str],
    now: float,
    *,
    settled: bool,
) -> Action | None:
    has_enough = len(open_round.updated) >= run.plan.federation.min_updates
    # Without enough updates, who is away may come back until the deadline.
    gone = away if has_enough else ()
    pending = [id_ for id_ in pending_trainers(run, open_round) if id_ not in gone]
    if pending and not _is_late(run, now):
        return None
    if not has_enough:
        if pending:
            return Repeat(len(open_round.updated), is_failure=False)
        return repeat_or_fail(run, open_round, len(open_round.updated))
    everybody = _evaluators(run, open_round, run.participants)
    if not settled and not set(everybody) <= set(live):
        return None  # after a restart: the live ones have not called yet
    evaluators = _evaluators(run, open_round, live)
    if not evaluators and _is_last(run, open_round):
        evaluators = everybody  # nobody is there now; whoever comes first measures the last state
    return Aggregate(tuple(run.in_order(open_round.updated)), evaluators)


def repeat_or_fail(
    run: RunSnapshot, open_round: OpenRound, updates: int, reason: str | None = None
) -> Repeat | FailRun:
    """Return the step after an attempt with too few updates: repeat the round, or fail the run.

    Args:
        run: the run.
        open_round: the attempt.
        updates: number of accepted updates.
        reason: why updates were not accepted; None: they did not arrive.
    """
    federation = run.plan.federation
    if run.failures < federation.max_repeats:
        return Repeat(updates, reason)
    return FailRun(
        f"round {open_round.round} got {updates} of at least {federation.min_updates} updates "
        f"(attempt {run.failures + 1} of {federation.max_repeats + 1})"
        + (f": {reason}" if reason else "")
    )


def _evaluators(run: RunSnapshot, open_round: OpenRound, live: Collection[str]) -> tuple[str, ...]:
    federation = run.plan.federation
    interval = federation.evaluate_every
    if interval == 0 or not (open_round.round % interval == 0 or _is_last(run, open_round)):
        return ()
    selects = run.plan.selects_states
    return tuple(
        participant.id
        for participant in run.present
        if participant.id in live
        and (participant.test_samples or (selects and participant.train_samples))
    )


def pending_trainers(run: RunSnapshot, open_round: OpenRound) -> list[str]:
    """Return the sampled participants that can still send an update."""
    answered = open_round.updated | open_round.declined
    return [
        id_ for id_ in open_round.sampled if id_ not in answered and not run.participants[id_].left
    ]


def pending_evaluators(run: RunSnapshot, open_round: OpenRound) -> list[str]:
    """Return the evaluators that can still send an evaluation."""
    return [
        id_
        for id_ in open_round.evaluators
        if id_ not in open_round.evaluated and not run.participants[id_].left
    ]


def _is_last(run: RunSnapshot, open_round: OpenRound) -> bool:
    return open_round.round >= run.plan.federation.rounds


def _is_late(run: RunSnapshot, now: float) -> bool:
    if run.open_round is not None and run.open_round.closing:
        return True
    return run.deadline is not None and now >= run.deadline


def next_task(run: RunSnapshot, participant_id: str) -> Task:
    """Return what a participant's samples are needed for next, whoever does it."""
    open_round = run.open_round
    if run.status.is_over or run.participants[participant_id].left:
        return Task.STOP
    if open_round is None:
        return Task.WAIT
    if open_round.status == RoundStatus.TRAINING:
        return Task.TRAIN if participant_id in pending_trainers(run, open_round) else Task.WAIT
    is_pending = participant_id in pending_evaluators(run, open_round)
    return Task.EVALUATE if is_pending else Task.WAIT


def _device_task(run: RunSnapshot, participant_id: str) -> Task:
    """Return a device's next task; with shared labels the server does all but the upload."""
    task, participant = next_task(run, participant_id), run.participants[participant_id]
    if task is Task.STOP or not run.plan.shares_labels:
        return task
    has_samples = participant.train_samples or participant.test_samples
    return Task.UPLOAD if has_samples and not participant.labelled else Task.WAIT


def assignment_for(run: RunSnapshot, participant_id: str, now: float) -> Assignment:
    """Return a device's next task."""
    open_round, task = run.open_round, _device_task(run, participant_id)
    attempt = open_round.attempt if open_round else run.repeats
    remaining: float | None = None
    if open_round is not None and run.deadline is not None and task is not Task.STOP:
        remaining = max(0.0, run.deadline - now)
    reason = run.reason
    if task == Task.STOP and not run.status.is_over:
        reason = "you have left this run"
    return Assignment(
        task=task,
        round=run.round,
        attempt=attempt,
        state=run.state.device,
        remaining_s=remaining,
        status=run.status,
        reason=reason,
        head=run.head if run.settings.method.rebuilds_head else None,
        start=run.start_attempt,
        rate_scale=run.rate_scale,
    )
