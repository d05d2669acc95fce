"""Send mutated and broken requests to a server; failures, hangs and growth are findings."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from protocol.wire import FRAME_MEDIA_TYPE
from sfprompt_bench.fuzz.broken import (
    SLOW_S,
    Misbehaved,
    broken_request,
    giant_head,
    slow_request,
)
from sfprompt_bench.fuzz.findings import Report, last_frames
from sfprompt_bench.fuzz.mutations import mutated_bytes, mutated_frame, mutated_tree
from sfprompt_bench.fuzz.openapi import BATCH, OpenApi
from sfprompt_bench.fuzz.target import Request, Target
from sfprompt_bench.fuzz.wire import Closed, RawConnection, Response

_MIB: Final = 1024 * 1024

_MEMORY_BYTES: Final = 96 * _MIB  # by which the server may grow: its settings allow 48 MiB of it

_DESCRIPTORS: Final = 64  # by which it may grow: files of samples and of new runs

_GIANT_BYTES: Final = 100 * _MIB  # of a URL or a header

_GIANT_MEMORY: Final = 16 * _MIB  # that it may cost

_REQUEST_S: Final = 5.0

_WARM_UP: Final = 0.05  # share of the requests before memory is measured

_THREADS, _SLOW_THREADS = 3, 24

_BROKEN, _SLOW, _OPENAPI = 0.12, 0.02, 0.06 / BATCH  # shares of the requests

_SETTLE_S: Final = 5.0  # for closed connections to be counted no more


def fuzz_requests(
    target: Target, count: int, seed: int, tick: Callable[[int], None], *, giants: bool = True
) -> Report:
    """Send requests to a server under test.

    Args:
        target: the server.
        count: of requests.
        seed: of the first request; each further request has the next number.
        tick: is called with the number of requests done.
        giants: also send a URL and a header of 100 MiB.
    """
    fuzzer = _Fuzzer(target, seed, count, tick)
    report = fuzzer.report
    began = time.perf_counter()
    warm = max(1, int(_WARM_UP * count))
    fuzzer.send(range(seed, seed + warm))
    memory, descriptors = target.resident_bytes(), target.descriptors()
    if giants:
        fuzzer.send_giants()
    fuzzer.send(range(seed + warm, seed + count))
    report.seconds = time.perf_counter() - began
    if not target.is_running():
        report.add(seed, "all requests", "the server has ended")
        return report
    deadline = time.monotonic() + _SETTLE_S
    while target.descriptors() > descriptors + _DESCRIPTORS and time.monotonic() < deadline:
        time.sleep(0.1)
    report.memory_bytes = target.resident_bytes() - memory
    report.descriptors = target.descriptors() - descriptors
    if report.memory_bytes > _MEMORY_BYTES:
        report.add(seed, "all requests", f"the server grew by {report.memory_bytes / _MIB:.0f} MiB")
    if report.descriptors > _DESCRIPTORS:
        report.add(seed, "all requests", f"the server has {report.descriptors} more descriptors")
    return report


class _Fuzzer:
    """Sends requests from some threads, each over a connection that it keeps."""

    def __init__(self, target: Target, seed: int, count: int, tick: Callable[[int], None]) -> None:
        self.report = Report("Requests", "requests", memory_limit=_MEMORY_BYTES)
        self._target, self._tick = target, tick
        self._end, self._done = seed + count, 0
        self._valid = target.valid_requests()
        self._openapi = OpenApi(target) if OpenApi.is_installed() else None
        if self._openapi is None:
            self.report.notes.append("schemathesis is not installed: no requests from OpenAPI")
        self._lock = threading.Lock()
        self._own = threading.local()
        self._kept: list[RawConnection] = []  # of all threads
        self._openapi_lock = threading.Lock()  # hypothesis runs one test at a time

    def send(self, seeds: Iterable[int]) -> None:
        """Send the request of each seed."""
        with (
            ThreadPoolExecutor(_THREADS) as threads,
            ThreadPoolExecutor(_SLOW_THREADS) as slow_threads,
        ):
            waiting = threading.Semaphore(4 * _SLOW_THREADS)
            for _ in threads.map(lambda one: self._dispatch(one, slow_threads, waiting), seeds):
                if self.report.is_full:
                    threads.shutdown(cancel_futures=True)
                    break
        for connection in self._kept:
            connection.close()
        self._kept.clear()

    def send_giants(self) -> None:
        """Send a URL and a header of 100 MiB."""
        for in_url in (True, False):
            before, name = self._target.resident_bytes(), "a URL" if in_url else "a header"
            name += f" of {_GIANT_BYTES // _MIB} MiB"
            try:
                taken = giant_head(self._target, _GIANT_BYTES, in_url=in_url)
            except Misbehaved as error:
                self.report.add(0, name, str(error))
                continue
            grown = self._target.resident_bytes() - before
            if grown > _GIANT_MEMORY:
                self.report.add(0, name, f"cost {grown / _MIB:.0f} MiB")
            self.report.outcomes["giant refused"] += 1
            self.report.notes.append(
                f"{name}: closed after {taken / _MIB:.1f} MiB, memory {grown / _MIB:+.1f} MiB"
            )

    def _dispatch(
        self, seed: int, slow_threads: ThreadPoolExecutor, waiting: threading.Semaphore
    ) -> None:
        draws = random.Random(seed)  # noqa: S311 - nothing secret
        kind = draws.random()
        if kind < _OPENAPI and self._openapi is not None:
            self._guard(seed, lambda: self._send_openapi(seed))
        elif kind < _SLOW:
            waiting.acquire()

            def send() -> None:
                try:
                    self._guard(seed, lambda: self._send_raw(seed, draws, slow_request))
                finally:
                    waiting.release()

            slow_threads.submit(send)
        elif kind < _SLOW + _BROKEN:
            self._guard(seed, lambda: self._send_raw(seed, draws, broken_request))
        else:
            self._guard(seed, lambda: self._send_mutated(seed, mutated_request(self._valid, draws)))
        with self._lock:
            self._done += 1
            if self._done % 50 == 0:
                self._tick(self._done)

    def _guard(self, seed: int, send: Callable[[], None]) -> None:
        """Turn an exception into a finding."""
        try:
            send()
        except Misbehaved as error:
            self._add(seed, "a broken request", str(error))
        except Exception as error:
            lives = "" if self._target.is_running() else "; the server has ended"
            self._add(seed, "a request", last_frames(error) + lives)

    def _add(self, seed: int, input_: str, outcome: str) -> None:
        with self._lock:
            self.report.outcomes["finding"] += 1
            self.report.add(seed, input_, outcome)

    def _send_raw(
        self,
        seed: int,
        draws: random.Random,
        send: Callable[[Target, list[Request], random.Random], tuple[str, list[Response]]],
    ) -> None:
        began = time.perf_counter()
        name, responses = send(self._target, self._valid, draws)
        took = time.perf_counter() - began
        if took > SLOW_S + _REQUEST_S:
            self._add(seed, name, f"took {took:.1f} s")
        if not responses:
            self._count("closed")
        for response in responses:
            self._judge(seed, name, response)

    def _send_openapi(self, seed: int) -> None:
        if self._openapi is not None:
            with self._openapi_lock:
                self._openapi.send(seed, lambda request: self._send_mutated(seed, request))

    def _send_mutated(self, seed: int, request: Request) -> None:
        """Send a request that is HTTP, and expect a response."""
        data, began = request.to_bytes(), time.perf_counter()
        name = f"{request.method} {request.path[:120]} {request.body[:80]!r}"
        try:
            response = self._exchange(data, to_head=request.method == "HEAD")
        except TimeoutError:
            self._add(seed, name, f"no response in {SLOW_S:g} s")
            self._forget()
            return
        if response is None:
            self._count("closed")
            return
        took = time.perf_counter() - began
        with self._lock:
            self.report.time(seed, took)
        if took > _REQUEST_S:
            self._add(seed, name, f"took {took:.1f} s")
        self._judge(seed, name, response)

    def _exchange(self, data: bytes, *, to_head: bool) -> Response | None:
        """Send a request; None: the server closed instead, twice."""
        for _ in range(2):
            connection: RawConnection | None = getattr(self._own, "connection", None)
            if connection is None:
                connection = self._own.connection = RawConnection(self._target.address, SLOW_S)
                self._kept.append(connection)
            try:
                connection.send(data)
                response = connection.response(to_head=to_head)
            except Closed:
                self._forget()
                continue
            if response.headers.get("connection") == "close" or to_head:
                self._forget()
            return response
        return None

    def _forget(self) -> None:
        connection, self._own.connection = self._own.connection, None
        connection.close()

    def _judge(self, seed: int, name: str, response: Response) -> None:
        """Count a response; a failure or an error without type is a finding."""
        code = response.code if response.status >= 400 else None
        self._count(f"{response.status} {code}" if code else str(response.status))
        if response.status >= 400 and code is None and response.body:
            self._add(
                seed, name, f"{response.status} without a typed error: {response.body[:80]!r}"
            )
        elif response.status >= 500 and code != "busy":
            self._add(seed, name, f"{response.status}: {response.body[:300]!r}")

    def _count(self, outcome: str) -> None:
        with self._lock:
            self.report.outcomes[outcome] += 1


def mutated_request(valid: list[Request], draws: random.Random) -> Request:
    """Change a valid request: its body, path, query, headers, credential or method."""
    request = draws.choice(valid)
    path, headers, body = request.path, dict(request.headers), request.body
    if body and draws.random() < 0.8:
        if headers.get("content-type") == FRAME_MEDIA_TYPE:
            body = bytes(mutated_frame(body, draws))
        elif draws.random() < 0.8:
            body = json.dumps(mutated_tree(json.loads(body), draws)).encode()
        else:
            body = bytes(mutated_bytes(body, draws))
    if draws.random() < (0.2 if body else 0.9):
        path = _mutated_path(path, draws)
    if draws.random() < 0.1:
        headers = _mutated_headers(headers, draws)
    method = draws.choice(_METHODS) if draws.random() < 0.05 else request.method
    if method == "DELETE" and path.endswith("/me"):
        path = path.replace("/me", "/you")  # participants stay
    return Request(method, path, headers, body)


_METHODS: Final = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS")

_PIECES: Final = (
    "",
    "x",
    "..",
    "%00",
    "%2e%2e%2f",
    "%0a%1b[2J",
    "calm-otter-2345",
    "0" * 64,
    "a" * 300,
    "null",
    "%F0%9F%98%80",
    "%ff",
)

_VALUES: Final = (
    "",
    "-1",
    "0",
    "1.5",
    "1e400",
    "nan",
    "inf",
    "99999999999999999999",
    "9007199254740992",
    "train",
    "stop",
    "%00",
    "0x10",
    "true",
)


def _mutated_path(path: str, draws: random.Random) -> str:
    path, _, query = path.partition("?")
    if query and draws.random() < 0.7:
        pairs = [pair.partition("=")[::2] for pair in query.split("&")]
        place = draws.randrange(len(pairs))
        pairs[place] = (pairs[place][0], draws.choice(_VALUES))
        if draws.random() < 0.2:
            pairs.append(draws.choice(pairs))
        return path + "?" + "&".join(f"{name}={value}" for name, value in pairs)
    parts = path.split("/")
    parts[draws.randrange(1, len(parts))] = draws.choice(_PIECES)
    return "/".join(parts) + (f"?{query}" if query else "")


def _mutated_headers(headers: dict[str, str], draws: random.Random) -> dict[str, str]:
    changed = dict(headers)
    name = draws.choice(
        (*changed, "range", "if-none-match", "sfprompt-version", "x-request-id", "content-type")
    )
    action = draws.randrange(3)
    if action == 0:
        changed.pop(name, None)
    elif action == 1:
        changed[name] = draws.choice((*_VALUES, "é", "a" * 5000, "bytes=5-1", "bytes=0-0,5-9", "*"))
    else:
        changed[name] = changed.get(name, "")[:-1]
    return changed
