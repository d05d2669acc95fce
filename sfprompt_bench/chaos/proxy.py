"""A TCP proxy between devices and server that injects the network's faults."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Protocol

from sfprompt_bench.chaos.faults import NETWORK, Fault, Kind
from sfprompt_bench.chaos.messages import HTTPMessage, damaged, read_message

_LIMIT = 64 * 1024 * 1024  # of a message in memory

_FRAGMENTS = 12

_FRAGMENT_PAUSE_S = 0.01

_AFTER_DAMAGE_S = 1.0  # a damaged length leaves both ends waiting; then the connection ends

_REORDER_REQUESTS = 3

_FIRST_ERROR = 400

_RETRIED = (400, 500, 503)  # errors after which a device repeats its request

_CLOSES = b"connection: close"

_NO_LINGER = struct.pack("ii", 1, 0)  # close with a reset


class Observer(Protocol):
    """Injects the faults of a run, and learns what follows; called in the proxy's loop."""

    def inject(self, fault: Fault, device: str) -> None:
        """The request of a fault has arrived from a device."""

    def retried(self, fault: Fault | None, device: str) -> None:
        """A device repeats a request that this network fault broke; None: there was no fault."""

    def refused(self, fault: Fault | None, device: str, status: int) -> None:
        """The server answers a request, which a fault may have changed, with an error."""


@dataclass(eq=False)
class _Ends:
    """A device's connection, and the proxy's connection to the server."""

    device: str
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    @property
    def server_writer(self) -> asyncio.StreamWriter:
        """The writer to the server.

        Raises:
            _Broken: there is none.
        """
        if self.upstream is None:
            raise _Broken
        return self.upstream[1]

    def close(self, *, reset: bool = False) -> None:
        writers = [self.writer, *([self.upstream[1]] if self.upstream else [])]
        for writer in writers:
            _close(writer, reset=reset)


class _Broken(Exception):
    """The exchange ends here; both connections are to be closed."""

    def __init__(self, *, reset: bool = False) -> None:
        self.reset = reset


