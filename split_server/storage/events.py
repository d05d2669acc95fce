"""Two habits of every change: it leaves an event, and a repeat of it gets the same answer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from protocol.errors import IdempotencyKeyReused, InvalidField
from protocol.wire import IDEMPOTENCY_HEADER
from split_server.storage.database import EventRow, IdempotentResponseRow

_MAX_KEY = 200  # characters


@dataclass(frozen=True)
class IdempotentRequest:
    """One request that changes state: who asks for what, under which key, with which content."""

    scope: str
    key: str
    digest: str

    @classmethod
    def of(
        cls, scope: str, key: str | None, content: bytes | bytearray | memoryview = b""
    ) -> IdempotentRequest:
        """Raises `InvalidField` where the key is missing or no key."""
        if not key:
            raise InvalidField(
                "a request that changes state carries an idempotency key",
                field=IDEMPOTENCY_HEADER,
                hint="send a fresh random text, and the same one with every repeat",
            )
        if len(key) > _MAX_KEY or not key.isprintable() or not key.isascii():
            raise InvalidField(
                "an idempotency key is printable ASCII of limited length",
                field=IDEMPOTENCY_HEADER,
                limit=_MAX_KEY,
                value=len(key),
            )
        return cls(scope, key, hashlib.sha256(content).hexdigest())

    def is_known(self, session: Session) -> bool:
        """Whether a request of this key was answered before, whatever its content."""
        return session.get(IdempotentResponseRow, (self.scope, self.key)) is not None

    def recall(self, session: Session) -> dict[str, Any] | None:
        """The answer that this very request was given before.

        Raises:
            IdempotencyKeyReused: the key was used for another request.
        """
        row = session.get(IdempotentResponseRow, (self.scope, self.key))
        if row is None:
            return None
        if row.request != self.digest:
            raise IdempotencyKeyReused(
                "this idempotency key was used for another request", field=IDEMPOTENCY_HEADER
            )  # without its value: that of a join is a device's secret
        return row.answer

    def remember(self, session: Session, answer: dict[str, Any], at: float) -> None:
        """Keep the answer, in the transaction that makes it true."""
        session.add(
            IdempotentResponseRow(
                scope=self.scope,
                key=self.key,
                request=self.digest,
                answer=answer,
                created_at=at,
            )
        )


def record_event(session: Session, run_id: str, at: float, kind: str, **data: Any) -> None:
    """Add an event to a run's journal, in the transaction that makes it true."""
    session.flush()
    last = session.scalar(select(func.max(EventRow.seq)).where(EventRow.run_id == run_id))
    session.add(EventRow(run_id=run_id, seq=(last or 0) + 1, at=at, kind=kind, data=data))
    session.flush()
