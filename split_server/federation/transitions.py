"""Write the steps that `rounds.decide` returns to disk, one transaction for each step."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session
from torch import Tensor

from protocol.errors import DamagedFile, SFPromptError
from protocol.federation import FederationSettings
from protocol.messages import BlobRef, RoundStatus, RunStatus
from protocol.plan import RunPlan
from split_server.aggregation.differential_privacy import make_noise_generator, private_mean
from split_server.aggregation.fedavg import WeightedState, weighted_mean
from split_server.aggregation.publishing import publish
from split_server.aggregation.rules import aggregate
from split_server.aggregation.server_optimizer import server_step
from split_server.federation.checks import UpdateChecks
from split_server.federation.measurement import measure, rounds_without_progress
from split_server.federation.privacy_budget import OPENED, record_spent
from split_server.federation.records import REFUSED
from split_server.federation.rounds import (
    Action,
    Aggregate,
    CloseRound,
    FailRun,
    OpenTraining,
    Publish,
    Repeat,
    repeat_or_fail,
)
from split_server.federation.snapshot import REPEATED, OpenRound, RunSnapshot
from split_server.federation.views import closed_traffic
from split_server.method import RoundMean
from split_server.storage.database import (
    RoundRow,
    RunRow,
    UpdateRow,
)
from split_server.storage.events import record_event
from split_server.storage.run_files import RunFiles, StateRefs
from split_server.storage.tensor_files import open_tensors, read_tensors
from split_server.storage.traffic import Meter


def average(
    session: Session, run: RunSnapshot, action: Aggregate, files: RunFiles
) -> Publish | Repeat | FailRun:
    """Compute the new global state and write it to disk; `apply` then refers to it in the database.

    No transaction waits for this computation. It depends only on files that are kept until the
    result is in the database, so that the result after a crash is the same.

    Args:
        session: a session that reads.
        run: the run.
        action: the step to do.
        files: files of the run.

    Returns:
        The step for `apply`.
    """
    row, open_round = _open_row(session, run), _open_round(run)
    federation, base = run.plan.federation, run.state
    try:
        sent = _updates(session, row, action.updated)
        checks = UpdateChecks(run, row.round, row.attempt, files)
        refused = checks.find_refused(sent)
        updates = [update for at, update in enumerate(sent) if at not in refused]
        refusals = tuple(refusal for _, refusal in sorted(refused.items()))
        if len(updates) < federation.min_updates:
            who = ", ".join(f"{each.participant} ({each.code})" for each in refusals)
            reason = f"refused: the update of {who}" if refusals else None
            return repeat_or_fail(run, open_round, len(updates), reason)
        mean, left_out = _mean(run.plan, row, base, updates, checks, files)
        names = run.method.extra_shapes(run.plan, row.round)
        extras = {name: mean.pop(name) for name in names}
        if extras:
            files.write_extras(row.round, extras)
        samples = sum(update.samples for update in updates)
        mean = run.method.next_state(run.plan, RoundMean(row.round, samples, mean, extras))
        state = _next_state(federation, row.round, base, mean, files)
    except DamagedFile as error:
        return repeat_or_fail(run, open_round, len(action.updated) - 1, str(error))
    except SFPromptError as error:
        # Each update was valid; only the aggregation can fail.
        return FailRun(f"round {row.round}: {error}")
    refs = publish(state, base, run.plan, files)
    counted = tuple(update.participant_id for update in updates)
    return Publish(counted, action.evaluators, refs, refusals, left_out)


def _mean(
    plan: RunPlan,
    row: RoundRow,
    base: StateRefs,
    updates: list[UpdateRow],
    checks: UpdateChecks,
    files: RunFiles,
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Aggregate the updates with the run's rule, or with differential privacy.

    Returns:
        The aggregated tensors, and the participants whose updates the rule does not use.
    """
    federation, start = plan.federation, checks.start_state(updates)
    if start is not None:
        return start, ()
    # Rules that compare all updates map their files, and read one tensor at a time.
    read = read_tensors if federation.aggregation == "fedavg" else open_tensors
    loads = [partial(read, files.update(update.sha256)) for update in updates]
    if federation.dp_clip is None:
        weighted = [
            WeightedState(checks.weight(update), load)
            for update, load in zip(updates, loads, strict=True)
        ]
        result = aggregate(federation, weighted)
        return result.tensors, tuple(updates[at].participant_id for at in result.left_out)
    mean = private_mean(
        loads,
        files.read_state(base),
        clip=federation.dp_clip,
        noise_multiplier=federation.dp_noise_multiplier,
        generator=make_noise_generator(plan, row.round, row.attempt),
    )
    return mean, ()


