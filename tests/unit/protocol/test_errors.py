import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import protocol
from protocol import errors
from protocol.errors import (
    Busy,
    Conflict,
    Forbidden,
    InternalError,
    InvalidField,
    InvalidRequest,
    NotFound,
    SFPromptError,
    TooLarge,
    Unauthorized,
    error_from_wire,
)

EVERY = [
    getattr(errors, name) for name in errors.__all__ if isinstance(getattr(errors, name), type)
]

EVERY = [kind for kind in EVERY if issubclass(kind, SFPromptError)]

SPEC = Path(protocol.__file__).with_name("SPEC.md").read_text(encoding="utf-8")

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)

FIELDS = ("code", "message", "field", "limit", "value", "hint", "retry_after_s")


def through_json(error):
    return json.loads(json.dumps(error.to_wire(), allow_nan=False).encode())


@pytest.mark.parametrize("kind", EVERY)
def test_every_error_survives_a_round_trip(kind):
    sent = kind("no", field="a.b", limit=[1, "x"], value=2.5, hint="do that", retry_after_s=0.25)
    restored = error_from_wire(through_json(sent), kind.status)
    assert type(restored) is kind
    assert vars(restored) == vars(sent)
    bare = error_from_wire(through_json(kind("no")), kind.status)
    assert vars(bare) == vars(kind("no"))


def test_codes_are_unique_and_every_class_is_exported():
    assert len({kind.code for kind in EVERY}) == len(EVERY)
    defined = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type)
        and issubclass(kind, SFPromptError)
        and kind.__module__ == errors.__name__
    }
    assert defined == {kind.__name__ for kind in EVERY}


def test_the_docstring_shows_the_class_tree():
    drawn = re.findall(r"^([│├└─ ]*)([A-Z]\w+) {2,}\S", errors.__doc__, re.MULTILINE)
    path: list[str] = []
    parents = {}
    for lead, name in drawn:
        depth = len(lead) // 4
        path[depth:] = [name]
        parents[name] = path[depth - 1] if depth else "Exception"
    assert parents == {kind.__name__: kind.__base__.__name__ for kind in EVERY}


@pytest.mark.parametrize("kind", EVERY)
def test_the_specification_lists_code_and_status(kind):
    status = kind.status or "\u2013"
    assert f"| `{kind.code}` | {status} |" in SPEC


def test_an_error_is_one_line_with_all_fields():
    error = TooLarge("too large", field="frame", limit=5, value=9, hint="send less")
    assert str(error) == "too large; field: frame; allowed: 5; found: 9; send less"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (2**64, "a number of 65 bits"),
        (2**64 - 1, 2**64 - 1),
        ("\ud800", "?"),
        ("x" * 10_000, "x" * 500),
        ([math.inf, 1], ["inf", 1]),
        (list(range(1000)), list(range(64))),
        (True, True),
    ],
)
def test_an_error_is_valid_bounded_json(value, shown):
    assert through_json(InvalidField("no", value=value))["error"]["value"] == shown


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidRequest),
        (401, Unauthorized),
        (403, Forbidden),
        (404, NotFound),
        (408, Busy),
        (409, Conflict),
        (413, TooLarge),
        (418, InvalidRequest),
        (429, Busy),
        (500, InternalError),
        (502, Busy),
        (503, Busy),
        (504, Busy),
    ],
)
@pytest.mark.parametrize("body", [None, "<html>", [], {}, {"error": "x"}, {"error": {"code": "?"}}])
def test_a_foreign_body_becomes_the_error_for_its_status(status, kind, body):
    assert type(error_from_wire(body, status)) is kind


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (1, 1.0),
        (0, 0.0),
        (True, None),
        (-1, None),
        (math.nan, None),
        ("5", None),
        ([], None),
        (math.inf, 86_400.0),
        (10**400, 86_400.0),
        (None, None),
    ],
)
def test_retry_after_is_a_bounded_number(sent, read):
    wire = {"error": {"code": "busy", "message": "later", "retry_after_s": sent}}
    assert error_from_wire(wire, 503).retry_after_s == read


@given(JSON | st.fixed_dictionaries({"error": st.dictionaries(st.sampled_from(FIELDS), JSON)}))
def test_any_body_becomes_an_error(body):
    error = error_from_wire(body, 500)
    assert isinstance(error, SFPromptError)
    assert str(error)
    json.dumps(error.to_wire(), allow_nan=False).encode()
