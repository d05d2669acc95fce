"""The faults of a run, drawn from a seed: what happens, to whom, and at which request."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from sfprompt_bench.chaos.control import DEVICE_POINTS, SERVER_POINTS

SERVER = "server"


class Kind(StrEnum):
    """What a fault does."""

    DROP_REQUEST = "drop request"
    DROP_RESPONSE = "drop response"
    DELAY_REQUEST = "delay request"
    DELAY_RESPONSE = "delay response"
    DUPLICATE = "duplicate request"
    REPLAY = "replay request later"
    REORDER = "reorder requests"
    TRUNCATE_REQUEST = "truncate request"
    TRUNCATE_RESPONSE = "truncate response"
    CORRUPT_REQUEST = "corrupt request"
    CORRUPT_RESPONSE = "corrupt response"
    RESET_REQUEST = "reset in request"
    RESET_RESPONSE = "reset in response"
    FRAGMENT = "fragment"
    OUTAGE = "network outage"
    KILL_SERVER = "kill server"
    KILL_SERVER_WRITING = "kill server while it writes"
    KILL_DEVICE = "kill device"
    KILL_DEVICE_WRITING = "kill device while it writes"
    STOP_SERVER = "stop server"
    FREEZE_SERVER = "freeze server"
    FREEZE_DEVICE = "freeze device"
    FULL_DISK_SERVER = "full disk of the server"
    FULL_DISK_DEVICE = "full disk of the devices"
    WRITE_ERRORS = "write errors of the server"
    CLOCK_SERVER = "clock jump of the server"
    CLOCK_DEVICE = "clock jump of a device"


NETWORK = (
    Kind.DROP_REQUEST,
    Kind.DROP_RESPONSE,
    Kind.DELAY_REQUEST,
    Kind.DELAY_RESPONSE,
    Kind.DUPLICATE,
    Kind.REPLAY,
    Kind.REORDER,
    Kind.TRUNCATE_REQUEST,
    Kind.TRUNCATE_RESPONSE,
    Kind.CORRUPT_REQUEST,
    Kind.CORRUPT_RESPONSE,
    Kind.RESET_REQUEST,
    Kind.RESET_RESPONSE,
    Kind.FRAGMENT,
)

# Faults after which the processes are started again, or that cost seconds: a few in each run.
HEAVY = (
    Kind.KILL_SERVER,
    Kind.KILL_SERVER_WRITING,
    Kind.KILL_SERVER_WRITING,
    Kind.KILL_SERVER_WRITING,
    Kind.KILL_DEVICE,
    Kind.KILL_DEVICE,
    Kind.KILL_DEVICE_WRITING,
    Kind.STOP_SERVER,
    Kind.FREEZE_SERVER,
    Kind.FREEZE_DEVICE,
    Kind.OUTAGE,
    Kind.CLOCK_SERVER,
    Kind.CLOCK_DEVICE,
)

DISK = (Kind.FULL_DISK_SERVER, Kind.FULL_DISK_DEVICE, Kind.WRITE_ERRORS)

# Kinds after which a device may end with an error, for its supervisor to start it again.
MAY_END_A_DEVICE = frozenset({Kind.CORRUPT_REQUEST, Kind.CORRUPT_RESPONSE, Kind.FULL_DISK_DEVICE})

# Kinds after which the server may end with an error.
MAY_END_THE_SERVER = frozenset({Kind.FULL_DISK_SERVER, Kind.WRITE_ERRORS})

_SECONDS = {
    Kind.DELAY_REQUEST: (0.05, 1.0),
    Kind.DELAY_RESPONSE: (0.05, 1.0),
    Kind.REPLAY: (0.05, 1.5),
    Kind.REORDER: (0.3, 0.8),
    Kind.OUTAGE: (0.2, 1.5),
    Kind.KILL_SERVER: (0.0, 0.05),  # after the request
    Kind.KILL_DEVICE: (0.0, 0.05),
    Kind.STOP_SERVER: (0.0, 0.05),
    Kind.FREEZE_SERVER: (0.1, 1.5),
    Kind.FREEZE_DEVICE: (0.1, 1.5),
    Kind.FULL_DISK_SERVER: (0.2, 1.5),
    Kind.FULL_DISK_DEVICE: (0.2, 1.5),
    Kind.WRITE_ERRORS: (0.2, 1.5),
}

_CLOCK_JUMPS_S = (-1e8, -86_400.0, -3600.0, -60.0, 60.0, 3600.0, 86_400.0, 1e8)

_HEAVY_A_RUN = 4

_DISK_SHARE = 0.25  # of the runs have a disk fault, after which the server has devices wait 10 s


@dataclass
class Fault:
    """A fault of one run, and what followed.

    Attributes:
        kind: what happens.
        route: of the request at which it happens.
        number: of this request among all of its route, from 1.
        seconds: duration, or delay after the request.
        share: of a message at which it is cut or changed, 0 to 1.
        draw: a random number, for choices that depend on the message.
        point: where a process is killed while it writes.
        calls: of this point until then.
        jump_s: of the clock.
        injected_at: seconds after the run's start; None: not reached.
        target: who was hit.
        retries: requests that were sent again because of it.
        errors: responses with an error that followed it.
        restarts: processes that were started again because of it.
        rounds: rounds that a device began anew or declined because of it.
    """

    kind: Kind
    route: str
    number: int
    seconds: float
    share: float
    draw: int
    point: str = ""
    calls: int = 0
    jump_s: float = 0.0
    injected_at: float | None = None
    target: str = ""
    retries: int = 0
    errors: int = 0
    restarts: int = 0
    rounds: int = 0

    def describe(self) -> str:
        """Return the fault in one line."""
        where = f" {self.point} #{self.calls}" if self.point else ""
        return f"{self.kind}{where} at {self.route} #{self.number}"


def draw_faults(
    seed: int, requests: Mapping[str, int], count: int, *, with_disk: bool
) -> list[Fault]:
    """Draw the faults of one run.

    Args:
        seed: of the run.
        requests: the undisturbed run's number of requests of each route.
        count: number of faults.
        with_disk: whether the run has small file systems that can be filled.
    """
    draw = random.Random(seed)  # noqa: S311 - need not be secret
    kinds = [draw.choice(HEAVY) for _ in range(min(_HEAVY_A_RUN, count))]
    if count > _HEAVY_A_RUN and draw.random() < _DISK_SHARE:
        kinds.append(draw.choice(DISK if with_disk else (Kind.WRITE_ERRORS,)))
    kinds += [draw.choice(NETWORK) for _ in range(count - len(kinds))]
    routes = sorted(requests)
    return [_draw_fault(draw, kind, routes, requests) for kind in kinds]


def _draw_fault(
    draw: random.Random, kind: Kind, routes: Sequence[str], requests: Mapping[str, int]
) -> Fault:
    route = draw.choice(routes)  # each route as often: rare requests are the critical ones
    fault = Fault(
        kind=kind,
        route=route,
        number=draw.randint(1, requests[route]),
        seconds=draw.uniform(*_SECONDS.get(kind, (0.0, 0.0))),
        share=draw.random(),
        draw=draw.getrandbits(32),
    )
    if kind in (Kind.KILL_SERVER_WRITING, Kind.KILL_DEVICE_WRITING):
        points = SERVER_POINTS if kind is Kind.KILL_SERVER_WRITING else DEVICE_POINTS
        fault.point, fault.calls = draw.choice(points), draw.randint(1, 3)
    if kind in (Kind.CLOCK_SERVER, Kind.CLOCK_DEVICE):
        fault.jump_s = draw.choice(_CLOCK_JUMPS_S)
    return fault
