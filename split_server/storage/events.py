"""Events of a run, and requests that change state exactly once."""

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
    """A request that changes state.

    Attributes:
        scope: the sender and the operation.
        key: SHA-256 of the request's idempotency key; equal keys mark repeats.
        digest: SHA-256 of the content.
    """

    scope: str
    key: str
    digest: str

    @classmethod
    def of(
        cls, scope: str, key: str | None, content: bytes | bytearray | memoryview = b""
    ) -> IdempotentRequest:
        """Check the key and hash the content.

        Raises:
            InvalidField: the key is missing or invalid.
        """
        if not key:
            raise InvalidField(
                "a request that changes state needs an idempotency key",
                field=IDEMPOTENCY_HEADER,
                hint="send a new random text, and the same text with each repeat",
            )
        if len(key) > _MAX_KEY or not key.isprintable() or not key.isascii():
            raise InvalidField(
                "an idempotency key must be printable ASCII of limited length",
                field=IDEMPOTENCY_HEADER,
                limit=_MAX_KEY,
                value=len(key),
            )
        # Whoever reads the database must not be able to join with the key of a device.
        hashed = hashlib.sha256(f"{scope}\n{key}".encode()).hexdigest()
        return cls(scope, hashed, hashlib.sha256(content).hexdigest())

    def is_known(self, session: Session) -> bool:
        """Whether a request with this key has had a response, whatever its content."""
        return session.get(IdempotentResponseRow, (self.scope, self.key)) is not None

    def stored(self, session: Session) -> dict[str, Any] | None:
        """Return the response to an earlier request with this key, whatever its content."""
        row = session.get(IdempotentResponseRow, (self.scope, self.key))
        return None if row is None else row.response

    def recall(self, session: Session) -> dict[str, Any] | None:
        """Return the response to an earlier, equal request.

        Raises:
            IdempotencyKeyReused: another request has used the key.
        """
        row = session.get(IdempotentResponseRow, (self.scope, self.key))
        if row is None:
            return None
        if row.request != self.digest:
            raise IdempotencyKeyReused(
                "another request has used this idempotency key", field=IDEMPOTENCY_HEADER
            )  # no value: the key of a join is a device's secret
        return row.response

    def remember(self, session: Session, response: dict[str, Any], at: float) -> None:
        """Store the response, in the transaction of the change itself."""
        session.add(
            IdempotentResponseRow(
                scope=self.scope,
                key=self.key,
                request=self.digest,
                response=response,
                created_at=at,
            )
        )


def record_event(session: Session, run_id: str, at: float, kind: str, **data: Any) -> None:
    """Add an event to a run, in the transaction of the change itself."""
    session.flush()
    last = session.scalar(select(func.max(EventRow.seq)).where(EventRow.run_id == run_id))
    session.add(EventRow(run_id=run_id, seq=(last or 0) + 1, at=at, kind=kind, data=data))
    session.flush()
