"""The clients' process: many synthetic devices, a thread each, and one real device's transport."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmark.engine import echo, stages
from benchmark.engine.device import SyntheticDevice
from benchmark.engine.worker import serve_tasks
from edge_client.transport import Server, SplitPlane
from protocol.messages import parse_message
from protocol.settings import RunSettings


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
        self._plane = SplitPlane(server, parse_message(RunSettings, settings))
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
            "stages": stages.client_stages,
        }
    )
