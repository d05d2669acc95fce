"""An address that the server cannot listen on is refused before anything is loaded."""

from __future__ import annotations

import socket

import pytest

from protocol.errors import InvalidField
from split_server.runtime.listening import check_address


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InvalidField, match="another program listens") as caught:
            check_address("127.0.0.1", port)
    assert (caught.value.field, caught.value.value) == ("port", port)
    check_address("127.0.0.1", port)
    check_address("localhost", 0)


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_of_another_machine_is_named(host: str) -> None:
    with pytest.raises(InvalidField, match="cannot listen on this address") as caught:
        check_address(host, 0)
    assert (caught.value.field, caught.value.value) == ("host", host)
