"""TLS with certificates that a client trusts instead of the public certificate authorities."""

from __future__ import annotations

import ssl
from pathlib import Path

from protocol.errors import InvalidField

__all__ = ["create_ssl_context"]


def create_ssl_context(ca_file: Path) -> ssl.SSLContext:
    """Create a TLS context that trusts the certificates of a PEM file, and no others.

    Raises:
        InvalidField: the file does not exist or contains no certificate.
    """
    try:
        context = ssl.create_default_context(cafile=str(ca_file))
    except OSError as error:  # includes ssl.SSLError
        raise InvalidField(
            f"ca_file is not a readable PEM file of certificates ({error})",
            field="ca_file",
            value=str(ca_file),
        ) from error
    # A server's own certificate may be trusted in place of its authority's.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context
