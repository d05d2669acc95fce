"""Identify the sender of a request by its credential, never by the content of the request."""

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
    """Sender with the operator token: may create and cancel runs, and read everything."""


@dataclass(frozen=True)
class JoinTokenHolder:
    """Sender with the join token: may join runs."""


@dataclass(frozen=True)
class ParticipantIdentity:
    """Sender with the credential of a participant of one run."""

    run: str
    participant: str


@dataclass(frozen=True)
class Anonymous:
    """Sender without a credential, or with one that this server did not issue."""

    sent_credential: bool = False


Identity = Operator | JoinTokenHolder | ParticipantIdentity | Anonymous


class Credentials:
    """Issues credentials, and verifies them without a database.

    A credential is ``sfp1.RUN.PARTICIPANT.MAC`` with an HMAC-SHA256 of the rest. A participant that
    repeats its join request therefore receives the same credential.

    Args:
        secret: key of the HMAC.
        operator_token: token of the operator.
        join_token: token that joining requires; None: anyone may join.
    """

    def __init__(self, secret: bytes, operator_token: str, join_token: str | None = None) -> None:
        self._secret = secret
        self._operator = operator_token.encode()
        self._join = join_token.encode() if join_token else None

    def issue(self, run_id: str, participant_id: str) -> str:
        """Return the participant's credential."""
        return f"{_PREFIX}.{run_id}.{participant_id}.{self._mac(run_id, participant_id)}"

    def identify(self, authorization: str | None) -> Identity:
        """Identify the sender of an ``Authorization`` header. Never raises."""
        if not authorization:
            return Anonymous()
        scheme, _, text = authorization.partition(" ")
        token = text.strip().encode(errors="replace")
        if scheme.lower() != "bearer":
            return Anonymous(sent_credential=True)
        if hmac.compare_digest(token, self._operator):
            return Operator()
        if self._join is not None and hmac.compare_digest(token, self._join):
            return JoinTokenHolder()
        return self._verify(token.decode(errors="replace")) or Anonymous(sent_credential=True)

    def require_may_join(self, identity: Identity) -> None:
        """Refuse a sender that may not join a run.

        Raises:
            Unauthorized: the server has a join token, and the sender is anonymous.
            Forbidden: the server has a join token, and the credential is of another kind.
        """
        if self._join is None or isinstance(identity, (JoinTokenHolder, Operator)):
            return
        if isinstance(identity, Anonymous):
            hint = "pass it to edge-client as --join-token or EDGE_CLIENT_JOIN_TOKEN"
            raise _unauthorized(identity, "joining requires this server's join token", hint)
        raise Forbidden("joining requires this server's join token, not another credential")

    def _verify(self, token: str) -> ParticipantIdentity | None:
        parts = token.split(".")
        if len(parts) != 4 or parts[0] != _PREFIX:
            return None
        _, run_id, participant_id, mac = parts
        expected = self._mac(run_id, participant_id)
        if not hmac.compare_digest(mac.encode(), expected.encode()):
            return None
        return ParticipantIdentity(run_id, participant_id)

    def _mac(self, run_id: str, participant_id: str) -> str:
        message = f"{_PREFIX}.{run_id}.{participant_id}".encode()
        return hmac.digest(self._secret, message, "sha256").hex()


def require_operator(identity: Identity) -> None:
    """Refuse every sender but the operator.

    Raises:
        Unauthorized: no token, or one that this server did not issue.
        Forbidden: a valid credential of another kind.
    """
    if isinstance(identity, Operator):
        return
    if isinstance(identity, Anonymous):
        hint = "pass it to split-server as --operator-token; the default is in DATA_DIR"
        raise _unauthorized(identity, "this request requires the operator token", hint)
    raise Forbidden("this request requires the operator token, not another credential")


def require_participant(identity: Identity, run_id: str | None = None) -> ParticipantIdentity:
    """Return the sender's identity if it is a participant.

    Args:
        identity: identity of the sender.
        run_id: run in the path of the request; None: the path has none.

    Raises:
        Unauthorized: no credential, or one that this server did not issue.
        Forbidden: a credential of another kind or of another run.
    """
    if isinstance(identity, Anonymous):
        raise _unauthorized(identity, "this request requires a participant's credential")
    if not isinstance(identity, ParticipantIdentity):
        raise Forbidden("this request requires a participant's credential, not another one")
    if run_id is not None and identity.run != run_id:
        raise Forbidden("the credential belongs to another run", field="run", value=run_id)
    return identity


def require_reader(identity: Identity, run_id: str) -> None:
    """Refuse every sender but the operator and the run's participants.

    Raises:
        Unauthorized: no credential, or one that this server did not issue.
        Forbidden: a credential of another kind or of another run.
    """
    if not isinstance(identity, Operator):
        require_participant(identity, run_id)


def _unauthorized(
    identity: Anonymous, message: str, hint: str = "send it as Authorization: Bearer TOKEN"
) -> Unauthorized:
    if identity.sent_credential:
        return Unauthorized(f"{message}; this server did not issue the one sent", hint=hint)
    return Unauthorized(message, hint=hint)


def load_secret(path: Path) -> bytes:
    """Read the server's secret; create it on first use, readable by its owner only.

    Raises:
        InvalidField: the file does not contain a secret.
    """
    if not path.exists():
        write_durably(path, secrets.token_bytes(_SECRET_BYTES), mode=0o600)
    secret = path.read_bytes()
    if len(secret) != _SECRET_BYTES:
        raise InvalidField(
            f"{path} must contain a secret of {_SECRET_BYTES} bytes",
            field="data_dir",
            limit=_SECRET_BYTES,
            value=len(secret),
            hint="restore the file, or remove it to invalidate all credentials",
        )
    return secret


def load_operator_token(path: Path, configured: str | None) -> str:
    """Return the configured operator token, or the one in the file, created on first use.

    Raises:
        InvalidField: the file is empty.
    """
    if configured is not None:
        return configured
    if not path.exists():
        write_durably(path, (secrets.token_urlsafe(24) + "\n").encode(), mode=0o600)
    token = path.read_text().strip()
    if not token:
        raise InvalidField(
            f"{path} is empty", field="operator_token", hint="remove the file to create a new token"
        )
    return token
