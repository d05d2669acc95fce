"""The limit of any round trip here: the same bytes through two bare sockets on loopback."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

from sfprompt_bench.engine.processes import serve_tasks

_HOST = "127.0.0.1"


def listen(nbytes: int) -> dict[str, Any]:
    """Send back whatever comes, ``nbytes`` at a time, to one client after the other."""
    listener = socket.create_server((_HOST, 0))
    threading.Thread(target=_answer_all, args=(listener, nbytes), daemon=True).start()
    return {"port": listener.getsockname()[1]}


def spent() -> dict[str, Any]:
    """CPU seconds of this process so far."""
    return {"cpu_s": time.process_time()}


def turn(port: int, nbytes: int, times: int) -> dict[str, Any]:
    """Seconds of each round trip of ``nbytes`` there and back."""
    data, answer = bytes(nbytes), memoryview(bytearray(nbytes))
    seconds = []
    with socket.create_connection((_HOST, port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        cpu = time.process_time()
        for _ in range(times):
            began = time.perf_counter()
            connection.sendall(data)
            _fill(connection, answer)
            seconds.append(time.perf_counter() - began)
        cpu = time.process_time() - cpu
    return {"seconds": seconds, "cpu_s": cpu}


def _answer_all(listener: socket.socket, nbytes: int) -> None:
    buffer = memoryview(bytearray(nbytes))
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while _fill(connection, buffer):
                connection.sendall(buffer)


def _fill(connection: socket.socket, buffer: memoryview) -> bool:
    filled = 0
    while filled < buffer.nbytes:
        count = connection.recv_into(buffer[filled:])
        if count == 0:
            return False
        filled += count
    return True


if __name__ == "__main__":
    serve_tasks({"listen": listen, "spent": spent})
