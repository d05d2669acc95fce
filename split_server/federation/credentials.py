"""Who is asking. Identity comes from the credential alone, never from a request's content."""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import Forbidden, InvalidField, Unauthorized
from split_model.files import write_durably

_PREFIX = "sfp1"

_SECRET_BYTES = 32


@dataclass(frozen=True)
class Operator:
    """Holds the operator token: may create and cancel runs and read everything."""


@dataclass(frozen=True)
class JoinTokenHolder:
    """Holds the join token: may join runs."""


@dataclass(frozen=True)
class Member:
    """A participant of one run, proved by its credential."""

    run: str
    participant: str


@dataclass(frozen=True)
class Anonymous:
    """Has shown nothing, or nothing that this server issued."""

    showed_something: bool = False


Identity = Operator | JoinTokenHolder | Member | Anonymous


class Credentials:
    """Issues credentials and recognises them without looking anything up.

    A credential is ``sfp1.RUN.PARTICIPANT.MAC`` with an HMAC-SHA256 over the rest, so that a
    participant whose answer was lost on the way is given the same one again.
    """

    def __init__(self, secret: bytes, operator_token: str, join_token: str | None = None) -> None:
        self._secret = secret
        self._operator = operator_token.encode()
        self._join = join_token.encode() if join_token else None

    def issue(self, run: str, participant: str) -> str:
        return f"{_PREFIX}.{run}.{participant}.{self._mac(run, participant)}"

    def identify(self, authorization: str | None) -> Identity:
        """Who shows this ``Authorization`` header. Never raises: a stranger is an answer."""
        if not authorization:
            return Anonymous()
        scheme, _, token = authorization.partition(" ")
        shown = token.strip().encode(errors="replace")
        if scheme.lower() != "bearer":
            return Anonymous(showed_something=True)
        if hmac.compare_digest(shown, self._operator):
            return Operator()
        if self._join is not None and hmac.compare_digest(shown, self._join):
            return JoinTokenHolder()
        return self._member(shown.decode(errors="replace")) or Anonymous(showed_something=True)

    def may_join(self, identity: Identity) -> None:
        """Refuse who may not join a run.

        Raises:
            Unauthorized: a join token is set, and what was shown was not issued here, or nothing.
            Forbidden: the same, and a good credential of another kind was shown.
        """
        if self._join is None or isinstance(identity, (JoinTokenHolder, Operator)):
            return
        if isinstance(identity, Anonymous):
            hint = "edge-client takes it as --join-token, or from EDGE_CLIENT_JOIN_TOKEN"
            raise _stranger(identity, "joining takes this server's join token", hint)
        raise Forbidden("joining takes this server's join token; a credential was shown")

    def _member(self, token: str) -> Member | None:
        parts = token.split(".")
        if len(parts) != 4 or parts[0] != _PREFIX:
            return None
        _, run, participant, mac = parts
        expected = self._mac(run, participant)
        if not hmac.compare_digest(mac.encode(), expected.encode()):
            return None
        return Member(run, participant)

    def _mac(self, run: str, participant: str) -> str:
        message = f"{_PREFIX}.{run}.{participant}".encode()
        return hmac.digest(self._secret, message, "sha256").hex()


def require_operator(identity: Identity) -> None:
    """Refuse everybody but the operator.

    Raises:
        Unauthorized: no token, or one that this server does not know.
        Forbidden: a good credential of another kind.
    """
    if isinstance(identity, Operator):
        return
    if isinstance(identity, Anonymous):
        hint = "split-server takes it as --operator-token; without one the server makes its own"
        raise _stranger(identity, "this takes the operator token", hint)
    raise Forbidden("this takes the operator token; the credential shown is of another kind")


def require_member(identity: Identity, run: str | None = None) -> Member:
    """The participant that is asking.

    Args:
        identity: who is asking.
        run: the run that the path names; None: whichever the credential names.

    Raises:
        Unauthorized: no credential, or one that this server did not issue.
        Forbidden: a credential of another kind or of another run.
    """
    if isinstance(identity, Anonymous):
        raise _stranger(identity, "this takes a participant's credential")
    if not isinstance(identity, Member):
        raise Forbidden("this takes a participant's credential; the one shown is of another kind")
    if run is not None and identity.run != run:
        raise Forbidden("the credential belongs to another run", field="run", value=run)
    return identity


def require_reader(identity: Identity, run: str) -> None:
    """Refuse everybody but the operator and the participants of a run.

    Raises:
        Unauthorized: no credential, or one that this server did not issue.
        Forbidden: a credential of another kind or of another run.
    """
    if not isinstance(identity, Operator):
        require_member(identity, run)


def _stranger(
    identity: Anonymous, needed: str, hint: str = "send it as Authorization: Bearer TOKEN"
) -> Unauthorized:
    if identity.showed_something:
        return Unauthorized(f"{needed}; the one shown is not this server's", hint=hint)
    return Unauthorized(needed, hint=hint)


def load_secret(path: Path) -> bytes:
    """The server's secret, made on first use, readable by its owner alone.

    Raises:
        InvalidField: the file holds something else.
    """
    if not path.exists():
        write_durably(path, secrets.token_bytes(_SECRET_BYTES), mode=0o600)
    secret = path.read_bytes()
    if len(secret) != _SECRET_BYTES:
        raise InvalidField(
            f"{path} is not a secret of this server",
            field="data_dir",
            limit=_SECRET_BYTES,
            value=len(secret),
        )
    return secret


def load_operator_token(path: Path, given: str | None) -> str:
    """The operator token: the one given, else the one in the file, made on first use."""
    if given is not None:
        return given
    if not path.exists():
        write_durably(path, (secrets.token_urlsafe(24) + "\n").encode(), mode=0o600)
    token = path.read_text().strip()
    if not token:
        raise InvalidField(f"{path} is empty", field="operator_token", hint="remove the file")
    return token
