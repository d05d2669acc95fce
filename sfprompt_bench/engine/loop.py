"""The plain loop over a body, without network and queue, and the roofline of its device."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from protocol.messages import parse_message
from protocol.plan import ModelPlan
from sfprompt_bench.cost.flops import body_step_flops
from sfprompt_bench.engine.stages import time_server_stages
from sfprompt_bench.engine.worker import serve_tasks
from split_model.backbone.weights import open_backbone, prepare_backbone
from split_model.parts.body import Body
from split_model.parts.build import build_body
from split_server.runtime.device import Placement, choose_placement
from split_server.runtime.process import keep_large_buffers

_MATRIX_SIDE = {"cpu": 1024}  # large enough to use all of a device

_LARGE_MATRIX_SIDE = 8192

_REPETITIONS = 7


@dataclass(frozen=True)
class Roofline:
    """The upper bound of a device's throughput for one body.

    Attributes:
        device, dtype: where bodies run, and the type of their matrix products.
        flops_per_s: floating-point operations a second of one large matrix product, measured.
        sample_flops: operations of one sample's forward and input gradient.
    """

    device: str
    dtype: str
    flops_per_s: float
    sample_flops: int

    def __str__(self) -> str:
        return f"{self.device}, {self.dtype}"

    def share(self, samples_per_s: float) -> float:
        """The share of the measured matrix rate that a throughput uses."""
        return samples_per_s * self.sample_flops / self.flops_per_s

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_roofline(body: Body, placement: Placement, tokens: int) -> Roofline:
    """Measure the device's matrix rate, and count the body's operations for ``tokens`` tokens."""
    return Roofline(
        str(placement.device),
        placement.dtype_name,
        _matrix_rate(placement),
        body_step_flops(body.settings, tokens),
    )


def _matrix_rate(placement: Placement) -> float:
    """The best of several products: other programs can only slow one down."""
    side = _MATRIX_SIDE.get(placement.device.type, _LARGE_MATRIX_SIDE)
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(side, side, generator=generator).to(placement.device, placement.dtype)
        for _ in range(2)
    )
    return 2 * side**3 / min(_product_seconds(a, b) for _ in range(_REPETITIONS))


def _product_seconds(a: Tensor, b: Tensor) -> float:
    began = time.perf_counter()
    float((a @ b)[0, 0])  # waits for the device
    return time.perf_counter() - began


class Loop:
    """Forward and input gradient of one body, step after step."""

    def __init__(self) -> None:
        self._body: Body | None = None
        self._placement: Placement | None = None

    def build(
        self, model: dict[str, Any], backbones: str, placement: dict[str, str], threads: int
    ) -> dict[str, Any]:
        """Load the body as the server does, and return the device's roofline.

        Args:
            model: a `ModelPlan` as JSON.
            backbones: folder of the server's backbones.
            placement: device and dtype of the body.
            threads: CPU threads of the body.
        """
        torch.set_num_threads(threads)
        keep_large_buffers()
        settings = parse_message(ModelPlan, model)
        split = settings
        self._placement = choose_placement(**placement)
        file = prepare_backbone(split, settings.weights, Path(backbones))
        self._body = build_body(
            split,
            open_backbone(file.path),
            self._placement.device,
            self._placement.dtype,
        )
        tokens = self._body.sizes.tokens + split.prompt_count
        return measure_roofline(self._body, self._placement, tokens).to_json()

    def run(self, batch: int, steps: int) -> dict[str, Any]:
        """Run ``steps`` steps of ``batch`` samples; return seconds and CPU seconds."""
        if self._body is None:
            raise RuntimeError("the loop has no body; call build first")
        body, generator = self._body, torch.Generator().manual_seed(0)
        smashed, gradients = self._random(batch, generator), self._random(batch, generator)
        self._synchronise()
        cpu, clock = time.process_time(), time.perf_counter()
        for _ in range(steps):
            leaf = smashed.detach().requires_grad_(True)
            torch.autograd.grad(body(leaf), leaf, gradients)
        self._synchronise()
        return {"seconds": time.perf_counter() - clock, "cpu_s": time.process_time() - cpu}

    def _random(self, batch: int, generator: torch.Generator) -> Tensor:
        """Random smashed data [B, T, D] on the body's device."""
        if self._body is None or self._placement is None:
            raise RuntimeError("the loop has no body; call build first")
        body, placement = self._body, self._placement
        tokens = body.sizes.tokens + body.settings.prompt_count
        smashed = torch.randn(batch, tokens, body.sizes.width, generator=generator)
        return smashed.to(placement.device, placement.flowing)

    def _synchronise(self) -> None:
        if self._placement is not None and self._placement.device.type == "cuda":
            torch.cuda.synchronize(self._placement.device)


if __name__ == "__main__":
    loop = Loop()
    serve_tasks({"build": loop.build, "run": loop.run, "time_stages": time_server_stages})
