"""Sum up what devices report about a round's state, and select the run's best state."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

from sqlalchemy import select
from sqlalchemy.orm import Session

from split_server.federation.selection import Report, compare
from split_server.federation.snapshot import RunSnapshot
from split_server.storage.database import BestState, EvaluationRow, RoundRow, RunRow
from split_server.storage.events import record_event


def measure(session: Session, run: RunSnapshot, row: RoundRow, at: float) -> None:
    """Write accuracy and loss of a round's state, and select the run's state.

    Args:
        session: the open transaction.
        run: the run before this transaction.
        row: the round, which was in evaluation.
        at: seconds since 1970.
    """
    reports = read_reports(session, run, row.round, row.attempt)
    samples = sum(report.samples for report in reports.values())
    if samples:
        row.evaluation_samples = samples
        row.accuracy = sum(report.correct for report in reports.values()) / samples
        row.evaluation_loss = sum(report.loss_sum for report in reports.values()) / samples
        _warn_of_loss(session, run, row, row.evaluation_loss, at)
    if run.plan.federation.keep_best:
        _select_state(session, run, row, reports, at)


def rounds_without_progress(session: Session, run: RunSnapshot) -> int:
    """Count the newest measured rounds in a row whose state is no better than the best one."""
    session.flush()
    steps = session.scalars(
        select(RoundRow.progress)
        .where(RoundRow.run_id == run.id, RoundRow.change.is_not(None))
        .order_by(RoundRow.round.desc(), RoundRow.attempt.desc())
    )
    return len(list(itertools.takewhile(lambda progress: not progress, steps)))


def _warn_of_loss(
    session: Session, run: RunSnapshot, row: RoundRow, loss: float, at: float
) -> None:
    """Record that two measured rounds in a row had a loss above that of guessing."""
    guessing = math.log(run.plan.model.num_classes)
    before = session.scalars(
        select(RoundRow.evaluation_loss)
        .where(
            RoundRow.run_id == run.id,
            RoundRow.evaluation_loss.is_not(None),
            RoundRow.round < row.round,
        )
        .order_by(RoundRow.round.desc(), RoundRow.attempt.desc())
        .limit(1)
    ).first()
    if before is not None and min(before, loss) > guessing:
        data = {"round": row.round, "loss": loss, "guessing": guessing}
        record_event(session, run.id, at, "loss_above_guessing", **data)


def read_reports(
    session: Session, run: RunSnapshot, round_: int, attempt: int
) -> dict[str, EvaluationRow]:
    """Return an attempt's evaluations by participant, in the order in which values are summed."""
    by_id = {
        report.participant_id: report
        for report in session.scalars(
            select(EvaluationRow).where(
                EvaluationRow.run_id == run.id,
                EvaluationRow.round == round_,
                EvaluationRow.attempt == attempt,
            )
        )
    }
    return {id_: by_id[id_] for id_ in run.in_order(frozenset(by_id))}


def _select_state(
    session: Session,
    run: RunSnapshot,
    row: RoundRow,
    reports: Mapping[str, EvaluationRow],
    at: float,
) -> None:
    """Make the measured state the best one, or go back to the best one if it is worse."""
    new, run_row = _losses(reports), session.get_one(RunRow, run.id)
    if not new:
        return
    best = run_row.best_state
    verdict = None
    if best is not None:
        verdict = compare(new, _losses(read_reports(session, run, best.round, best.attempt)))
    if verdict is not None:
        row.change, row.kept, row.progress = verdict.change, verdict.is_kept, verdict.is_progress
    if best is not None and not row.kept:
        run_row.set_state(best.refs)
        data = {"round": row.round, "change": row.change, "best_round": best.round}
        record_event(session, run.id, at, "state_discarded", **data)
        return
    refs = run_row.state
    run_row.best = BestState(
        round=row.round, attempt=row.attempt, device=refs.device, server=refs.server
    ).model_dump(mode="json")


def _losses(reports: Mapping[str, EvaluationRow]) -> dict[str, Report]:
    return {
        id_: Report(report.selection_loss, report.selection_samples)
        for id_, report in reports.items()
        if report.selection_loss is not None and report.selection_samples
    }
