"""What the noised rounds of a run have cost so far, as events of its history."""

from __future__ import annotations

import math
from typing import Any

import torch
from sqlalchemy import select
from sqlalchemy.orm import Session

from protocol.seeds import derive_seed
from protocol.settings import RunSettings
from split_server.accountant import epsilon_of
from split_server.journal import record_event
from split_server.snapshot import RunSnapshot
from split_server.tables import EventRow, RoundRow

OPENED, SPENT = "round_opened", "privacy_spent"


def noise_generator(settings: RunSettings, round_: int, attempt: int) -> torch.Generator | None:
    """The noise of one attempt at a round: None, the system's entropy, unless a seed is asked for.

    The run's own seed will not do: every participant knows it, and could take the noise off.
    """
    seed = settings.federation.dp_seed
    if seed is None:
        return None
    own = derive_seed(seed, "privacy noise", settings.seed, round_, attempt)
    return torch.Generator().manual_seed(own)


def record_spent(session: Session, run: RunSnapshot, row: RoundRow, at: float) -> None:
    """Tell what the run has cost with this round, in the transaction that makes its state count.

    Only attempts that made a state are paid for: of the others nobody has seen anything. The
    history says who was drawn, to participants, too: sampling hides nothing from them.
    """
    federation = run.settings.federation
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
        epsilon=_number(epsilon_of([1.0] * len(rates), z, delta)),
        epsilon_secret_sample=_number(epsilon_of(rates, z, delta)),
    )


def spent(session: Session, run_id: str) -> dict[tuple[int, int], float | None]:
    """Epsilon after each round, by round and attempt."""
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