def _next_state(
    federation: FederationSettings,
    round_: int,
    base: StateRefs,
    mean: dict[str, Tensor],
    files: RunFiles,
) -> dict[str, Tensor]:
    """Return the new global state: the mean, or the result of a step of the server optimiser."""
    if federation.server_optimizer == "fedavg":
        return mean
    before = files.read_moments(round_ - 1)
    state, moments = server_step(federation, files.read_state(base), mean, before)
    files.write_moments(round_, moments)
    return state


def apply(
    session: Session,
    run: RunSnapshot,
    action: Action,
    meter: Meter,
    at: float,
    work: Mapping[str, float] | None = None,
) -> None:
    """Write one step of a run to the database.

    Args:
        session: the transaction of the step.
        run: the run before the step.
        action: the step; `average` converts an `Aggregate` first.
        meter: counts the traffic.
        at: time in seconds since 1970.
        work: amounts of work for the run, for its history.
    """
    if work and isinstance(action, Publish | CloseRound):
        record_event(session, run.id, at, "engine", **work)
    if isinstance(action, OpenTraining):
        _open(session, run, action, at)
        return
    row = _open_row(session, run)
    if isinstance(action, Publish):
        _publish(session, run, row, action, meter, at)
    elif isinstance(action, CloseRound):
        measure(session, run, row, at)
        _close(session, run, row, meter, at)
    elif isinstance(action, Repeat):
        _end_attempt(session, run, row, meter, at)
        reason = {} if action.reason is None else {"reason": action.reason}
        data = {"updates": action.updates, "failure": action.is_failure, **reason}
        _record(session, row, REPEATED, at, **data)
    elif isinstance(action, FailRun):
        _end_attempt(session, run, row, meter, at)
        end_run(session, run.id, RunStatus.FAILED, action.reason, at)
    else:
        raise TypeError(f"{type(action).__name__} cannot be applied")


def end_run(
    session: Session, run_id: str, status: RunStatus, reason: str | None, at: float
) -> None:
    """Finish, cancel or fail a run."""
    row = session.get_one(RunRow, run_id)
    row.status, row.reason, row.finished_at = status, reason, at
    data = {"reason": reason} if reason else {}
    record_event(session, run_id, at, f"run_{status}", **data)


def replace_model(
    session: Session, run: RunSnapshot, weights: str, head: BlobRef, round_: int, at: float
) -> None:
    """Replace weights and head of a run by those that were rebuilt after this round."""
    row = session.get_one(RunRow, run.id)
    row.backbone_path, row.renewed = weights, round_
    row.head_sha256, row.head_nbytes = head.sha256, head.nbytes
    record_event(session, run.id, at, "model_rebuilt", round=round_, head=head.sha256)


def abandon_round(session: Session, run: RunSnapshot, meter: Meter, at: float) -> None:
    """End the open attempt, if there is one."""
    if run.open_round is not None:
        _end_attempt(session, run, _open_row(session, run), meter, at)


def _open(session: Session, run: RunSnapshot, action: OpenTraining, at: float) -> None:
    if run.status == RunStatus.WAITING:
        session.get_one(RunRow, run.id).status = RunStatus.RUNNING
    session.add(
        RoundRow(
            run_id=run.id,
            round=action.round,
            attempt=action.attempt,
            status=RoundStatus.TRAINING,
            opened_at=at,
            closed_at=None,
            closing=False,
            sampled=list(action.sampled),
            declined=[],
            evaluators=[],
            samples=0,
            evaluation_samples=0,
            change=None,
            kept=True,
            progress=True,
            traffic={},
        )
    )
    rate = {} if action.sampling_rate is None else {"sampling_rate": action.sampling_rate}
    record_event(
        session,
        run.id,
        at,
        OPENED,
        round=action.round,
        attempt=action.attempt,
        sampled=list(action.sampled),
        **rate,
    )


