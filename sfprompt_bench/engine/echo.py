"""The lower bound of a round trip: the same bytes through two bare sockets on loopback."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

from sfprompt_bench.engine.worker import serve_tasks

_HOST = "127.0.0.1"


def listen(nbytes: int) -> dict[str, Any]:
    """Echo ``nbytes`` at a time to one client after the other, in a thread; return the port."""
    listener = socket.create_server((_HOST, 0))
    threading.Thread(target=_echo_all, args=(listener, nbytes), daemon=True).start()
    return {"port": listener.getsockname()[1]}


def cpu_seconds() -> dict[str, Any]:
    """Measure this process's CPU seconds so far."""
    return {"cpu_s": time.process_time()}


def time_echo(port: int, nbytes: int, times: int) -> dict[str, Any]:
    """Time ``times`` round trips of ``nbytes`` each way: seconds of each, CPU seconds of all."""
    data, buffer = bytes(nbytes), memoryview(bytearray(nbytes))
    seconds = []
    with socket.create_connection((_HOST, port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        cpu = time.process_time()
        for _ in range(times):
            began = time.perf_counter()
            connection.sendall(data)
            _receive(connection, buffer)
            seconds.append(time.perf_counter() - began)
        cpu = time.process_time() - cpu
    return {"seconds": seconds, "cpu_s": cpu}


def _echo_all(listener: socket.socket, nbytes: int) -> None:
    buffer = memoryview(bytearray(nbytes))
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while _receive(connection, buffer):
                connection.sendall(buffer)


def _receive(connection: socket.socket, buffer: memoryview) -> bool:
    """Fill the buffer; False if the connection closes before."""
    filled = 0
    while filled < buffer.nbytes:
        count = connection.recv_into(buffer[filled:])
        if count == 0:
            return False
        filled += count
    return True


if __name__ == "__main__":
    serve_tasks({"listen": listen, "cpu_seconds": cpu_seconds})
