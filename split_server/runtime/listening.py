"""Check the server's address before anything is loaded: a late error follows "ready"."""

from __future__ import annotations

import errno
import socket

from protocol.errors import InvalidField


def check_address(host: str, port: int) -> None:
    """Check that this process can listen on an address.

    Raises:
        InvalidField: another program listens there, or the address is not this machine's.
    """
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = places[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        raise _refusal(host, port, error) from error


def _refusal(host: str, port: int, error: OSError) -> InvalidField:
    if error.errno == errno.EADDRINUSE:
        return InvalidField(
            "another program listens on this port",
            field="port",
            value=port,
            hint="stop that program, or choose another --port",
        )
    if error.errno == errno.EACCES:
        return InvalidField(
            "this user may not listen on this port",
            field="port",
            limit="1024 or above",
            value=port,
        )
    return InvalidField(
        f"the server cannot listen on this address ({error.strerror or error})",
        field="host",
        value=host,
        hint="0.0.0.0 listens on all interfaces",
    )
