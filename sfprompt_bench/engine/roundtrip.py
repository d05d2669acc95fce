"""A tensor's round trip through client transport, server and an empty body, over an echo's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfprompt_bench.engine.testbed import Testbed
from sfprompt_bench.engine.throughput import Advance
from sfprompt_bench.engine.worker import Worker
from sfprompt_bench.engine.workload import Spread

_STAGE_REPETITIONS = 40

SOCKETS, REST = "sockets, both ends", "the rest: HTTP, threads, queue"


@dataclass(frozen=True)
class Trips:
    """Round trips in sequence."""

    seconds: tuple[float, ...]
    client_cpu_s: float
    server_cpu_s: float


@dataclass(frozen=True)
class RoundTrip:
    """The server's round trips and the echo's, measured in turn.

    Attributes:
        nbytes: of the tensor, each way.
        served: by the server: forward and backward requests.
        echoed: by two bare sockets.
        kinds: median seconds of a request, by kind.
        stages: CPU milliseconds a MB of the stages that can be measured alone.
    """

    nbytes: int
    served: Sequence[Trips]
    echoed: Sequence[Trips]
    kinds: Mapping[str, float]
    stages: Mapping[str, float]

    @property
    def ratio(self) -> Spread:
        return Spread.of(
            [
                Spread.of(served.seconds).median / Spread.of(echoed.seconds).median
                for served, echoed in zip(self.served, self.echoed, strict=True)
            ]
        )

    def cpu_ms_per_mb(self, trips: Sequence[Trips], cpu_of: Callable[[Trips], float]) -> float:
        """CPU milliseconds of one end for each MB, in either direction."""
        count = sum(len(repetition.seconds) for repetition in trips)
        return 1e3 * sum(map(cpu_of, trips)) / (2 * count * self.nbytes / 1e6)

    @property
    def cpu(self) -> dict[str, float]:
        """CPU milliseconds a MB, by end."""
        return {
            "client": self.cpu_ms_per_mb(self.served, _client_cpu_s),
            "server": self.cpu_ms_per_mb(self.served, _server_cpu_s),
            "echo client": self.cpu_ms_per_mb(self.echoed, _client_cpu_s),
            "echo server": self.cpu_ms_per_mb(self.echoed, _server_cpu_s),
        }

    @property
    def cpu_ratio(self) -> float:
        """CPU seconds of both ends over the echo's: other programs hardly affect it."""
        cpu = self.cpu
        return (cpu["client"] + cpu["server"]) / (cpu["echo client"] + cpu["echo server"])

    @property
    def budget(self) -> dict[str, float]:
        """CPU of a round trip by stage: milliseconds for a MB in both directions."""
        cpu = self.cpu
        parts = dict(self.stages)
        parts[SOCKETS] = 2 * (cpu["echo client"] + cpu["echo server"])
        parts[REST] = 2 * (cpu["client"] + cpu["server"]) - sum(parts.values())
        return parts

    def to_json(self) -> dict[str, Any]:
        served = [s for trips in self.served for s in trips.seconds]
        echoed = [s for trips in self.echoed for s in trips.seconds]
        return {
            "bytes_each_way": self.nbytes,
            "ratio": self.ratio.to_json(),
            "cpu_ratio": self.cpu_ratio,
            "seconds": Spread.of(served).median,
            "echo_seconds": Spread.of(echoed).median,
            "seconds_by_kind": dict(self.kinds),
            "cpu_ms_per_mb": self.cpu,
            "cpu_ms_per_mb_there_and_back": self.budget,
        }


def measure_roundtrip(testbed: Testbed, advance: Advance) -> RoundTrip:
    """Measure round trips of the server and of the echo, in turn."""
    setting, clients = testbed.setting, testbed.clients
    shape = setting.roundtrip_shape
    run = testbed.server.open_run(setting.empty_run)
    clients.perform(
        "connect",
        url=testbed.server.url,
        credential=run.credentials[0],
        settings=run.settings.model_dump(mode="json"),
    )
    nbytes = 4 * shape[0] * shape[1] * shape[2]
    cores = testbed.cores.server
    echo = Worker("echo", "sfprompt_bench.engine.echo", testbed.folder, cores, 1)
    try:
        port = echo.perform("listen", nbytes=nbytes)["port"]
        served, echoed, kinds = [], [], []
        for number in range(setting.plan.roundtrip_repetitions + 1):
            trips, seconds = _measure_server(testbed, shape, run.round)
            echo_trips = _measure_echo(testbed, echo, port, nbytes)
            if number:  # the first repetition warms up
                served.append(trips)
                echoed.append(echo_trips)
                kinds.append(seconds)
            advance("round trip")
    finally:
        echo.stop()
    stages: dict[str, float] = {}
    for worker in (clients, testbed.loop):
        result = worker.perform("time_stages", shape=shape, times=_STAGE_REPETITIONS)
        stages |= result["ms_per_mb"]
    medians = {
        kind: Spread.of([s for by_kind in kinds for s in by_kind[kind]]).median for kind in kinds[0]
    }
    return RoundTrip(nbytes, served, echoed, medians, stages)


def _measure_server(
    testbed: Testbed, shape: tuple[int, int, int], round_: int
) -> tuple[Trips, dict[str, list[float]]]:
    before = testbed.server.cpu_s()
    times = testbed.setting.plan.roundtrip_steps
    result = testbed.clients.perform("time_requests", shape=shape, round_=round_, times=times)
    by_kind: dict[str, list[float]] = result["seconds"]
    seconds = tuple(s for values in by_kind.values() for s in values)
    return Trips(seconds, result["cpu_s"], testbed.server.cpu_s() - before), by_kind


def _measure_echo(testbed: Testbed, echo: Worker, port: int, nbytes: int) -> Trips:
    before = echo.perform("cpu_seconds")["cpu_s"]
    times = 2 * testbed.setting.plan.roundtrip_steps
    result = testbed.clients.perform("time_echo", port=port, nbytes=nbytes, times=times)
    server_cpu_s = echo.perform("cpu_seconds")["cpu_s"] - before
    return Trips(tuple(result["seconds"]), result["cpu_s"], server_cpu_s)


def _client_cpu_s(trips: Trips) -> float:
    return trips.client_cpu_s


def _server_cpu_s(trips: Trips) -> float:
    return trips.server_cpu_s
