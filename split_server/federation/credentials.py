"""Identify the sender of a request by its credential, never by the content of the request."""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import Forbidden, InvalidField
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

    @property
    def is_open(self) -> bool:
        """Whether everybody may join: the server has no join token."""
        return self._join is None

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


def require_participant(identity: Identity) -> ParticipantIdentity:
    """Return the sender's identity if it is a participant.

    Raises:
        Forbidden: it is not, although the table of rights let the request pass.
    """
    if not isinstance(identity, ParticipantIdentity):
        raise Forbidden("this request requires a participant's credential, not another one")
    return identity


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
