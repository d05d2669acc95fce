"""A simulated link: the device's end waits for as long as a real line would have taken.

A `Link` says what a line is like, a `Line` is one in use. Bytes pass each direction one after the
other, at its bandwidth, whichever connection they belong to; a line carries both ways at once. A
request reaches the server half a round trip later, an answer the device, and opening a connection
takes a whole one, with TLS one more. What the server needs for its answer comes on top; what
loopback needs for the bytes does not.

The model leaves out

- slow start and congestion control: a connection has the whole bandwidth from its first byte on,
  so that short exchanges on a long, fast line come out too fast;
- congestion: nobody but this transport is on the line, and its queues are endless;
- how losses add up: an exchange of any length loses one packet at most, waits for it ahead of the
  answer, and sends no byte twice;
- the headers of TCP and IP, and the bytes of TLS: the line carries what the meter counts;
- connections that fail, and the resolution of names: both take the time that they take here.

A sender that pauses in the middle of a message is given the pause as if it had been sending: the
message takes its pauses or its transmission, whichever is longer.
"""

from __future__ import annotations

import math
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Final

from protocol.errors import FieldValue, InvalidField

_EXAMPLE: Final = "for example 20mbit/5mbit,50ms,jitter=10ms,loss=0.01"

_LEAST_BPS, _MOST_BPS = 1e3, 1e12

_LONGEST_S = 60.0

_LEAST_RETRANSMISSION_S = 0.2  # Linux waits no shorter for an acknowledgement

_PIECE_S = 0.005  # of a line's time in one piece: connections take turns at this pace

_LEAST_PIECE_BYTES = 1500  # one packet

_BANDWIDTH_UNITS: Final = {"gbit": 9, "mbit": 6, "kbit": 3}  # powers of ten of a bit a second

_TIME_UNITS: Final = {"s": 0, "ms": -3}  # powers of ten of a second

_OPTIONS: Final = ("jitter", "loss", "seed")


@dataclass(frozen=True)
class Link:
    """What a line is like, seen from the device.

    Attributes:
        down_bps: bits a second from the server, 1e3 to 1e12.
        up_bps: bits a second to the server, likewise.
        rtt_s: seconds of a round trip, at most 60.
        jitter_s: the most seconds that an exchange takes longer, drawn uniformly; at most 60.
        loss: the probability that an exchange loses a packet, which costs `retransmission_s`.
        seed: of the draws, below 2^63. Devices with the same seed draw the same.

    Raises:
        InvalidField: a value out of its range.
    """

    down_bps: float
    up_bps: float
    rtt_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require("down", self.down_bps, _LEAST_BPS, _MOST_BPS)
        _require("up", self.up_bps, _LEAST_BPS, _MOST_BPS)
        _require("latency", self.rtt_s, 0.0, _LONGEST_S)
        _require("jitter", self.jitter_s, 0.0, _LONGEST_S)
        _require("loss", self.loss, 0.0, 1.0)
        _require("seed", self.seed, 0, 2**63 - 1)

    @classmethod
    def parse(cls, text: str) -> Link:
        """The link of a text such as ``20mbit,50ms``, the inverse of `str`.

        The text is ``DOWN[/UP][,LATENCY][,jitter=TIME][,loss=FRACTION][,seed=NUMBER]``. Without
        ``UP`` both directions are equal. A bandwidth ends in kbit, mbit or gbit (a second), a
        time in ms or s. The latency is that of a round trip.

        Raises:
            InvalidField: the text is of another form, or a value out of its range.
        """
        bandwidth, *rest = [part.strip() for part in text.lower().split(",")]
        down, slash, up = bandwidth.partition("/")
        down_bps = _quantity("down", down, _BANDWIDTH_UNITS)
        up_bps = _quantity("up", up, _BANDWIDTH_UNITS) if slash else down_bps
        rtt_s = 0.0
        if rest and "=" not in rest[0]:
            rtt_s = _quantity("latency", rest.pop(0), _TIME_UNITS)
        options = _options(rest)
        return cls(
            down_bps,
            up_bps,
            rtt_s,
            _quantity("jitter", options["jitter"], _TIME_UNITS) if "jitter" in options else 0.0,
            _quantity("loss", options["loss"], {"": 0}) if "loss" in options else 0.0,
            _whole("seed", options["seed"]) if "seed" in options else 0,
        )

    def __str__(self) -> str:
        parts = [_bandwidth(self.down_bps), f"{_plain(self.rtt_s, 3)}ms"]
        if self.up_bps != self.down_bps:
            parts[0] += f"/{_bandwidth(self.up_bps)}"
        if self.jitter_s:
            parts.append(f"jitter={_plain(self.jitter_s, 3)}ms")
        if self.loss:
            parts.append(f"loss={_plain(self.loss, 0)}")
        if self.seed:
            parts.append(f"seed={self.seed}")
        return ",".join(parts)

    @property
    def retransmission_s(self) -> float:
        """Seconds until TCP sends a packet again: two round trips, at least 200 ms."""
        return max(_LEAST_RETRANSMISSION_S, 2 * self.rtt_s)