def _publish(
    session: Session, run: RunSnapshot, row: RoundRow, action: Publish, meter: Meter, at: float
) -> None:
    updates = _updates(session, row, action.updated)
    row.samples = sum(update.samples for update in updates)
    row.train_loss = weighted_mean((update.train_loss, update.samples) for update in updates)
    row.local_loss = weighted_mean((update.local_loss, update.samples) for update in updates)
    _set_state(session, run, row, action.state)
    for refusal in action.refused:
        _record(
            session,
            row,
            REFUSED,
            at,
            participant=refusal.participant,
            code=refusal.code,
            value=refusal.value,
            limit=refusal.limit,
        )
    left_out = {"left_out": list(action.left_out)} if action.left_out else {}
    _record(
        session,
        row,
        "state_aggregated",
        at,
        updates=len(updates),
        samples=row.samples,
        train_loss=row.train_loss,
        state=action.state.device.sha256,
        **left_out,
    )
    record_spent(session, run, row, at)
    if action.evaluators:
        row.status, row.evaluators = RoundStatus.EVALUATING, list(action.evaluators)
        row.closing = False  # the operator asked for the end of training
    else:
        _close(session, run, row, meter, at)


def _set_state(session: Session, run: RunSnapshot, row: RoundRow, refs: StateRefs) -> None:
    row.state_sha256, row.state_nbytes = refs.device.sha256, refs.device.nbytes
    run_row = session.get_one(RunRow, run.id)
    run_row.set_state(refs)


def _close(session: Session, run: RunSnapshot, row: RoundRow, meter: Meter, at: float) -> None:
    row.status, row.closed_at = RoundStatus.CLOSED, at
    _charge(session, run, row, meter)
    _record(
        session,
        row,
        "round_closed",
        at,
        accuracy=row.accuracy,
        evaluation_loss=row.evaluation_loss,
        evaluation_samples=row.evaluation_samples,
    )
    patience = run.plan.federation.patience
    if row.round >= run.plan.federation.rounds:
        end_run(session, run.id, RunStatus.FINISHED, None, at)
    elif patience and rounds_without_progress(session, run) >= patience:
        reason = f"{patience} rounds in a row without progress (federation.patience)"
        end_run(session, run.id, RunStatus.FINISHED, reason, at)


def _end_attempt(
    session: Session, run: RunSnapshot, row: RoundRow, meter: Meter, at: float
) -> None:
    # An attempt in evaluation has already produced its state.
    aggregated = row.status == RoundStatus.EVALUATING
    row.status = RoundStatus.CLOSED if aggregated else RoundStatus.REPEATED
    row.closed_at = at
    _charge(session, run, row, meter)


def _charge(session: Session, run: RunSnapshot, row: RoundRow, meter: Meter) -> None:
    """Assign all traffic since the end of the previous round to a round."""
    meter.save(session, run.id)
    row.traffic = meter.run(run.id).since(closed_traffic(session, run.id)).to_dict()


def _record(session: Session, row: RoundRow, kind: str, at: float, **data: Any) -> None:
    record_event(session, row.run_id, at, kind, round=row.round, attempt=row.attempt, **data)


def _updates(session: Session, row: RoundRow, participants: tuple[str, ...]) -> list[UpdateRow]:
    """Return the updates of an attempt, in this order of participants."""
    by_participant = {
        update.participant_id: update
        for update in session.scalars(
            select(UpdateRow).where(
                UpdateRow.run_id == row.run_id,
                UpdateRow.round == row.round,
                UpdateRow.attempt == row.attempt,
            )
        )
    }
    return [by_participant[id_] for id_ in participants]


def _open_row(session: Session, run: RunSnapshot) -> RoundRow:
    open_round = _open_round(run)
    return session.get_one(RoundRow, (run.id, open_round.round, open_round.attempt))


def _open_round(run: RunSnapshot) -> OpenRound:
    if run.open_round is None:  # impossible: the step was decided from this snapshot
        raise LookupError(f"run {run.id} has no open round")
    return run.open_round
