"""A crowd of idle or slow connections from one address, as a process of its own.

It opens connections that send nothing, or a byte of a request each second, and opens each that the
server closes again some seconds later.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import Final

_REQUEST: Final = b"GET /v1/health HTTP/1.1\r\nhost: x\r\nx-slow: " + b"a" * 10_000

_BYTE_S: Final = 1.0  # between two bytes

_REOPEN_S: Final = 5.0

_BURST: Final = 100  # connections that are opened at the same time


async def hold(port: int, count: int, *, slow: bool, seconds: float) -> int:
    """Hold connections to a port of this machine; returns how often one was opened again."""
    again, gate = 0, asyncio.Semaphore(_BURST)

    async def client() -> None:
        nonlocal again
        while True:
            with contextlib.suppress(OSError):
                async with gate:
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                await _stay(reader, writer, slow=slow)
            again += 1
            await asyncio.sleep(_REOPEN_S)

    clients = [asyncio.create_task(client()) for _ in range(count)]
    await asyncio.sleep(seconds)
    for task in clients:
        task.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    return again


async def _stay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, slow: bool) -> None:
    """Stay connected until the server closes."""
    try:
        closed = asyncio.ensure_future(reader.read())
        if slow:
            for byte in _REQUEST:
                writer.write(bytes([byte]))
                done, _ = await asyncio.wait({closed}, timeout=_BYTE_S)
                if done:
                    return
        await closed
    finally:
        closed.cancel()
        writer.close()


def main() -> None:
    """``PORT COUNT idle|slow SECONDS``; writes how often a connection was opened again."""
    port, count, behaviour, seconds = sys.argv[1:]
    coroutine = hold(int(port), int(count), slow=behaviour == "slow", seconds=float(seconds))
    sys.stdout.write(f"{asyncio.run(coroutine)}\n")


if __name__ == "__main__":
    main()
