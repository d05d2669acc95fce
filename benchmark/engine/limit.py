"""What the device could do at best: how fast it multiplies matrices, and what a sample takes."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from split_model import Body
from split_server.devices import Placement

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
        _step_flops(body, sample),
    )


def _step_flops(body: Body, sample: Tensor) -> int:
    leaf = sample.detach().requires_grad_(True)
    # Only of plain products does the counter know what they take, on every device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        features = body(leaf)
        features.backward(torch.ones_like(features))  # the counter cannot follow autograd.grad
    return int(counter.get_total_flops())


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
