"""Sample a server's resources through a simulated day, and compare its beginning with its end."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import statistics
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from protocol.errors import SFPromptError
from protocol.federation import FederationSettings
from protocol.plan import ModelPlan, RunPlan, TrainingPlan
from sfprompt_bench.engine.server import ServerProcess, running_server
from sfprompt_bench.engine.worker import divide_cores
from sfprompt_bench.run.processes import Process
from split_server.client import OperatorClient, read_token
from tuning_methods.custom.settings import Custom

_MIB: Final = 1024 * 1024

_ROUND_S, _LIVE_S, _LONGEST_POLL_S = 600.0, 60.0, 300.0  # of simulated time

_WARM_UP: Final = 0.25  # share of the day

MAX_MEMORY: Final = 0.05  # growth of the median from the day's second quarter to its last one

MAX_DESCRIPTORS: Final = 8

MAX_FILES_A_ROUND: Final = 2.0  # a round leaves one global state

MAX_DATABASE_A_ROUND: Final = 64 * 1024  # bytes: of its record, events and new participants

_SAMPLES: Final = 240

_CONNECTIONS: Final = re.compile(r"^sfprompt_connections (\S+)$", re.MULTILINE)

MODEL: Final = ModelPlan(
    backbone="test_vit", weights="random:0", image_size=32, cut=1, prompt_count=2
)


@dataclass(frozen=True)
class Sample:
    """A server's resources at one moment of the day.

    Attributes:
        hour: of the day.
        memory: resident bytes.
        connections: of devices that are there.
        descriptors: all others.
        files: in the data folder.
        database: bytes of it, with its log.
        rounds: so far.
        participants: that have joined and not left.
    """

    hour: float
    memory: int
    connections: int
    descriptors: int
    files: int
    database: int
    rounds: int
    participants: int


@dataclass(frozen=True)
class Quarter:
    """Medians of a quarter of the day."""

    memory: float
    descriptors: float

    @classmethod
    def of(cls, samples: list[Sample]) -> Quarter:
        return cls(
            statistics.median(sample.memory for sample in samples),
            statistics.median(sample.descriptors for sample in samples),
        )


@dataclass(frozen=True)
class DayResult:
    """A simulated day.

    Attributes:
        hours: of simulated time.
        seconds: that they took.
        devices: at once, those that were away included.
        samples: of the server.
        requests: how often each kind of request had each status.
    """

    hours: float
    seconds: float
    devices: int
    samples: list[Sample]
    requests: dict[str, int]

    @property
    def settled(self) -> list[Sample]:
        """The samples after the first quarter."""
        return [sample for sample in self.samples if sample.hour >= _WARM_UP * self.hours]

    def figures(self) -> dict[str, tuple[float, float]]:
        """Return each figure and its bound."""
        settled = self.settled
        third = len(settled) // 3
        early, late = Quarter.of(settled[:third]), Quarter.of(settled[-third:])
        first, last = settled[0], settled[-1]
        rounds = max(1, last.rounds - first.rounds)
        return {
            "growth of memory, %": (100 * (late.memory / early.memory - 1), 100 * MAX_MEMORY),
            "more descriptors": (late.descriptors - early.descriptors, MAX_DESCRIPTORS),
            "files a round": ((last.files - first.files) / rounds, MAX_FILES_A_ROUND),
            "database, KiB a round": (
                (last.database - first.database) / rounds / 1024,
                MAX_DATABASE_A_ROUND / 1024,
            ),
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "hours": self.hours,
            "seconds": round(self.seconds, 1),
            "devices": self.devices,
            "rounds": self.samples[-1].rounds,
            "participants": self.samples[-1].participants,
            "memory_mib": round(self.samples[-1].memory / _MIB, 1),
            "figures": {name: [round(x, 3) for x in pair] for name, pair in self.figures().items()},
            "requests": self.requests,
            "samples": [dataclasses.astuple(sample) for sample in self.samples],
        }


def live_a_day(
    hours: float,
    minutes: float,
    devices: int,
    seed: int,
    folder: Path,
    tick: Callable[[float], None],
) -> DayResult:
    """Run a server and simulated devices, and sample the server.

    Args:
        hours: of simulated time.
        minutes: that they take: all time-outs are shortened by the same factor.
        devices: simulated ones.
        seed: of their behaviour.
        folder: for data and logs.
        tick: is called with the hours that have passed.

    Raises:
        SFPromptError: a process has ended early; with the end of its log.
    """
    speed = hours * 60 / minutes
    settings = {
        "live_window_s": _LIVE_S / speed * 10,  # the network is not faster
        "max_wait_s": _LONGEST_POLL_S / speed,
        "samples_mib": 8,
        "answer_mib": 8,
        "log_level": "warning",
    }
    with running_server("server", folder, divide_cores(), settings) as server:
        operator = OperatorClient(server.url, read_token(server.data_dir))
        run = operator.create_run(Custom.of(_plan(speed, seed))).id
        day = {
            "port": server.port,
            "run": run,
            "model": MODEL.model_dump(mode="json"),
            "speed": speed,
            "seconds": 3600 * hours,
            "devices": devices,
            "seed": seed,
        }
        lines: list[str] = []
        process = Process(
            "devices", ["sfprompt_bench.day.devices", json.dumps(day)], folder, lines.append
        )
        while not lines and process.exit_code() is None:  # it imports torch
            time.sleep(0.1)
        began, samples = time.perf_counter(), []
        while process.exit_code() is None:
            hour = (time.perf_counter() - began) * speed / 3600
            if hour > hours:
                time.sleep(0.1)
                continue
            samples.append(_sample(hour, server, operator, run))
            tick(hour)
            time.sleep(60 * minutes / _SAMPLES)
        process.wait(10)
        operator.close()
        if process.exit_code() != 0:
            raise SFPromptError(
                f"the simulated devices have ended:\n{process.last_lines()}", field="devices"
            )
    return DayResult(hours, 60 * minutes, devices, samples, json.loads(lines[-1]))


def _plan(speed: float, seed: int) -> RunPlan:
    return RunPlan(
        name="day",
        seed=seed,
        model=MODEL,
        federation=FederationSettings(
            rounds=100_000,
            min_participants=2,
            participants_per_round=20,
            round_timeout_s=_ROUND_S / speed,
            max_repeats=1000,
            evaluate_every=6,
        ),
        training=TrainingPlan(batch_size=8),
    )


def _sample(hour: float, server: ServerProcess, operator: OperatorClient, run: str) -> Sample:
    view = next(each for each in operator.runs() if each.id == run)
    if view.status.is_over:
        raise SFPromptError(f"the run has ended: {view.reason}", field="run")
    headers = {"authorization": f"Bearer {read_token(server.data_dir)}"}
    request = urllib.request.Request(f"{server.url}/metrics", headers=headers)  # noqa: S310
    with urllib.request.urlopen(request) as page:  # noqa: S310 - our own server
        connections = int(float(_CONNECTIONS.findall(page.read().decode())[0]))
    files = [path for path in server.data_dir.rglob("*") if path.is_file()]
    database = sum(path.stat().st_size for path in files if path.name.startswith("server.sqlite"))
    return Sample(
        hour=hour,
        memory=server.resident_bytes(),
        connections=connections,
        descriptors=len(os.listdir(f"/proc/{server.pid}/fd")) - connections,
        files=len(files),
        database=database,
        rounds=view.round,
        participants=view.participants,
    )
