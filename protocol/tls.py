"""Whom an end of the line trusts, where certificates are not those of the public."""

from __future__ import annotations

import ssl
from pathlib import Path

from protocol.errors import InvalidField

__all__ = ["trusting"]


def trusting(ca_file: Path) -> ssl.SSLContext:
    """A context for https that trusts the certificates of a PEM file, and no others.

    Raises:
        InvalidField: there is no such file, or no certificate in it.
    """
    try:
        return ssl.create_default_context(cafile=str(ca_file))
    except OSError as error:  # ssl.SSLError too
        raise InvalidField(
            f"no readable PEM file of certificates ({error})", field="ca_file", value=str(ca_file)
        ) from error
