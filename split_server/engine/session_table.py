"""The sessions that are open: one for each participant, of whatever kind."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from protocol.errors import InvalidField, StepLost


class AnySession(Protocol):
    """What sessions have in common, of prompts or of a body."""

    name: str
    steps: int  # in all
    applied: int  # of them, so far
    expires_at: float  # on the monotonic clock

    @property
    def nbytes(self) -> int:
        """What it takes on the body's device."""
        ...


S = TypeVar("S", bound=AnySession)


class OpenSessions(Generic[S]):
    """The open session of each participant. Not thread-safe: the engine holds its lock."""

    def __init__(self) -> None:
        self._sessions: dict[tuple[str, str], S] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return sum(session.nbytes for session in self._sessions.values())

    def begin(self, run: str, participant: str, session: S) -> None:
        """Take the place of whatever session the participant had: it has begun anew."""
        self._sessions[run, participant] = session

    def find(self, run: str, participant: str, name: str) -> S | None:
        """The session of this name, if it is here."""
        session = self._sessions.get((run, participant))
        return session if session is not None and session.name == name else None

    def get(self, run: str, participant: str, name: str) -> S:
        """The session of this name.

        Raises:
            StepLost: it is not here; the server was restarted, or the round is over.
        """
        session = self.find(run, participant, name)
        if session is None:
            raise lost_session(name)
        return session

    def finished(self, run: str, participant: str, name: str) -> S:
        """The session of this name, which has come to its end.

        Raises:
            StepLost: it is not here, or not at its end.
        """
        session = self.get(run, participant, name)
        if session.applied != session.steps:
            raise lost_session(name)
        return session

    def expired(self, now: float) -> list[tuple[str, str, S]]:
        """The sessions whose time is up, each behind its run and participant."""
        return [
            (*who, session) for who, session in self._sessions.items() if session.expires_at <= now
        ]

    def drop(self, run: str, participant: str | None = None) -> None:
        """Forget the session of a participant, or those of all of a run."""
        for key in [k for k in self._sessions if k[0] == run and participant in (None, k[1])]:
            del self._sessions[key]


def lost_session(name: str) -> StepLost:
    """The error that makes a device begin its round's split training anew."""
    return StepLost(
        "the server does not hold this session",
        field="session",
        value=name,
        hint="begin the round's training anew, with a new session",
    )


def require_steps(named: int, steps: int) -> None:
    """Refuse a request that names another number of steps than its session has.

    Raises:
        InvalidField: it is another.
    """
    if named != steps:
        raise InvalidField(
            "a session has a fixed number of steps", field="steps", limit=steps, value=named
        )
