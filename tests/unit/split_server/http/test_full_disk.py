"""A full disk is said as such, whichever library meets it."""

from __future__ import annotations

import errno

import pytest
from safetensors import SafetensorError

from protocol.errors import Busy, InternalError
from split_server.http.errors import unexpected


def wrapped() -> Exception:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("the file could not be written") from error
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
        wrapped(),
    ],
)
def test_a_full_disk_is_told_with_a_time_to_come_again(error: Exception) -> None:
    refusal = unexpected(error)
    assert isinstance(refusal, Busy)
    assert "disk is full" in str(refusal)
    assert refusal.retry_after_s


def test_another_failure_is_not_a_full_disk() -> None:
    assert type(unexpected(RuntimeError("x"))) is InternalError
    assert type(unexpected(OSError(errno.EIO, "I/O error"))) is InternalError
