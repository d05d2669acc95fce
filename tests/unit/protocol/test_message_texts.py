"""Texts of messages are Unicode."""

from __future__ import annotations

import json

import pytest

from protocol.errors import InvalidField
from protocol.messages import Event, JoinRequest, RoundView, parse_message
from protocol.settings import RunSettings

HALF = json.loads('"\\ud800"')  # half of a surrogate pair, as JSON spells it


@pytest.mark.parametrize(
    ("message", "raw"),
    [
        (Event, {"seq": 1, "at": 0, "kind": "k", "data": {"a": [HALF]}}),
        (Event, {"seq": 1, "at": 0, "kind": "k", "data": {HALF: 1}}),
        (
            RoundView,
            {"round": 1, "attempt": 0, "status": "closed", "opened_at": 0, "sampled": [HALF]},
        ),
        (JoinRequest, {"name": HALF, "train_samples": 1, "test_samples": 1, "num_classes": 2}),
        (RunSettings, {"name": "x" + HALF}),
    ],
)
def test_half_of_a_surrogate_pair_is_refused(message: type, raw: dict[str, object]) -> None:
    """It has no UTF-8: the message could be neither stored, sent on nor printed."""
    with pytest.raises(InvalidField) as caught:
        parse_message(message, raw)
    json.dumps(caught.value.to_wire(), ensure_ascii=False).encode()


def test_a_whole_pair_is_a_letter() -> None:
    raw = json.loads('{"seq": 1, "at": 0, "kind": "\\ud83d\\ude00", "data": {"é": "\\u0000"}}')
    assert parse_message(Event, raw).kind == "\U0001f600"


def test_a_deeply_nested_message_is_no_failure() -> None:
    data: object = HALF
    for _ in range(5000):
        data = [data]
    with pytest.raises(InvalidField):
        parse_message(Event, {"seq": 1, "at": 0, "kind": "k", "data": {"a": data}})
