"""Simulated devices, as a process of their own: the real protocol, random tensors, no model.

Each joins, polls for tasks, trains by one step and an update, evaluates, and after some hours
leaves or falls silent, to come back later under its name or a new one.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from protocol.frames import encode_frame, join_frame
from protocol.plan import ModelPlan
from protocol.wire import (
    BACKWARD_PATH,
    FORWARD_PATH,
    FRAME_MEDIA_TYPE,
    IDEMPOTENCY_HEADER,
    PROTOCOL_VERSION,
    VERSION_HEADER,
)
from sfprompt_bench.engine.workload import shape_of
from split_model.checkpoints.state import state_shapes

_HOUR_S: Final = 3600.0

_STAY_H, _AWAY_H = 2.0, 1.0  # means

_SILENT: Final = 0.5  # share of the departures without a word

_NEW_NAME: Final = 0.3  # share of the returns as another device

_POLL_S: Final = 300.0  # of simulated time

_BATCH: Final = 4


@dataclass(frozen=True)
class Day:
    """What all simulated devices share.

    Attributes:
        port: of the server on this machine.
        run: that they join.
        speed: simulated seconds in one second.
        seconds: of simulated time.
        devices: at once, those that are away included.
        seed: of everything random.
    """

    port: int
    run: str
    model: dict[str, Any]
    speed: float
    seconds: float
    devices: int
    seed: int
    counts: Counter[str] = field(default_factory=Counter)

    async def sleep(self, seconds: float) -> None:
        """Wait for simulated seconds."""
        await asyncio.sleep(seconds / self.speed)


class _Connection:
    """A kept-alive connection to the server."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def call(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes = b""
    ) -> tuple[int, bytes]:
        """Send a request; on a closed connection, again on a new one."""
        lines = [f"{method} {path} HTTP/1.1", "host: x", f"content-length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        data = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
        for last in (False, True):
            try:
                if self._writer is None:
                    self._reader, self._writer = await asyncio.open_connection(
                        "127.0.0.1", self._port
                    )
                self._writer.write(data)
                return await self._response()
            except (OSError, asyncio.IncompleteReadError):
                self.close()
                if last:
                    raise
        raise AssertionError

    async def _response(self) -> tuple[int, bytes]:
        reader = self._reader
        if reader is None:
            raise OSError("closed")
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status = int(head.split(" ", 2)[1])
        length = int(head.split("content-length: ")[1].split("\r\n")[0])
        return status, await reader.readexactly(length)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


class _Device:
    """One simulated device."""

    def __init__(self, day: Day, number: int, tensors: Mapping[str, dict[str, Tensor]]) -> None:
        self._day, self._tensors = day, tensors
        self._draws = random.Random(day.seed * 100_003 + number)  # noqa: S311 - nothing secret
        self._name = f"device-{number}-0"
        self._lives = 0
        self._headers: dict[str, str] = {}

    async def live(self) -> None:
        """Come and go until the day is over."""
        await self._day.sleep(self._draws.uniform(0, _AWAY_H * _HOUR_S))
        while True:
            connection = _Connection(self._day.port)
            try:
                await self._stay(connection)
            except (OSError, asyncio.IncompleteReadError, ValueError) as error:
                self._day.counts[f"failure: {type(error).__name__}"] += 1
            finally:
                connection.close()
            await self._day.sleep(self._draws.expovariate(1 / (_AWAY_H * _HOUR_S)))
            if self._draws.random() < _NEW_NAME:
                self._lives += 1
                self._name = f"{self._name.rsplit('-', 1)[0]}-{self._lives}"

    async def _stay(self, connection: _Connection) -> None:
        """Take part for some hours."""
        self._headers = {VERSION_HEADER: str(PROTOCOL_VERSION)}
        request = {"name": self._name, "train_samples": 100, "test_samples": 10, "num_classes": 10}
        path = f"/v1/runs/{self._day.run}"
        joined = await self._json(connection, "POST", f"{path}/participants", request, self._name)
        self._headers["authorization"] = f"Bearer {joined['credential']}"
        loop = asyncio.get_running_loop()
        hours = self._draws.expovariate(1 / _STAY_H)
        until = loop.time() + hours * _HOUR_S / self._day.speed
        query = ""
        while loop.time() < until:
            wait = _POLL_S / self._day.speed
            task = await self._json(connection, "GET", f"{path}/assignment?wait={wait:g}{query}")
            query = f"&task={task['task']}&round={task['round']}&attempt={task['attempt']}"
            if task["task"] == "train":
                await self._train(connection, path, task)
            elif task["task"] == "evaluate":
                report = {"samples": 10, "correct": self._draws.randrange(11), "loss_sum": 9.0}
                both = {"round": task["round"], "attempt": task["attempt"]}
                await self._json(connection, "PUT", f"{path}/evaluation", {**report, **both})
            elif task["task"] == "stop":
                break
        if self._draws.random() >= _SILENT:
            await self._json(connection, "DELETE", f"{path}/participants/me")
            self._lives += 1  # a device that has left does not join again under its name
            self._name = f"{self._name.rsplit('-', 1)[0]}-{self._lives}"

    async def _train(self, connection: _Connection, path: str, task: dict[str, Any]) -> None:
        """Send one batch forward and backward, and an update."""
        step = {"step": uuid.UUID(int=self._draws.getrandbits(128)).hex, "round": task["round"]}
        for route, kind in ((FORWARD_PATH, "forward"), (BACKWARD_PATH, "backward")):
            await self._frame(connection, "POST", route, kind, step)
        meta = {"round": task["round"], "attempt": task["attempt"], "samples": 50}
        await self._frame(connection, "PUT", f"{path}/update", "update", meta)

    async def _frame(
        self, connection: _Connection, method: str, path: str, kind: str, meta: dict[str, Any]
    ) -> None:
        tensors = {name: (tensor, "float32") for name, tensor in self._tensors[kind].items()}
        body = bytes(join_frame(encode_frame(kind, meta, tensors)))
        headers = {**self._headers, "content-type": FRAME_MEDIA_TYPE, **self._key()}
        status, _ = await connection.call(method, path, headers, body)
        self._day.counts[f"{kind} {status}"] += 1

    async def _json(
        self,
        connection: _Connection,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        key: str | None = None,
    ) -> dict[str, Any]:
        """Send JSON and return the response, or an empty map for an error."""
        headers = {**self._headers, **self._key(key), "content-type": "application/json"}
        data = b"" if body is None else json.dumps(body).encode()
        status, content = await connection.call(method, path, headers, data)
        name = path.partition("?")[0].rsplit("/", 1)[1]
        self._day.counts[f"{name} {status}"] += 1
        if status >= 400 and method in ("GET", "POST"):
            raise ValueError(f"{path}: {status} {content[:200]!r}")
        return dict(json.loads(content))

    def _key(self, key: str | None = None) -> dict[str, str]:
        return {IDEMPOTENCY_HEADER: key or uuid.UUID(int=self._draws.getrandbits(128)).hex}


async def live_through(day: Day) -> None:
    """Let all devices live for the day's seconds."""
    model = ModelPlan.model_validate(day.model)
    generator = torch.Generator().manual_seed(day.seed)
    shape = shape_of(model, _BATCH)
    state = {
        name: 0.1 * torch.randn(size, generator=generator)
        for name, size in state_shapes(model).items()
    }
    tensors = {
        "forward": {"smashed": torch.randn(shape, generator=generator)},
        "backward": {"gradients": torch.randn(shape, generator=generator)},
        "update": state,
    }
    devices = [
        asyncio.create_task(_Device(day, number, tensors).live()) for number in range(day.devices)
    ]
    await day.sleep(day.seconds)
    for device in devices:
        device.cancel()
    await asyncio.gather(*devices, return_exceptions=True)


def main() -> None:
    """Live through the day that the argument describes; write the counts of all requests."""
    torch.set_num_threads(1)
    day = Day(**json.loads(sys.argv[1]))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    asyncio.run(live_through(day))
    sys.stdout.write(json.dumps(day.counts) + "\n")


if __name__ == "__main__":
    main()
