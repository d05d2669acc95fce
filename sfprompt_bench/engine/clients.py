"""A device that does no model work: random tensors through the split plane, as cheaply as can be.

It speaks the protocol with the project's own frames over a bare socket, and reads its answers into
one buffer that it keeps. What it costs is reported beside every figure that it takes part in.
"""

from __future__ import annotations

import json
import random
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from edge_client.transport import RetryPolicy, Server, SplitPlane
from protocol.errors import MalformedFrame, SFPromptError, StepLost, Unreachable, error_from_wire
from protocol.frames import decode_frame, encode_frame, frame_length, require_kind
from protocol.messages import parse_message
from protocol.plan import RunPlan
from protocol.wire import (
    BACKWARD_PATH,
    FORWARD_PATH,
    FRAME_MEDIA_TYPE,
    PROTOCOL_VERSION,
    VERSION_HEADER,
)
from sfprompt_bench.engine import baselines, echo
from sfprompt_bench.engine.processes import serve_tasks

_ROOM_BYTES: Final = 64 * 1024  # of an answer, for all that is no tensor

_END: Final = b"\r\n\r\n"

_TIMEOUT_S: Final = 300.0


class SyntheticDevice:
    """One participant with a smashed batch and a gradient that are always the same.

    Args:
        host, port: of the server.
        credential: of the participant.
        shape: [B, T, D] of both tensors.
        seed: of the tensors.
    """

    def __init__(
        self, host: str, port: int, credential: str, shape: tuple[int, int, int], seed: int
    ) -> None:
        self._host, self._port = host, port
        draw = torch.Generator().manual_seed(seed)
        self._smashed = torch.randn(shape, generator=draw)
        self._gradients = torch.randn(shape, generator=draw)
        self._buffer = bytearray(self._smashed.nbytes + _ROOM_BYTES)
        self._headers = (
            f"host: {host}:{port}\r\nauthorization: Bearer {credential}\r\n"
            f"{VERSION_HEADER}: {PROTOCOL_VERSION}\r\ncontent-type: {FRAME_MEDIA_TYPE}\r\n"
        )
        self._socket: socket.socket | None = None
        self._retry = RetryPolicy(jitter=random.Random(seed), on_wait=self._count_wait)  # noqa: S311
        self.waits = 0  # answers "busy"
        self.lost = 0  # steps whose forward had to be sent again

    def open(self) -> None:
        """Connect; what is kept open is what a device keeps open."""
        self._socket = socket.create_connection((self._host, self._port), timeout=_TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def step(self, round_: int) -> float:
        """One batch, forward and backward; the seconds that it took, waits included."""
        began = time.perf_counter()
        name = uuid.uuid4().hex
        while True:
            meta = {"step": name, "round": round_}
            smashed = {"smashed": (self._smashed, "float32")}
            gradients = {"gradients": (self._gradients, "float32")}
            self._ask(FORWARD_PATH, "forward", "features", meta, smashed)
            try:
                self._ask(BACKWARD_PATH, "backward", "gradients", meta, gradients)
            except StepLost:
                self.lost += 1
                continue
            return time.perf_counter() - began

    def _ask(
        self,
        path: str,
        kind: str,
        wanted: str,
        meta: Mapping[str, object],
        tensors: Mapping[str, tuple[Tensor, str]],
    ) -> None:
        pieces = encode_frame(kind, meta, tensors)
        length = frame_length(pieces)
        head = f"POST {path} HTTP/1.1\r\n{self._headers}content-length: {length}\r\n\r\n"
        request = [memoryview(head.encode()), *pieces]

        def attempt() -> None:
            self._send(request)
            require_kind(decode_frame(self._receive()), wanted)

        self._retry.call(attempt)

    def _send(self, pieces: list[memoryview]) -> None:
        rest = pieces
        while rest:
            sent = self._open_socket().sendmsg(rest)
            while rest and sent >= rest[0].nbytes:
                sent -= rest[0].nbytes
                rest = rest[1:]
            if sent:
                rest = [rest[0].cast("B")[sent:], *rest[1:]]

    def _receive(self) -> memoryview:
        """The body of an answer. It lies in the device's buffer until the next one."""
        view, filled, start, total = memoryview(self._buffer), 0, 0, len(self._buffer)
        while not start or filled < total:
            count = self._open_socket().recv_into(view[filled:])
            if count == 0:
                raise Unreachable("the server has closed the connection", field="url")
            filled += count
            if not start and (end := self._buffer.find(_END, 0, filled)) >= 0:
                start = end + len(_END)
                status, length = _read_head(bytes(view[:end]))
                total = start + length
                if total > len(self._buffer):
                    raise MalformedFrame("an answer is larger than what was asked for")
        body = view[start:total]
        if status != 200:
            raise _refusal(bytes(body), status)
        return body

    def _open_socket(self) -> socket.socket:
        if self._socket is None:
            raise Unreachable("this device is not connected", field="url")
        return self._socket

    def _count_wait(self, _error: SFPromptError, _seconds: float) -> None:
        self.waits += 1


def _read_head(head: bytes) -> tuple[int, int]:
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(first.split(" ", 2)[1]), int(headers["content-length"])


def _refusal(body: bytes, status: int) -> SFPromptError:
    try:
        wire = json.loads(body)
    except ValueError:
        wire = None
    return error_from_wire(wire, status)


@dataclass
class Diary:
    """What one device did: its steps' ends (seconds from the start) and their lengths."""

    ends: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    waits: int = 0
    lost: int = 0


def work(
    host: str,
    port: int,
    credentials: list[str],
    shape: list[int],
    round_: int,
    steps: int | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Let one device for each credential do its steps, all at once.

    Args:
        host, port: of the server.
        credentials: of participants that train in the open round.
        shape: [B, T, D] of their tensors.
        round_: that is open.
        steps: of each device; None: as many as it can.
        seconds: after which no step is begun.
    """
    tokens, width = shape[1:]
    devices = [
        SyntheticDevice(host, port, credential, (shape[0], tokens, width), seed)
        for seed, credential in enumerate(credentials)
    ]
    for device in devices:
        device.open()
    gate = threading.Barrier(len(devices) + 1)
    try:
        with ThreadPoolExecutor(len(devices)) as threads:
            futures = [
                threads.submit(_days_work, one, gate, round_, steps, seconds) for one in devices
            ]
            cpu, clock = time.process_time(), time.perf_counter()
            gate.wait()
            diaries = [future.result() for future in futures]
            took, spent = time.perf_counter() - clock, time.process_time() - cpu
    finally:
        for device in devices:
            device.close()
    return {"seconds": took, "cpu_s": spent, "devices": [asdict(diary) for diary in diaries]}


def _days_work(
    device: SyntheticDevice,
    gate: threading.Barrier,
    round_: int,
    steps: int | None,
    seconds: float | None,
) -> Diary:
    diary = Diary()
    gate.wait()
    began = time.perf_counter()
    while steps is None or len(diary.ends) < steps:
        if seconds is not None and time.perf_counter() - began >= seconds:
            break
        diary.seconds.append(device.step(round_))
        diary.ends.append(time.perf_counter() - began)
    diary.waits, diary.lost = device.waits, device.lost
    return diary


class RealDevice:
    """A device's own transport, as `edge_client` uses it, without a model."""

    def __init__(self) -> None:
        self._plane: SplitPlane | None = None
        self._number = 0

    def connect(self, url: str, credential: str, settings: dict[str, Any]) -> dict[str, Any]:
        server = Server(url)
        server.authenticate(credential)
        self._plane = SplitPlane(server, parse_message(RunPlan, settings))
        return {}

    def turn(self, shape: list[int], round_: int, times: int) -> dict[str, Any]:
        """Seconds of each request: ``times`` forwards and backwards of [B, T, D]."""
        if self._plane is None:
            raise RuntimeError("this device is not connected")
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        found: dict[str, list[float]] = {"forward": [], "backward": []}
        spent = dict.fromkeys(found, 0.0)

        def timed(kind: str, began: float, cpu: float) -> None:
            found[kind].append(time.perf_counter() - began)
            spent[kind] += time.process_time() - cpu

        for _ in range(times):
            self._number += 1
            step = f"turn-{self._number}"
            began, cpu = time.perf_counter(), time.process_time()
            self._plane.forward(tensor, step=step, round_=round_)
            timed("forward", began, cpu)
            began, cpu = time.perf_counter(), time.process_time()
            size = tuple(shape)
            self._plane.backward(tensor, step=step, round_=round_, smashed=size)
            timed("backward", began, cpu)
        return {"seconds": found, "cpu_s": sum(spent.values())}


if __name__ == "__main__":
    torch.set_num_threads(1)
    real = RealDevice()
    serve_tasks(
        {
            "work": work,
            "connect": real.connect,
            "turn": real.turn,
            "echo": echo.turn,
            "stages": baselines.client_stages,
        }
    )
