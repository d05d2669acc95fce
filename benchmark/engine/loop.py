"""The plain loop that the server is measured against: the same body, no network, no queue."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import split_model
from benchmark.engine.limit import limit_of
from benchmark.engine.stages import server_stages
from benchmark.engine.worker import serve_tasks
from protocol.messages import parse_message
from protocol.settings import BackboneSettings
from split_model import Body, SplitSettings
from split_server.allocator import keep_large_buffers
from split_server.devices import Placement, choose_placement


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
        settings = parse_message(BackboneSettings, model)
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
