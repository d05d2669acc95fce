"""A simulated link: the device waits as long as a real line would take.

A `Link` describes a line; a `Line` is a link in use. The bytes of all connections pass each
direction in turn, at its bandwidth; both directions work at the same time. Request and response
take half a round trip each, opening a connection takes one round trip, with TLS one more. The
server's computing time is added; the time of loopback is not.

The model leaves out

- slow start and congestion control: a connection has the full bandwidth from its first byte, so
  short exchanges on a long, fast line are too fast;
- congestion: only this transport uses the line, and its queues have no limit;
- several losses: an exchange of any length loses at most one packet, waits for it before the
  response, and sends no byte twice;
- headers of TCP and IP, and TLS's own bytes: the line carries the counted bytes;
- failing connections and name resolution: both take their real time.

A pause of the sender within a message counts as transmission: the message takes the longer of its
pauses and its transmission.
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

_MIN_BPS, _MAX_BPS = 1e3, 1e12

_MAX_DELAY_S = 60.0

_MIN_RETRANSMISSION_S = 0.2  # Linux's minimal retransmission timeout

_PIECE_S = 0.005  # a piece's time on the line; connections take turns piece by piece

_MIN_PIECE_BYTES = 1500  # one packet

_BANDWIDTH_UNITS: Final = {"gbit": 9, "mbit": 6, "kbit": 3}  # powers of ten, of 1 bit/s

_TIME_UNITS: Final = {"s": 0, "ms": -3}  # powers of ten, of 1 s

_OPTIONS: Final = ("jitter", "loss", "seed")


@dataclass(frozen=True)
class Link:
    """The properties of a line, seen from the device.

    Attributes:
        down_bps: bits per second from the server, 1e3 to 1e12.
        up_bps: bits per second to the server, 1e3 to 1e12.
        rtt_s: seconds of a round trip, at most 60.
        jitter_s: upper limit of an exchange's uniformly drawn extra seconds, at most 60.
        loss: probability that an exchange loses a packet, which takes `retransmission_s`.
        seed: of the draws, below 2^63. Devices with the same seed draw the same numbers.

    Raises:
        InvalidField: a value is out of its range.
    """

    down_bps: float
    up_bps: float
    rtt_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_range("down", self.down_bps, _MIN_BPS, _MAX_BPS)
        _check_range("up", self.up_bps, _MIN_BPS, _MAX_BPS)
        _check_range("latency", self.rtt_s, 0.0, _MAX_DELAY_S)
        _check_range("jitter", self.jitter_s, 0.0, _MAX_DELAY_S)
        _check_range("loss", self.loss, 0.0, 1.0)
        _check_range("seed", self.seed, 0, 2**63 - 1)

    @classmethod
    def parse(cls, text: str) -> Link:
        """Parse a text such as ``20mbit,50ms``; the inverse of `str`.

        The form is ``DOWN[/UP][,LATENCY][,jitter=TIME][,loss=FRACTION][,seed=NUMBER]``. Without
        ``UP`` both directions are equal. A bandwidth ends in kbit, mbit or gbit (per second), a
        time in ms or s. The latency is a round trip's.

        Raises:
            InvalidField: the text has another form, or a value is out of its range.
        """
        bandwidth, *rest = [part.strip() for part in text.lower().split(",")]
        down, slash, up = bandwidth.partition("/")
        down_bps = _parse_quantity("down", down, _BANDWIDTH_UNITS)
        up_bps = _parse_quantity("up", up, _BANDWIDTH_UNITS) if slash else down_bps
        rtt_s = 0.0
        if rest and "=" not in rest[0]:
            rtt_s = _parse_quantity("latency", rest.pop(0), _TIME_UNITS)
        options = _parse_options(rest)
        return cls(
            down_bps,
            up_bps,
            rtt_s,
            _parse_quantity("jitter", options["jitter"], _TIME_UNITS)
            if "jitter" in options
            else 0.0,
            _parse_quantity("loss", options["loss"], {"": 0}) if "loss" in options else 0.0,
            _parse_integer("seed", options["seed"]) if "seed" in options else 0,
        )

    def __str__(self) -> str:
        parts = [_format_bandwidth(self.down_bps), f"{_format_digits(self.rtt_s, 3)}ms"]
        if self.up_bps != self.down_bps:
            parts[0] += f"/{_format_bandwidth(self.up_bps)}"
        if self.jitter_s:
            parts.append(f"jitter={_format_digits(self.jitter_s, 3)}ms")
        if self.loss:
            parts.append(f"loss={_format_digits(self.loss, 0)}")
        if self.seed:
            parts.append(f"seed={self.seed}")
        return ",".join(parts)

    @property
    def retransmission_s(self) -> float:
        """Seconds until TCP retransmits a packet: two round trips, at least 200 ms."""
        return max(_MIN_RETRANSMISSION_S, 2 * self.rtt_s)


class Direction:
    """One direction of a line; calls of `pass_at` pass it one after the other."""

    def __init__(self, bps: float) -> None:
        self._bps = bps
        self._free_at = -math.inf
        self._lock = threading.Lock()
        self.piece_bytes = max(_MIN_PIECE_BYTES, int(bps * _PIECE_S / 8))

    def pass_at(self, ready_at: float, count: int) -> float:
        """Return when ``count`` bytes, ready at ``ready_at``, have passed; times in seconds."""
        with self._lock:
            self._free_at = max(ready_at, self._free_at) + count * 8 / self._bps
            return self._free_at


class Line:
    """A link in use: its two directions and its draws, for all connections of a transport.

    Args:
        link: the line's properties.
        clock: monotonic time in seconds.
        sleep: waits for a number of seconds.
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
        self._random = random.Random(link.seed)  # noqa: S311 - not a secret
        self._lock = threading.Lock()

    def wait_until(self, due: float) -> None:
        """Sleep until the time ``due``; return at once if it has passed."""
        left = due - self.clock()
        if left > 0:
            self._sleep(left)

    @contextmanager
    def opening(self, round_trips: int) -> Iterator[None]:
        """Make the block, which opens a connection, take at least so many round trips."""
        started = self.clock()
        yield
        self.wait_until(started + round_trips * self.link.rtt_s)

    def exchange(self) -> Exchange:
        """Start an exchange now."""
        return Exchange(self)

    def draw_delay(self) -> float:
        """Draw the seconds by which jitter and loss delay one exchange."""
        with self._lock:  # always two draws, so that the loss setting does not change the jitter
            jitter, draw = self._random.random(), self._random.random()
        is_lost = draw < self.link.loss
        return jitter * self.link.jitter_s + (self.link.retransmission_s if is_lost else 0.0)


