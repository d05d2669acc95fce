"""How well each device's held-out samples were classified, from the server's own record."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import select

from split_server.store import Store
from split_server.tables import EvaluationRow, ParticipantRow, RoundRow


def device_accuracies(data_dir: Path, run_id: str) -> dict[str, float]:
    """The newest measured global state's accuracy on each device's samples, by device name.

    Devices without held-out samples, or which did not answer in that round, are left out.
    """
    store = Store(data_dir / "server.sqlite")
    try:
        with store.reading() as session:
            newest = session.execute(
                select(RoundRow.round, RoundRow.attempt)
                .where(RoundRow.run_id == run_id, RoundRow.accuracy.is_not(None))
                .order_by(RoundRow.round.desc(), RoundRow.attempt.desc())
                .limit(1)
            ).first()
            if newest is None:
                return {}
            rows = session.execute(
                select(ParticipantRow.name, EvaluationRow.correct, EvaluationRow.samples)
                .join(
                    ParticipantRow,
                    (ParticipantRow.run_id == EvaluationRow.run_id)
                    & (ParticipantRow.id == EvaluationRow.participant_id),
                )
                .where(
                    EvaluationRow.run_id == run_id,
                    EvaluationRow.round == newest.round,
                    EvaluationRow.attempt == newest.attempt,
                )
                .order_by(ParticipantRow.name)
            ).all()
    finally:
        store.close()
    return {name: correct / samples for name, correct, samples in rows if samples}
