"""A device without a model: random tensors through the split plane at minimal cost.

It sends the project's frames over a bare socket and reads responses into one buffer. The report
shows its processor time next to each figure that it affects.
"""

from __future__ import annotations

import json
import random
import socket
import time
import uuid
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from edge_client.transport.retry import RetryPolicy
from protocol.errors import MalformedFrame, SFPromptError, StepLost, Unreachable, error_from_wire
from protocol.frames import decode_frame, encode_frame, frame_length, require_kind
from protocol.wire import (
    BACKWARD_PATH,
    FORWARD_PATH,
    FRAME_MEDIA_TYPE,
    PROTOCOL_VERSION,
    VERSION_HEADER,
)

_OVERHEAD_BYTES: Final = 64 * 1024  # of a response, for everything that is no tensor

_HEAD_END: Final = b"\r\n\r\n"

_TIMEOUT_S: Final = 300.0


class SyntheticDevice:
    """A participant with the same smashed data and the same gradient in each step.

    Args:
        host, port: of the server.
        credential: of the participant.
        shape: [B, T, D] of both tensors.
        seed: of the tensors.

    Attributes:
        waits: ``busy`` responses so far.
        lost: steps so far whose forward had to be repeated.
    """

    def __init__(
        self, host: str, port: int, credential: str, shape: tuple[int, int, int], seed: int
    ) -> None:
        self._host, self._port = host, port
        generator = torch.Generator().manual_seed(seed)
        self._smashed = torch.randn(shape, generator=generator)
        self._gradients = torch.randn(shape, generator=generator)
        self._buffer = bytearray(self._smashed.nbytes + _OVERHEAD_BYTES)
        self._headers = (
            f"host: {host}:{port}\r\nauthorization: Bearer {credential}\r\n"
            f"{VERSION_HEADER}: {PROTOCOL_VERSION}\r\ncontent-type: {FRAME_MEDIA_TYPE}\r\n"
        )
        self._socket: socket.socket | None = None
        self._retry = RetryPolicy(jitter=random.Random(seed), on_wait=self._count_wait)  # noqa: S311
        self.waits = 0
        self.lost = 0

    def connect(self) -> None:
        """Open the connection that all steps use."""
        self._socket = socket.create_connection((self._host, self._port), timeout=_TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        """Close the connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def step(self, round_: int) -> float:
        """Send one batch forward and backward; return its seconds, waits included."""
        began = time.perf_counter()
        name = uuid.uuid4().hex
        while True:
            meta = {"step": name, "round": round_}
            smashed = {"smashed": (self._smashed, "float32")}
            gradients = {"gradients": (self._gradients, "float32")}
            self._request(FORWARD_PATH, "forward", "features", meta, smashed)
            try:
                self._request(BACKWARD_PATH, "backward", "gradients", meta, gradients)
            except StepLost:
                self.lost += 1
                continue
            return time.perf_counter() - began

    def _request(
        self,
        path: str,
        kind: str,
        response_kind: str,
        meta: Mapping[str, object],
        tensors: Mapping[str, tuple[Tensor, str]],
    ) -> None:
        frame = encode_frame(kind, meta, tensors)
        length = frame_length(frame)
        head = f"POST {path} HTTP/1.1\r\n{self._headers}content-length: {length}\r\n\r\n"
        request = [memoryview(head.encode()), *frame]

        def attempt() -> None:
            self._send(request)
            require_kind(decode_frame(self._receive()), response_kind)

        self._retry.call(attempt)

    def _send(self, buffers: list[memoryview]) -> None:
        rest = buffers
        while rest:
            sent = self._open_socket().sendmsg(rest)
            while rest and sent >= rest[0].nbytes:
                sent -= rest[0].nbytes
                rest = rest[1:]
            if sent:
                rest = [rest[0].cast("B")[sent:], *rest[1:]]

    def _receive(self) -> memoryview:
        """Read a response's body into the device's buffer; valid until the next response."""
        view, filled, start, total = memoryview(self._buffer), 0, 0, len(self._buffer)
        while not start or filled < total:
            count = self._open_socket().recv_into(view[filled:])
            if count == 0:
                raise Unreachable("the server closed the connection", field="url")
            filled += count
            if not start and (end := self._buffer.find(_HEAD_END, 0, filled)) >= 0:
                start = end + len(_HEAD_END)
                status, length = read_head(bytes(view[:end]))
                total = start + length
                if total > len(self._buffer):
                    raise MalformedFrame(
                        "a response is larger than the request's tensor allows",
                        limit=len(self._buffer),
                        value=total,
                    )
        body = view[start:total]
        if status != 200:
            raise _response_error(bytes(body), status)
        return body

    def _open_socket(self) -> socket.socket:
        if self._socket is None:
            raise Unreachable("the device is not connected", field="url")
        return self._socket

    def _count_wait(self, _error: SFPromptError, _seconds: float) -> None:
        self.waits += 1


def read_head(head: bytes) -> tuple[int, int]:
    """Parse the status and content length of an HTTP response's head."""
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(first.split(" ", 2)[1]), int(headers["content-length"])


def _response_error(body: bytes, status: int) -> SFPromptError:
    try:
        wire = json.loads(body)
    except ValueError:
        wire = None
    return error_from_wire(wire, status)