class Direction:
    """One direction of a line. Bytes pass it in the order in which they ask to."""

    def __init__(self, bps: float) -> None:
        self._bps = bps
        self._free_at = -math.inf
        self._lock = threading.Lock()
        self.piece_bytes = max(_LEAST_PIECE_BYTES, int(bps * _PIECE_S / 8))

    def pass_at(self, ready_at: float, count: int) -> float:
        """When ``count`` bytes have passed that are there from ``ready_at`` on, in seconds."""
        with self._lock:
            self._free_at = max(ready_at, self._free_at) + count * 8 / self._bps
            return self._free_at


class Line:
    """A link in use: its two directions and its draws, for all connections of a transport.

    Args:
        link: what it is like.
        clock: seconds that never go back.
        sleep: waits for so many of them.
    """

    def __init__(
        self,
        link: Link,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.link = link
        self.clock = clock
        self.up, self.down = Direction(link.up_bps), Direction(link.down_bps)
        self._sleep = sleep
        self._random = random.Random(link.seed)  # noqa: S311 - a benchmark, no secret
        self._lock = threading.Lock()

    def wait_until(self, due: float) -> None:
        """Sleep until the clock shows ``due``, not at all if it does."""
        left = due - self.clock()
        if left > 0:
            self._sleep(left)

    @contextmanager
    def opening(self, round_trips: int) -> Iterator[None]:
        """What is done within, the opening of a connection, takes so many round trips."""
        started = self.clock()
        yield
        self.wait_until(started + round_trips * self.link.rtt_s)

    def exchange(self) -> Exchange:
        """An exchange that begins now."""
        return Exchange(self)

    def draw_delay(self) -> float:
        """Seconds by which jitter and loss hold one exchange up."""
        with self._lock:  # and always two draws, so that loss does not change the jitter
            jitter, luck = self._random.random(), self._random.random()
        lost = luck < self.link.loss
        return jitter * self.link.jitter_s + (self.link.retransmission_s if lost else 0.0)


class Exchange:
    """One request and its answer on a line.

    Latency stands ahead of the bytes in both directions: no byte asks for its turn before it
    could have come, so that a late one holds nobody up. A direction's bytes follow each other
    without a gap, however late a sleep ends or loopback delivers.
    """

    def __init__(self, line: Line) -> None:
        self._line = line
        self._up_at = line.clock() + line.link.rtt_s / 2
        self._down_at: float | None = None

    def send(self, count: int) -> None:
        """Wait until ``count`` more bytes of the request have come to the server."""
        self._line.wait_until(self._up_at)
        self._up_at = self._line.up.pass_at(self._up_at, count)
        self._line.wait_until(self._up_at)

    def receive(self, count: int) -> None:
        """Wait until ``count`` bytes of the answer, which have just been read, would be here."""
        if self._down_at is None:
            delay = self._line.link.rtt_s / 2 + self._line.draw_delay()
            self._down_at = self._line.clock() + delay
            self._line.wait_until(self._down_at)
        self._down_at = self._line.down.pass_at(self._down_at, count)
        self._line.wait_until(self._down_at)


def _invalid(message: str, part: str, limit: FieldValue, value: FieldValue) -> InvalidField:
    return InvalidField(message, field=f"link.{part}", limit=limit, value=value, hint=_EXAMPLE)


def _require(part: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:  # NaN too
        raise _invalid(f"the link's {part} is out of range", part, [least, most], value)


def _quantity(part: str, text: str, units: Mapping[str, int]) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([a-z]*)", text)
    if match is None or match[2] not in units:
        forms = [f"NUMBER{unit}" for unit in units]
        raise _invalid(f"the link's {part} has another form", part, forms, text)
    return float(Decimal(match[1]).scaleb(units[match[2]]))


def _whole(part: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", text):
        raise _invalid(f"the link's {part} is a whole number", part, "up to 19 digits", text)
    return int(text)


def _options(parts: list[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in parts:
        name, _, value = part.partition("=")
        if name not in _OPTIONS:
            raise _invalid("a link has no such part", "options", list(_OPTIONS), part)
        if name in options:
            raise _invalid(f"the link's {name} is given twice", name, "once", part)
        options[name] = value
    return options


def _bandwidth(bps: float) -> str:
    unit = next(unit for unit, power in _BANDWIDTH_UNITS.items() if bps >= 10**power)
    return f"{_plain(bps, -_BANDWIDTH_UNITS[unit])}{unit}"


def _plain(value: float, power: int) -> str:
    """``value`` times ten to ``power`` in digits, none of them lost and none too many."""
    return format(Decimal(repr(abs(float(value)))).scaleb(power).normalize(), "f")
