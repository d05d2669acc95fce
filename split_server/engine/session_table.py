"""The open training sessions: at most one for each participant."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from torch import Tensor

from protocol.errors import InvalidField, StepLost


class Session(Protocol):
    """What all training sessions have in common, whatever they tune."""

    name: str
    steps: int  # in total
    applied: int  # steps whose gradients have been applied
    expires_at: float  # seconds on the monotonic clock

    @property
    def nbytes(self) -> int:
        """Bytes on the body's device."""
        ...

    def trained_state(self) -> dict[str, Tensor]:
        """Return what a finished session has tuned: copies on the CPU, by names of a state.

        Raises:
            NonFinite: a tensor is not finite.
        """
        ...


S = TypeVar("S", bound=Session)


class SessionTable(Generic[S]):
    """The open session of each participant. Not thread-safe: callers hold the engine's lock."""

    def __init__(self) -> None:
        self._sessions: dict[tuple[str, str], S] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def nbytes(self) -> int:
        """Bytes of all sessions on the body's device."""
        return sum(session.nbytes for session in self._sessions.values())

    def add(self, run: str, participant: str, session: S) -> None:
        """Add a session; it replaces the participant's earlier one."""
        self._sessions[run, participant] = session

    def find(self, run: str, participant: str, name: str) -> S | None:
        """Return the participant's open session, if it has this name."""
        session = self._sessions.get((run, participant))
        return session if session is not None and session.name == name else None

    def get(self, run: str, participant: str, name: str) -> S:
        """Return the participant's open session of this name.

        Raises:
            StepLost: it is not open; the server was restarted, or the round is over.
        """
        session = self.find(run, participant, name)
        if session is None:
            raise lost_session_error(name)
        return session

    def list_expired(self, now: float) -> list[tuple[str, str, S]]:
        """Return (run, participant, session) of all sessions that expired before ``now``."""
        return [
            (run, participant, session)
            for (run, participant), session in self._sessions.items()
            if session.expires_at <= now
        ]

    def drop(self, run: str, participant: str | None = None) -> None:
        """Drop a participant's session, or all sessions of a run."""
        for key in [k for k in self._sessions if k[0] == run and participant in (None, k[1])]:
            del self._sessions[key]


def lost_session_error(name: str) -> StepLost:
    """Build the error that makes a device restart its split training of the round."""
    return StepLost(
        "the server does not have this session",
        field="session",
        value=name,
        hint="restart the round's training with a new session",
    )


def check_steps(steps: int, session_steps: int) -> None:
    """Check that a request names its session's number of steps.

    Raises:
        InvalidField: the numbers differ.
    """
    if steps != session_steps:
        raise InvalidField(
            "a session has a fixed number of steps",
            field="steps",
            limit=session_steps,
            value=steps,
        )
