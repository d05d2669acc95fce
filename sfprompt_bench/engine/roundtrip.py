"""A tensor's round trip through client transport, server and an empty body, against an echo."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfprompt_bench.engine.processes import Worker
from sfprompt_bench.engine.stand import Testbed
from sfprompt_bench.engine.workload import Spread

_STAGE_TIMES = 40

SOCKETS, REST = "sockets, both ends", "the rest: HTTP, threads, queue"


@dataclass(frozen=True)
class Turns:
    """Some round trips one after the other."""

    seconds: tuple[float, ...]
    client_cpu_s: float
    server_cpu_s: float


@dataclass(frozen=True)
class RoundTrip:
    """The project's round trips and the echo's, in turn.

    Attributes:
        nbytes: of the tensor, each way.
        served: by the server: forwards and backwards.
        echoed: by two bare sockets.
        kinds: the median seconds of a request of each kind.
        stages: milliseconds of CPU a MB of the stages that can be timed on their own.
    """

    nbytes: int
    served: Sequence[Turns]
    echoed: Sequence[Turns]
    kinds: Mapping[str, float]
    stages: Mapping[str, float]

    @property
    def ratio(self) -> Spread:
        return Spread.of(
            [
                Spread.of(one.seconds).median / Spread.of(other.seconds).median
                for one, other in zip(self.served, self.echoed, strict=True)
            ]
        )

    def cpu_ms_per_mb(self, turns: Sequence[Turns], end: Callable[[Turns], float]) -> float:
        """CPU milliseconds of one end for a MB that crosses, whichever way."""
        count = sum(len(one.seconds) for one in turns)
        return 1e3 * sum(map(end, turns)) / (2 * count * self.nbytes / 1e6)

    @property
    def cpu(self) -> dict[str, float]:
        """CPU milliseconds a MB, by end."""
        return {
            "client": self.cpu_ms_per_mb(self.served, _client),
            "server": self.cpu_ms_per_mb(self.served, _server),
            "echo client": self.cpu_ms_per_mb(self.echoed, _client),
            "echo server": self.cpu_ms_per_mb(self.echoed, _server),
        }

    @property
    def cpu_ratio(self) -> float:
        """CPU seconds of both ends over the echo's: what other programs hardly change."""
        cpu = self.cpu
        return (cpu["client"] + cpu["server"]) / (cpu["echo client"] + cpu["echo server"])

    @property
    def budget(self) -> dict[str, float]:
        """Where the CPU of a round trip goes: milliseconds for a MB there and back."""
        cpu = self.cpu
        parts = dict(self.stages)
        parts[SOCKETS] = 2 * (cpu["echo client"] + cpu["echo server"])
        parts[REST] = 2 * (cpu["client"] + cpu["server"]) - sum(parts.values())
        return parts

    def to_json(self) -> dict[str, Any]:
        every = [s for one in self.served for s in one.seconds]
        return {
            "bytes_each_way": self.nbytes,
            "ratio": self.ratio.to_json(),
            "cpu_ratio": self.cpu_ratio,
            "seconds": Spread.of(every).median,
            "echo_seconds": Spread.of([s for one in self.echoed for s in one.seconds]).median,
            "seconds_by_kind": dict(self.kinds),
            "cpu_ms_per_mb": self.cpu,
            "cpu_ms_per_mb_there_and_back": self.budget,
        }


def measure_roundtrip(stand: Testbed, advance: Callable[[str], None]) -> RoundTrip:
    """Round trips of the server and of the echo, in turn."""
    setting = stand.setting
    shape = setting.turn_shape
    run = stand.server.open_run(setting.empty_run)
    stand.crowd.ask(
        "connect",
        url=stand.server.url,
        credential=run.credentials[0],
        settings=run.settings.model_dump(mode="json"),
    )
    nbytes = 4 * shape[0] * shape[1] * shape[2]
    echo = Worker("echo", "sfprompt_bench.engine.echo", stand.folder, stand.cores.server, 1)
    try:
        port = echo.ask("listen", nbytes=nbytes)["port"]
        served, echoed, kinds = [], [], []
        for number in range(setting.plan.turn_repetitions + 1):
            one, seconds = _turns(stand, shape, run.round)
            other = _echoes(stand, echo, port, nbytes)
            if number:  # the first one warms up
                served.append(one)
                echoed.append(other)
                kinds.append(seconds)
            advance("round trip")
    finally:
        echo.stop()
    stages: dict[str, float] = {}
    for worker in (stand.crowd, stand.loop):
        stages |= worker.ask("stages", shape=shape, times=_STAGE_TIMES)["ms_per_mb"]
    medians = {kind: Spread.of([s for one in kinds for s in one[kind]]).median for kind in kinds[0]}
    return RoundTrip(nbytes, served, echoed, medians, stages)


def _turns(
    stand: Testbed, shape: tuple[int, int, int], round_: int
) -> tuple[Turns, dict[str, list[float]]]:
    before = stand.server.cpu_s()
    found = stand.crowd.ask("turn", shape=shape, round_=round_, times=stand.setting.plan.turns)
    kinds: dict[str, list[float]] = found["seconds"]
    seconds = tuple(s for every in kinds.values() for s in every)
    return Turns(seconds, found["cpu_s"], stand.server.cpu_s() - before), kinds


def _echoes(stand: Testbed, echo: Worker, port: int, nbytes: int) -> Turns:
    before = echo.ask("spent")["cpu_s"]
    times = 2 * stand.setting.plan.turns
    found = stand.crowd.ask("echo", port=port, nbytes=nbytes, times=times)
    return Turns(tuple(found["seconds"]), found["cpu_s"], echo.ask("spent")["cpu_s"] - before)


def _client(turns: Turns) -> float:
    return turns.client_cpu_s


def _server(turns: Turns) -> float:
    return turns.server_cpu_s
