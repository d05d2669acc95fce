"""The clients' process: synthetic devices, a device's transport, and their CPU stages."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from edge_client.torch_model import wire_shape
from edge_client.transport.client import Server
from edge_client.transport.split_client import SplitPlane
from protocol.messages import parse_message
from protocol.plan import RunPlan
from sfprompt_bench.engine import echo, stages
from sfprompt_bench.engine.synthetic_device import SyntheticDevice
from sfprompt_bench.engine.worker import serve_tasks


@dataclass
class StepLog:
    """The steps of one device: when they ended (seconds from the start) and how long they took."""

    ends: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    waits: int = 0
    lost: int = 0


def run_steps(
    host: str,
    port: int,
    credentials: list[str],
    shape: list[int],
    round_: int,
    steps: int | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Run the steps of one synthetic device for each credential, all at the same time.

    Args:
        host, port: of the server.
        credentials: of participants that train in the open round.
        shape: [B, T, D] of their tensors.
        round_: the open round.
        steps: of each device; None: no limit.
        seconds: after which no step begins; None: no limit.

    Returns:
        Seconds and CPU seconds of the whole, and each device's `StepLog`.
    """
    tokens, width = shape[1:]
    devices = [
        SyntheticDevice(host, port, credential, (shape[0], tokens, width), seed)
        for seed, credential in enumerate(credentials)
    ]
    for device in devices:
        device.connect()
    start = threading.Barrier(len(devices) + 1)
    try:
        with ThreadPoolExecutor(len(devices)) as threads:
            futures = [
                threads.submit(_run_device, device, start, round_, steps, seconds)
                for device in devices
            ]
            cpu, clock = time.process_time(), time.perf_counter()
            start.wait()
            logs = [future.result() for future in futures]
            took, cpu_s = time.perf_counter() - clock, time.process_time() - cpu
    finally:
        for device in devices:
            device.close()
    return {"seconds": took, "cpu_s": cpu_s, "devices": [asdict(log) for log in logs]}


def _run_device(
    device: SyntheticDevice,
    start: threading.Barrier,
    round_: int,
    steps: int | None,
    seconds: float | None,
) -> StepLog:
    log = StepLog()
    start.wait()
    began = time.perf_counter()
    while steps is None or len(log.ends) < steps:
        if seconds is not None and time.perf_counter() - began >= seconds:
            break
        log.seconds.append(device.step(round_))
        log.ends.append(time.perf_counter() - began)
    log.waits, log.lost = device.waits, device.lost
    return log


class TransportClient:
    """The transport of `edge_client`, without a model."""

    def __init__(self) -> None:
        self._plane: SplitPlane | None = None
        self._steps = 0

    def connect(self, url: str, credential: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Connect as a participant of a run with these settings."""
        server = Server(url)
        server.authenticate(credential)
        plan = parse_message(RunPlan, settings)
        shape = wire_shape(plan.model, plan.wire.pooled_features)
        self._plane = SplitPlane(server, plan, shape)
        return {}

    def time_requests(self, shape: list[int], round_: int, times: int) -> dict[str, Any]:
        """Time ``times`` forward and backward requests of [B, T, D].

        Returns:
            Seconds of each request, by kind, and CPU seconds of all.
        """
        if self._plane is None:
            raise RuntimeError("the client is not connected")
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        seconds: dict[str, list[float]] = {"forward": [], "backward": []}
        cpu_s = dict.fromkeys(seconds, 0.0)

        def record(kind: str, began: float, cpu: float) -> None:
            seconds[kind].append(time.perf_counter() - began)
            cpu_s[kind] += time.process_time() - cpu

        for _ in range(times):
            self._steps += 1
            step = f"turn-{self._steps}"
            began, cpu = time.perf_counter(), time.process_time()
            self._plane.forward(tensor, step=step, round_=round_)
            record("forward", began, cpu)
            began, cpu = time.perf_counter(), time.process_time()
            size = tuple(shape)
            self._plane.backward(tensor, step=step, round_=round_, smashed=size)
            record("backward", began, cpu)
        return {"seconds": seconds, "cpu_s": sum(cpu_s.values())}


if __name__ == "__main__":
    torch.set_num_threads(1)
    transport = TransportClient()
    serve_tasks(
        {
            "run_steps": run_steps,
            "connect": transport.connect,
            "time_requests": transport.time_requests,
            "time_echo": echo.time_echo,
            "time_stages": stages.time_client_stages,
        }
    )
