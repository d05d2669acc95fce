"""Issued credentials identify their sender; every other one is anonymous."""

from __future__ import annotations

import hashlib
import hmac
import stat
from pathlib import Path

import pytest

from protocol.errors import Forbidden, InvalidField
from split_server.federation.credentials import (
    Anonymous,
    Credentials,
    Identity,
    JoinTokenHolder,
    Operator,
    ParticipantIdentity,
    load_operator_token,
    load_secret,
    require_participant,
)

SECRET = b"s" * 32

OPERATOR = "the-operator"


def credentials(join_token: str | None = None, secret: bytes = SECRET) -> Credentials:
    return Credentials(secret, OPERATOR, join_token)


def test_a_credential_is_an_hmac_over_run_and_participant() -> None:
    issued = credentials().issue("r1", "p1")
    mac = hmac.new(SECRET, b"sfp1.r1.p1", hashlib.sha256).hexdigest()
    assert issued == f"sfp1.r1.p1.{mac}"
    assert issued == credentials().issue("r1", "p1"), "a repeated join gets the same one"
    assert credentials().identify(f"Bearer {issued}") == ParticipantIdentity("r1", "p1")
    assert credentials().identify(f"bearer  {issued} ") == ParticipantIdentity("r1", "p1")


def test_a_credential_of_another_issuer_is_anonymous() -> None:
    issued = credentials().issue("r1", "p1")
    mac = issued.rsplit(".", 1)[1]
    for forged in (
        f"sfp1.r1.p2.{mac}",
        f"sfp1.r2.p1.{mac}",
        f"sfp1.r1.p1.{mac[:-1]}",
        f"sfp1.r1.p1.{mac[:-1]}{'0' if mac[-1] != '0' else '1'}",
        f"sfp1.r1.p1.{mac.upper()}",
        f"sfp2.r1.p1.{mac}",
        f"sfp1.r1.p1.x.{mac}",
        "sfp1.r1.p1.",
        "sfp1...",
        credentials(secret=b"t" * 32).issue("r1", "p1"),
        "é" * 100,
        "",
    ):
        assert isinstance(credentials().identify(f"Bearer {forged}"), Anonymous)
    assert isinstance(credentials().identify(f"Basic {issued}"), Anonymous)
    assert isinstance(credentials().identify(issued), Anonymous)
    assert credentials().identify(None) == Anonymous(sent_credential=False)


def test_tokens_are_recognised() -> None:
    both = credentials("the-join-token")
    assert both.identify(f"Bearer {OPERATOR}") == Operator()
    assert both.identify("Bearer the-join-token") == JoinTokenHolder()
    assert not both.is_open
    assert credentials().is_open


def test_only_a_participant_is_one() -> None:
    participant = ParticipantIdentity("r1", "p1")
    assert require_participant(participant) == participant
    others: list[Identity] = [Anonymous(), Anonymous(True), Operator(), JoinTokenHolder()]
    for identity in others:
        with pytest.raises(Forbidden):
            require_participant(identity)


def test_secrets_are_created_once_and_readable_by_their_owner_only(tmp_path: Path) -> None:
    secret, token = tmp_path / "secret", tmp_path / "operator.token"
    first = load_secret(secret), load_operator_token(token, None)
    assert first == (load_secret(secret), load_operator_token(token, None))
    assert len(first[0]) == 32
    assert len(first[1]) >= 32
    for path in (secret, token):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_operator_token(token, "given-token") == "given-token"


def test_a_damaged_secret_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"short")
    with pytest.raises(InvalidField):
        load_secret(tmp_path / "secret")
    (tmp_path / "operator.token").write_text("\n")
    with pytest.raises(InvalidField):
        load_operator_token(tmp_path / "operator.token", None)
