"""Record the privacy budget that the rounds of a run have spent, as events."""

from __future__ import annotations

import math
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from split_server.aggregation.differential_privacy import compute_epsilon
from split_server.federation.snapshot import RunSnapshot
from split_server.storage.database import EventRow, RoundRow
from split_server.storage.events import record_event

OPENED, SPENT = "round_opened", "privacy_spent"


def record_spent(session: Session, run: RunSnapshot, row: RoundRow, at: float) -> None:
    """Record the epsilon spent up to this round, in the transaction that publishes its state.

    Attempts that published no state do not count. ``epsilon`` assumes no amplification by sampling,
    since participants can read in the history who was sampled. ``epsilon_secret_sample`` assumes
    that the sample is secret.

    Args:
        session: the transaction.
        run: the run.
        row: the round.
        at: time in seconds since 1970.
    """
    federation = run.plan.federation
    if federation.dp_noise_multiplier == 0:
        return
    rate = _opened_with(session, row)
    rates = [float(data["sampling_rate"]) for data in _data(session, run.id, SPENT)]
    rates.append(rate)
    z, delta = federation.dp_noise_multiplier, federation.dp_delta
    record_event(
        session,
        run.id,
        at,
        SPENT,
        round=row.round,
        attempt=row.attempt,
        sampling_rate=rate,
        delta=delta,
        epsilon=_number(compute_epsilon([1.0] * len(rates), z, delta)),
        epsilon_secret_sample=_number(compute_epsilon(rates, z, delta)),
    )


def spent(session: Session, run_id: str) -> dict[tuple[int, int], float | None]:
    """Return epsilon after each round that published a state, by round and attempt."""
    return {
        (data["round"], data["attempt"]): data["epsilon"] for data in _data(session, run_id, SPENT)
    }


def _opened_with(session: Session, row: RoundRow) -> float:
    for data in _data(session, row.run_id, OPENED):
        if (data["round"], data["attempt"]) == (row.round, row.attempt):
            return float(data.get("sampling_rate", 1.0))
    return 1.0


def _data(session: Session, run_id: str, kind: str) -> list[dict[str, Any]]:
    rows = select(EventRow.data).where(EventRow.run_id == run_id, EventRow.kind == kind)
    return list(session.scalars(rows.order_by(EventRow.seq)))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