class Exchange:
    """One request and its response on a line.

    In both directions the latency comes before the bytes: bytes occupy the line only when they
    could have arrived, so that late ones do not delay other connections. A direction's bytes
    follow each other without a gap, however late a sleep ends or loopback delivers.
    """

    def __init__(self, line: Line) -> None:
        self._line = line
        self._up_at = line.clock() + line.link.rtt_s / 2
        self._down_at: float | None = None

    def send(self, count: int) -> None:
        """Wait until ``count`` more bytes of the request have reached the server."""
        self._line.wait_until(self._up_at)
        self._up_at = self._line.up.pass_at(self._up_at, count)
        self._line.wait_until(self._up_at)

    def receive(self, count: int) -> None:
        """Wait until ``count`` more bytes of the response would have reached the device."""
        if self._down_at is None:
            delay = self._line.link.rtt_s / 2 + self._line.draw_delay()
            self._down_at = self._line.clock() + delay
            self._line.wait_until(self._down_at)
        self._down_at = self._line.down.pass_at(self._down_at, count)
        self._line.wait_until(self._down_at)


def _invalid(message: str, part: str, limit: FieldValue, value: FieldValue) -> InvalidField:
    return InvalidField(message, field=f"link.{part}", limit=limit, value=value, hint=_EXAMPLE)


def _check_range(part: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # NaN too
        raise _invalid(f"the link's {part} is out of range", part, [low, high], value)


def _parse_quantity(part: str, text: str, units: Mapping[str, int]) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([a-z]*)", text)
    if match is None or match[2] not in units:
        forms = [f"NUMBER{unit}" for unit in units]
        raise _invalid(f"the link's {part} has another form", part, forms, text)
    return float(Decimal(match[1]).scaleb(units[match[2]]))


def _parse_integer(part: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", text):
        raise _invalid(f"the link's {part} has to be an integer", part, "up to 19 digits", text)
    return int(text)


def _parse_options(parts: list[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in parts:
        name, _, value = part.partition("=")
        if name not in _OPTIONS:
            raise _invalid("a link has no such option", "options", list(_OPTIONS), part)
        if name in options:
            raise _invalid(f"the link's {name} is given twice", name, "once", part)
        options[name] = value
    return options


def _format_bandwidth(bps: float) -> str:
    unit = next(unit for unit, power in _BANDWIDTH_UNITS.items() if bps >= 10**power)
    return f"{_format_digits(bps, -_BANDWIDTH_UNITS[unit])}{unit}"


def _format_digits(value: float, power: int) -> str:
    """Write ``value`` times ten to ``power`` in the fewest digits that keep it exact."""
    return format(Decimal(repr(abs(float(value)))).scaleb(power).normalize(), "f")
