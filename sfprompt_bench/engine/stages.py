"""CPU time of single stages of a round trip: encode, decode, read, finite check."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from protocol.frames import decode_frame, encode_frame, join_frame
from protocol.limits import DEFAULT_LIMITS
from split_server.http.body import read_body
from split_server.payloads.tensors import is_finite
from split_server.runtime.process import keep_large_buffers

_CHUNK_BYTES = 256 * 1024  # maximum of one read of the server's event loop

_BODY_TIMEOUT_S = 60.0

_META = {"step": "0" * 32, "round": 1}


def time_client_stages(shape: list[int], times: int) -> dict[str, Any]:
    """Time the client's stages for [B, T, D] in float32: median CPU milliseconds a MB."""
    tensors = _tensors(shape)
    data = join_frame(encode_frame("forward", _META, tensors))
    return _ms_per_mb(
        {
            "client encode": lambda: encode_frame("forward", _META, tensors),
            "client decode": lambda: decode_frame(data).tensor("smashed").to(torch.float32),
        },
        len(data),
        times,
    )


def time_server_stages(shape: list[int], times: int) -> dict[str, Any]:
    """Time the server's stages, with the server's allocator, as `time_client_stages` does."""
    keep_large_buffers()
    tensors = _tensors(shape)
    tensor, _ = tensors["smashed"]
    data = join_frame(encode_frame("forward", _META, tensors))
    with asyncio.Runner() as loop:
        return _ms_per_mb(
            {
                "server read": lambda: loop.run(_read(data)),
                "server decode": lambda: decode_frame(data).tensor("smashed"),
                "server finite check": lambda: is_finite(tensor),
                "server encode": lambda: encode_frame("features", _META, tensors),
            },
            len(data),
            times,
        )


def _tensors(shape: list[int]) -> dict[str, tuple[Tensor, str]]:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return {"smashed": (tensor, "float32")}


def _ms_per_mb(stages: dict[str, Callable[[], object]], nbytes: int, times: int) -> dict[str, Any]:
    megabytes = nbytes / 1e6
    return {"ms_per_mb": {name: _median_ms(run, times) / megabytes for name, run in stages.items()}}


async def _read(data: bytearray) -> None:  # a result would be formatted by the runner
    """Read a body as the server does, from chunks that are in memory."""
    view, position = memoryview(data), 0

    async def receive() -> dict[str, Any]:
        nonlocal position
        chunk = bytes(view[position : position + _CHUNK_BYTES])  # uvicorn passes bytes on
        position += len(chunk)
        return {"type": "http.request", "body": chunk, "more_body": position < len(data)}

    scope = {"headers": [(b"content-length", str(len(data)).encode())]}
    await read_body(scope, receive, DEFAULT_LIMITS.max_frame_bytes, _BODY_TIMEOUT_S)


def _median_ms(stage: Callable[[], object], times: int) -> float:
    stage()  # warms up
    seconds = []
    for _ in range(times):
        began = time.process_time()
        stage()
        seconds.append(time.process_time() - began)
    return 1e3 * statistics.median(seconds)