class Proxy:
    """Forwards the requests of each device, counts them by route, and injects faults.

    Messages are forwarded whole, so that a fault hits a chosen request. Runs in a thread of its
    own; the functions that it calls run there, too.

    Args:
        server_port: on loopback.
        faults: of the run.
        observer: also injects the faults outside the network.
    """

    def __init__(self, server_port: int, faults: Sequence[Fault], observer: Observer) -> None:
        self.counts: Counter[str] = Counter()  # requests by route
        self._server_port = server_port
        self._pending: dict[tuple[str, int], list[Fault]] = {}  # by route and number
        for fault in faults:
            self._pending.setdefault((fault.route, fault.number), []).append(fault)
        self._observer = observer
        self._unanswered: dict[tuple[str, str], Fault | None] = {}  # by device and request
        self._servers: list[asyncio.Server] = []
        self._open: set[_Ends] = set()
        self._out_of_reach: set[str] = set()
        self._forwarded = asyncio.Condition()
        self._total = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def listen(self, device: str) -> int:
        """Open a port for one device, and return it."""
        future = asyncio.run_coroutine_threadsafe(self._listen(device), self.loop)
        return future.result(10)

    def close(self) -> None:
        """End all connections and the thread."""
        asyncio.run_coroutine_threadsafe(self._close(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()

    def outage(self, device: str, seconds: float) -> None:
        """Break a device's connections, and refuse new ones for some seconds."""
        self._out_of_reach.add(device)
        for ends in [each for each in self._open if each.device == device]:
            ends.close(reset=True)
        self.loop.call_later(seconds, self._out_of_reach.discard, device)

    async def _listen(self, device: str) -> int:
        def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            # Known before its task begins: a task cancelled at once would not close it.
            ends = _Ends(device, reader, writer)
            self._open.add(ends)
            self._start(self._serve(ends))

        server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=_LIMIT)
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for ends in list(self._open):
            ends.close(reset=True)

    async def _serve(self, ends: _Ends) -> None:
        reset = False
        try:
            while ends.device not in self._out_of_reach:
                request = await read_message(ends.reader)
                if request is None:
                    return
                await self._exchange(ends, request)
        except _Broken as broken:
            reset = broken.reset
        except (ConnectionError, OSError):
            reset = True
        finally:
            self._open.discard(ends)
            ends.close(reset=reset)

    async def _exchange(self, ends: _Ends, request: HTTPMessage) -> None:
        key = (ends.device, request.target)
        if key in self._unanswered:
            self._observer.retried(self._unanswered.pop(key), ends.device)
        fault = self._next_fault(ends.device, request.route)
        self._unanswered[key] = fault
        if fault is None:
            await self._send(ends, request.data)
            response = await self._response(ends)
            await self._respond(ends, response)
        else:
            response = await self._exchange_with(ends, request, fault)
        if response.status >= _FIRST_ERROR:
            self._observer.refused(fault, ends.device, response.status)
        if response.status not in _RETRIED:
            self._unanswered.pop(key, None)
        if _CLOSES in response.head.lower():
            raise _Broken

    def _next_fault(self, device: str, route: str) -> Fault | None:
        """Count a request, inject the faults that are due, and return that of the network."""
        self.counts[route] += 1
        chosen: Fault | None = None
        for fault in self._pending.pop((route, self.counts[route]), []):
            if fault.kind in NETWORK and chosen is not None:
                continue  # one at a time
            self._observer.inject(fault, device)
            if fault.kind in NETWORK:
                chosen = fault
        return chosen

    async def _exchange_with(self, ends: _Ends, request: HTTPMessage, fault: Fault) -> HTTPMessage:
        data, kind = request.data, fault.kind
        if kind is Kind.DROP_REQUEST:
            raise _Broken
        if kind in (Kind.DELAY_REQUEST, Kind.REORDER):
            await self._hold(fault)
        elif kind is Kind.DUPLICATE:
            self._start(self._send_copy(data, 0.0))
        elif kind is Kind.REPLAY:
            self._start(self._send_copy(data, fault.seconds))
        elif kind is Kind.CORRUPT_REQUEST:
            data = damaged(data, fault.share, fault.draw)
        elif kind in (Kind.TRUNCATE_REQUEST, Kind.RESET_REQUEST):
            await self._send(ends, data[: int(fault.share * len(data))])
            raise _Broken(reset=kind is Kind.RESET_REQUEST)
        await self._send(ends, data, in_fragments=kind is Kind.FRAGMENT)
        limit = _AFTER_DAMAGE_S if kind is Kind.CORRUPT_REQUEST else None
        response = await self._response(ends, limit)
        data = response.data
        if kind is Kind.DROP_RESPONSE:
            raise _Broken
        if kind is Kind.DELAY_RESPONSE:
            await asyncio.sleep(fault.seconds)
        elif kind is Kind.CORRUPT_RESPONSE:
            data = damaged(data, fault.share, fault.draw)
        elif kind in (Kind.TRUNCATE_RESPONSE, Kind.RESET_RESPONSE):
            await _write(ends.writer, data[: int(fault.share * len(data))])
            raise _Broken(reset=kind is Kind.RESET_RESPONSE)
        await self._respond(ends, response, data, in_fragments=kind is Kind.FRAGMENT)
        if kind in (Kind.CORRUPT_REQUEST, Kind.CORRUPT_RESPONSE):
            await asyncio.sleep(_AFTER_DAMAGE_S / 4)  # a damaged length leaves the device waiting
            raise _Broken
        return response

    async def _hold(self, fault: Fault) -> None:
        """Hold a request for a time, or until others have overtaken it."""
        if fault.kind is Kind.DELAY_REQUEST:
            await asyncio.sleep(fault.seconds)
            return
        until = self._total + _REORDER_REQUESTS
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(fault.seconds), self._forwarded:
                await self._forwarded.wait_for(lambda: self._total >= until)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send_copy(self, data: bytes, delay_s: float) -> None:
        """Send a request a second time over a connection of its own, and drop its response."""
        await asyncio.sleep(delay_s)
        with contextlib.suppress(OSError):
            reader, writer = await self._connect()
            try:
                await _write(writer, data)
                await read_message(reader)
            finally:
                _close(writer)

    async def _send(self, ends: _Ends, data: bytes, *, in_fragments: bool = False) -> None:
        if ends.upstream is None or ends.upstream[0].at_eof():
            await self._connect_upstream(ends)
        try:
            await _write(ends.server_writer, data, in_fragments=in_fragments)
        except ConnectionError:
            await self._connect_upstream(ends)  # the server had closed an idle connection
            await _write(ends.server_writer, data, in_fragments=in_fragments)
        self._total += 1
        async with self._forwarded:
            self._forwarded.notify_all()

    async def _response(self, ends: _Ends, limit_s: float | None = None) -> HTTPMessage:
        """Read the server's response, unless the device gives up before."""
        if ends.upstream is None:
            raise _Broken
        response = asyncio.ensure_future(read_message(ends.upstream[0]))
        gone = asyncio.ensure_future(ends.reader.read(1))
        await asyncio.wait({response, gone}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        message = response.result() if response.done() else None
        for task in (response, gone):
            task.cancel()
        await asyncio.gather(response, gone, return_exceptions=True)
        if message is None:
            raise _Broken(reset=True)
        return message

    async def _respond(
        self,
        ends: _Ends,
        response: HTTPMessage,
        data: bytes | None = None,
        *,
        in_fragments: bool = False,
    ) -> None:
        await _write(ends.writer, data or response.data, in_fragments=in_fragments)

    async def _connect_upstream(self, ends: _Ends) -> None:
        """Connect an exchange to the server, and close its previous connection."""
        if ends.upstream is not None:
            _close(ends.upstream[1])
        ends.upstream = await self._connect()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self._server_port, limit=_LIMIT)


async def _write(writer: asyncio.StreamWriter, data: bytes, *, in_fragments: bool = False) -> None:
    if not in_fragments:
        writer.write(data)
        await writer.drain()
        return
    size = -(-len(data) // _FRAGMENTS)
    for start in range(0, len(data), size):
        writer.write(data[start : start + size])
        await writer.drain()
        await asyncio.sleep(_FRAGMENT_PAUSE_S)


def _close(writer: asyncio.StreamWriter, *, reset: bool = False) -> None:
    if reset:
        with contextlib.suppress(OSError):
            plain = writer.get_extra_info("socket")
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        writer.transport.abort()
    else:
        writer.close()
