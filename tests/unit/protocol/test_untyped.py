"""Responses without a typed error: what request, how large, who answered, and what to do."""

from __future__ import annotations

import pytest

from protocol.errors import Busy, InternalError, InvalidRequest, NotFound, SFPromptError, TooLarge
from protocol.untyped import describe_request, is_typed, untyped_error


def test_a_body_that_is_too_large_for_an_http_proxy_is_named_with_its_size() -> None:
    request = describe_request("PUT", "/v1/runs/r/update", 3_500_000)
    error = untyped_error(413, request, 3_500_000)
    assert isinstance(error, TooLarge)
    said = str(error)
    assert "PUT /v1/runs/r/update with 3.3 MiB" in said
    assert "status 413" in said
    assert "an HTTP proxy" in said
    assert "client_max_body_size" in said


@pytest.mark.parametrize(
    ("status", "kind", "hint"),
    [
        (502, Busy, "is the server running"),
        (504, Busy, "proxy_read_timeout"),
        (524, Busy, "proxy_read_timeout"),
        (408, Busy, "proxy_read_timeout"),
        (404, NotFound, "right port and path"),
        (418, InvalidRequest, "which program"),
        (501, InternalError, "which program"),
    ],
)
def test_each_status_has_its_kind_and_its_advice(
    status: int, kind: type[SFPromptError], hint: str
) -> None:
    error = untyped_error(status, describe_request("GET", "/v1/runs", 0), 0)
    assert type(error) is kind
    assert "GET /v1/runs was answered with status" in str(error)
    assert hint in str(error)


def test_only_errors_of_this_protocol_are_typed() -> None:
    assert is_typed({"error": {"code": "busy"}})
    assert not any(map(is_typed, ["<html>", None, {"error": "busy"}, {"detail": {}}, []]))
