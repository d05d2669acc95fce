"""An unknown field is answered with the one that was meant."""

from __future__ import annotations

from typing import Any

import pytest

from protocol.errors import InvalidField
from protocol.messages import parse_message
from protocol.settings import RunSettings


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"federation": {"ronds": 3}}, "federation.rounds"),
        ({"rounds": 3}, "federation.rounds"),
        ({"model": {"backbon": "x"}}, "model.backbone"),
        ({"method": {"spit_epochs": 1}}, "method.split_epochs"),
        ({"method": {"name": "fedpft", "widht": 1}}, "method.width"),
        ({"Seed": 1}, "seed"),
    ],
)
def test_the_nearest_field_of_a_run_is_named(given: dict[str, Any], meant: str) -> None:
    with pytest.raises(InvalidField, match="there is no field") as caught:
        parse_message(RunSettings, given)
    assert caught.value.hint == f"did you mean {meant}?"


def test_a_field_like_no_other_has_no_nearest() -> None:
    with pytest.raises(InvalidField) as caught:
        parse_message(RunSettings, {"colour": "red"})
    assert (caught.value.field, caught.value.hint) == ("colour", None)


def test_a_class_name_given_twice_is_refused() -> None:
    names = {"class_names": ["caf\u00e9", "cafe\u0301", "bus"], "model": {"num_classes": 3}}
    with pytest.raises(InvalidField, match="class_names has a name twice: caf\u00e9"):
        parse_message(RunSettings, names)
