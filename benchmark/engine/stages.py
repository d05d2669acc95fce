"""What each stage of a request costs on its own: the functions that it goes through, timed."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from xxhash import xxh3_64_intdigest

from protocol.frames import decode_frame, encode_frame, join_frame
from protocol.limits import DEFAULT_LIMITS
from split_server.allocator import keep_large_buffers
from split_server.intake import is_finite
from split_server.routes.bodies import read_body

_CHUNK_BYTES = 256 * 1024  # what one read of the server's event loop brings, at most
_BODY_TIMEOUT_S = 60.0
_META = {"step": "0" * 32, "round": 1}


def client_stages(shape: list[int], times: int) -> dict[str, Any]:
    """Median milliseconds of CPU a MB of the client's stages, for [B, T, D] in float32."""
    tensors = _tensors(shape)
    data = join_frame(encode_frame("forward", _META, tensors))
    return _measured(
        {
            "client encode": lambda: encode_frame("forward", _META, tensors),
            "client decode": lambda: decode_frame(data).tensor("smashed").to(torch.float32),
        },
        len(data),
        times,
    )


def server_stages(shape: list[int], times: int) -> dict[str, Any]:
    """The same of the server's, with the server's allocator."""
    keep_large_buffers()
    tensors = _tensors(shape)
    tensor, _ = tensors["smashed"]
    data = join_frame(encode_frame("forward", _META, tensors))
    with asyncio.Runner() as loop:
        return _measured(
            {
                "server read": lambda: loop.run(_read(data)),
                "server decode": lambda: decode_frame(data).tensor("smashed"),
                "server fingerprint": lambda: xxh3_64_intdigest(data),
                "server finite check": lambda: is_finite(tensor),
                "server encode": lambda: encode_frame("features", _META, tensors),
            },
            len(data),
            times,
        )


def _tensors(shape: list[int]) -> dict[str, tuple[torch.Tensor, str]]:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return {"smashed": (tensor, "float32")}


def _measured(stages: dict[str, Callable[[], object]], nbytes: int, times: int) -> dict[str, Any]:
    found = {name: _milliseconds(stage, times) for name, stage in stages.items()}
    return {"ms_per_mb": {name: ms / (nbytes / 1e6) for name, ms in found.items()}}


async def _read(data: bytearray) -> None:  # a result would be spelt out by the runner
    """The server's reading of a body, fed with chunks that lie in memory already."""
    view, at = memoryview(data), 0

    async def receive() -> dict[str, Any]:
        nonlocal at
        chunk = bytes(view[at : at + _CHUNK_BYTES])  # as uvicorn hands it on
        at += len(chunk)
        return {"type": "http.request", "body": chunk, "more_body": at < len(data)}

    scope = {"headers": [(b"content-length", str(len(data)).encode())]}
    await read_body(scope, receive, DEFAULT_LIMITS.max_frame_bytes, _BODY_TIMEOUT_S)


def _milliseconds(stage: Callable[[], object], times: int) -> float:
    stage()
    found = []
    for _ in range(times):
        began = time.process_time()
        stage()
        found.append(time.process_time() - began)
    return 1e3 * statistics.median(found)
