"""The plain loop that the server is measured against: the same body, no network, no queue."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

import split_model
from protocol.frames import decode_frame, encode_frame, join_frame
from protocol.limits import DEFAULT_LIMITS
from protocol.messages import parse_message
from protocol.plan import ModelPlan
from sfprompt_bench.cost.flops import body_step_flops
from sfprompt_bench.engine.processes import serve_tasks
from split_model import Body, SplitSettings
from split_server.http.body import read_body
from split_server.payloads.tensors import is_finite
from split_server.runtime.device import Placement, choose_placement
from split_server.runtime.process import keep_large_buffers

_SIDE = {"cpu": 1024}  # of the matrices: large enough to keep all of a device busy

_LARGE_SIDE = 8192

_TIMES = 7


@dataclass(frozen=True)
class Limit:
    """A device and one body on it.

    Attributes:
        device, dtype: where bodies run, and what they multiply in.
        flops_per_s: floating-point operations a second of one large matrix product, measured.
        sample_flops: those of one sample's forward and input gradient.
    """

    device: str
    dtype: str
    flops_per_s: float
    sample_flops: int

    def __str__(self) -> str:
        return f"{self.device}, {self.dtype}"

    def share(self, samples_per_s: float) -> float:
        """How much of the measured matrix rate so many samples a second make use of."""
        return samples_per_s * self.sample_flops / self.flops_per_s

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def limit_of(body: Body, place: Placement, sample: Tensor) -> Limit:
    """The limit of a device for a body and a sample's smashed data [1, T, D] there."""
    return Limit(
        str(place.device),
        place.dtype_name,
        _matrix_rate(place),
        body_step_flops(body.settings, sample.shape[1]),
    )


def _matrix_rate(place: Placement) -> float:
    """The best of several products: others can only slow it down."""
    side = _SIDE.get(place.device.type, _LARGE_SIDE)
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=draw).to(place.device, place.dtype) for _ in range(2))
    least = min(_seconds_of(a, b) for _ in range(_TIMES))
    return 2 * side**3 / least


def _seconds_of(a: Tensor, b: Tensor) -> float:
    began = time.perf_counter()
    float((a @ b)[0, 0])  # waits for the device
    return time.perf_counter() - began


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


class Loop:
    """Forward and input gradient of one body, over and over."""

    def __init__(self) -> None:
        self._body: Body | None = None
        self._placement: Placement | None = None

    def build(
        self, model: dict[str, Any], backbones: str, place: dict[str, str], threads: int
    ) -> dict[str, Any]:
        """Load the body where the server would, and see what the device can do."""
        torch.set_num_threads(threads)
        keep_large_buffers()
        settings = parse_message(ModelPlan, model)
        split = SplitSettings.of(settings)
        self._placement = choose_placement(**place)
        file = split_model.prepare_backbone(split, settings.weights, Path(backbones))
        self._body = split_model.build_body(
            split,
            split_model.open_backbone(file.path),
            self._placement.device,
            self._placement.dtype,
        )
        return limit_of(self._body, self._placement, self._drawn(1, torch.Generator())).to_json()

    def run(self, batch: int, steps: int) -> dict[str, Any]:
        """Seconds that ``steps`` steps of ``batch`` samples take, on the clock and of the CPU."""
        if self._body is None:
            raise RuntimeError("the loop has no body yet")
        body, draw = self._body, torch.Generator().manual_seed(0)
        smashed, gradients = self._drawn(batch, draw), self._drawn(batch, draw)
        self._wait()
        cpu, clock = time.process_time(), time.perf_counter()
        for _ in range(steps):
            leaf = smashed.detach().requires_grad_(True)
            torch.autograd.grad(body(leaf), leaf, gradients)
        self._wait()
        return {"seconds": time.perf_counter() - clock, "cpu_s": time.process_time() - cpu}

    def _drawn(self, batch: int, draw: torch.Generator) -> Tensor:
        """Random smashed data [B, T, D], where the body takes it."""
        if self._body is None or self._placement is None:
            raise RuntimeError("the loop has no body yet")
        body, place = self._body, self._placement
        tokens = body.sizes.tokens + body.settings.prompt_count
        drawn = torch.randn(batch, tokens, body.sizes.width, generator=draw)
        return drawn.to(place.device, place.flowing)

    def _wait(self) -> None:
        if self._placement is not None and self._placement.device.type == "cuda":
            torch.cuda.synchronize(self._placement.device)


if __name__ == "__main__":
    loop = Loop()
    serve_tasks({"build": loop.build, "run": loop.run, "stages": server_stages})
