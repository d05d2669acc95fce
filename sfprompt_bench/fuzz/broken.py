"""Requests on a bare socket that break HTTP: what a server must refuse, or end, in time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final

from sfprompt_bench.fuzz.mutations import mutated_bytes
from sfprompt_bench.fuzz.target import Request, Target
from sfprompt_bench.fuzz.wire import Closed, RawConnection, Response

_MIB: Final = 1024 * 1024

_PIECE: Final = 256 * 1024

SLOW_S: Final = 8.0  # until a request that stops short is refused or its connection is closed

MAX_UNREAD: Final = 16 * _MIB  # of a giant head: what the buffers of the sockets hold

Case = Callable[[Target, list[Request], random.Random], tuple[str, list[Response]]]


class Misbehaved(Exception):
    """The server did what it must not do."""


def broken_request(
    target: Target, valid: list[Request], draws: random.Random
) -> tuple[str, list[Response]]:
    """Send something broken; returns its name and the responses.

    Raises:
        Misbehaved: the server answered wrongly, or not in time.
    """
    return draws.choice(_QUICK)(target, valid, draws)


def slow_request(
    target: Target, valid: list[Request], draws: random.Random
) -> tuple[str, list[Response]]:
    """Send a part of a request and stop, or go on a byte at a time.

    Raises:
        Misbehaved: the connection is still open after `SLOW_S`.
    """
    data = draws.choice(valid).to_bytes()
    head = data.index(b"\r\n\r\n") + 4
    stop = draws.choice((0, 1, draws.randrange(head), head, draws.randrange(len(data)))) % len(data)
    drips = draws.random() < 0.5
    name = f"{'slow' if drips else 'stopped'} after {stop} of {len(data)} bytes"
    connection = RawConnection(target.address, timeout_s=0.2)
    try:
        connection.send(data[:stop])
        deadline = time.monotonic() + SLOW_S
        while time.monotonic() < deadline:
            if drips and stop < len(data) - 1:
                connection.send(data[stop : stop + 1])
                stop += 1
            try:
                return name, [connection.response()]
            except TimeoutError:
                continue
            except Closed:
                return name, []
    finally:
        connection.close()
    raise Misbehaved(f"{name}: the connection is open after {SLOW_S:g} s")


def giant_head(target: Target, size: int, *, in_url: bool) -> int:
    """Send a URL or a header of ``size`` bytes; returns how many the server let in.

    Raises:
        Misbehaved: it took more than `MAX_UNREAD` bytes, or did not close the connection.
    """
    connection = RawConnection(target.address, timeout_s=10)
    try:
        begin = b"GET /" if in_url else b"GET /v1/health HTTP/1.1\r\nhost: x\r\nx-giant: "
        sent = connection.send(begin)
        piece = b"a" * _PIECE
        while sent < size:
            count = connection.send(piece)
            sent += count
            if count < len(piece):
                break
        if sent > MAX_UNREAD:
            raise Misbehaved(f"the server took {sent / _MIB:.0f} MiB of a head")
        return sent
    except TimeoutError:
        raise Misbehaved("the server neither reads a giant head nor closes") from None
    finally:
        connection.close()


def _talk(
    target: Target, data: bytes | bytearray, count: int = 1, *, ends: bool = False
) -> list[Response]:
    """Send bytes and read up to ``count`` responses, until the server closes."""
    connection = RawConnection(target.address, timeout_s=SLOW_S)
    responses: list[Response] = []
    try:
        connection.send(data)
        if ends:
            connection.end()
        while len(responses) < count:
            responses += [connection.response(to_head=data.startswith(b"HEAD "))]
    except Closed:
        pass
    except TimeoutError:
        raise Misbehaved(f"neither a response nor an end in {SLOW_S:g} s") from None
    except ValueError as error:
        raise Misbehaved(f"a response that is not HTTP: {error}") from None
    finally:
        connection.close()
    return responses


def _noise(target: Target, _: list[Request], draws: random.Random) -> tuple[str, list[Response]]:
    data = draws.choice(
        (
            draws.randbytes(draws.randrange(1, 300)),
            b"\r\n" * draws.randrange(1, 40_000),
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + draws.randbytes(50),
            b"GET /v1/health\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"GET " + b"\x00" * 20 + b" HTTP/1.1\r\n\r\n",
        )
    )
    return "noise", _talk(target, data, ends=True)


def _changed(
    target: Target, valid: list[Request], draws: random.Random
) -> tuple[str, list[Response]]:
    data = mutated_bytes(draws.choice(valid).to_bytes(), draws)
    return "changed bytes", _talk(target, data, ends=True)


def _large_head(
    target: Target, _: list[Request], draws: random.Random
) -> tuple[str, list[Response]]:
    size = draws.choice((8_000, 31_000, 33_000, 200_000, 2_000_000))
    line = b"GET /v1/health HTTP/1.1\r\nhost: x\r\n"
    data = draws.choice(
        (
            b"GET /v1/health?" + b"a" * size + b" HTTP/1.1\r\nhost: x\r\n\r\n",
            b"A" * size + b" / HTTP/1.1\r\n\r\n",
            line + b"x: " + b"a" * size + b"\r\n\r\n",
            line + b"x" * size + b": a\r\n\r\n",
            line + b"".join(b"x-%d: a\r\n" % number for number in range(size // 12)) + b"\r\n",
            line + b"x: a\r\n " + b"a" * size + b"\r\n\r\n",
        )
    )
    responses = _talk(target, data)
    if size > 40_000 and any(response.status < 400 for response in responses):
        raise Misbehaved(f"a head of {size} bytes was accepted")
    return f"head of {size} bytes", responses


def _lengths(
    target: Target, valid: list[Request], draws: random.Random
) -> tuple[str, list[Response]]:
    request = draws.choice([each for each in valid if each.body])
    head, _, body = request.to_bytes().partition(b"\r\n\r\n")
    length = b"content-length: %d" % len(body)
    wrong = draws.choice(
        (
            b"content-length: %d" % (len(body) + draws.choice((1, 5000))),
            b"content-length: %d" % max(0, len(body) - draws.choice((1, 7))),
            b"content-length: -1",
            b"content-length: 0x10",
            b"content-length: +5",
            b"content-length: " + b"9" * draws.choice((17, 19, 30, 4000)),
            b"content-length: %d" % 2**64,
            b"content-length: 5, 5",
            b"content-length: ",
            length + b"\r\n" + length,
            length + b"\r\ncontent-length: 0",
            length + b"\r\ntransfer-encoding: chunked",
            b"transfer-encoding: chunked, identity",
            b"transfer-encoding: gzip",
            b"x: y",
        )
    )
    data = head.replace(length, wrong) + b"\r\n\r\n" + body
    return f"length {wrong[:40]!r}", _talk(target, data, 2, ends=True)


def _chunks(
    target: Target, valid: list[Request], draws: random.Random
) -> tuple[str, list[Response]]:
    request = draws.choice([each for each in valid if each.body])
    head, _, body = request.to_bytes().partition(b"\r\n\r\n")
    head = head.replace(b"content-length: %d" % len(body), b"transfer-encoding: chunked")
    size = b"%x" % len(body)
    whole = size + b"\r\n" + body + b"\r\n"
    sent = draws.choice(
        (
            whole + b"0\r\n\r\n",
            b"".join(b"1\r\n%c\r\n" % byte for byte in body[:2000]) + b"0\r\n\r\n",
            whole,
            size + b";" + b"e" * 300_000 + b"\r\n" + body + b"\r\n0\r\n\r\n",
            whole + b"0\r\n" + b"x: y\r\n" * 50_000 + b"\r\n",
            whole + b"0\r\nx: " + b"y" * 300_000 + b"\r\n\r\n",
            b"-1\r\n" + body,
            b"f" * 17 + b"\r\n" + body,
            b"zz\r\n" + body,
            bytes(mutated_bytes(whole + b"0\r\n\r\n", draws)),
        )
    )
    return "chunks", _talk(target, head + b"\r\n\r\n" + sent, ends=True)


def _pipeline(
    target: Target, valid: list[Request], draws: random.Random
) -> tuple[str, list[Response]]:
    plain = [each for each in valid if each.method == "GET" and "wait" not in each.path]
    count = draws.choice((2, 5, 15, 2000))
    requests = [draws.choice(plain) for _ in range(count)]
    if count == 2000:
        requests = [Request("GET", "/v1/health")] * count
    responses = _talk(target, b"".join(each.to_bytes() for each in requests), count)
    if count < 16 and len(responses) != count:
        raise Misbehaved(f"{len(responses)} responses to {count} pipelined requests")
    return f"{count} pipelined requests", responses


def _short(
    target: Target, valid: list[Request], draws: random.Random
) -> tuple[str, list[Response]]:
    data = draws.choice(valid).to_bytes()
    return "a request that ends early", _talk(target, data[: draws.randrange(len(data))], ends=True)


def _abandoned(
    target: Target, valid: list[Request], draws: random.Random
) -> tuple[str, list[Response]]:
    connection = RawConnection(target.address, timeout_s=SLOW_S)
    connection.send(draws.choice(valid).to_bytes() * draws.choice((1, 3)))
    connection.close()
    return "responses that nobody reads", []


def _dialects(target: Target, _: list[Request], draws: random.Random) -> tuple[str, list[Response]]:
    lines = draws.choice(
        (
            b"GET /v1/health HTTP/1.0\r\n",
            b"GET http://x/v1/health HTTP/1.1\r\nhost: x\r\n",
            b"GET http://x HTTP/1.1\r\nhost: x\r\n",
            b"OPTIONS * HTTP/1.1\r\nhost: x\r\n",
            b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\n",
            b"get /v1/health HTTP/1.1\r\nhost: x\r\n",
            b"HEAD /v1/health HTTP/1.1\r\nhost: x\r\n",
            b"TRACE /v1/health HTTP/1.1\r\nhost: x\r\n",
            b"PATCH /v1/split/forward HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n",
            b"GET /v1/health HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n",
            b"GET /v1/health HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n",
            b"POST /v1/runs HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 2000000\r\n",
            b"GET /v1/health HTTP/9.9\r\nhost: x\r\n",
            b"GET /v1/health HTTP/1.1\r\nx\x00y: z\r\n",
            b"GET /v1/health HTTP/1.1\r\nx: a\x00b\r\n",
            b"GET /v1/runs/%00 HTTP/1.1\r\nhost: x\r\n",
            b"GET /v1/runs/%ff%fe HTTP/1.1\r\nhost: x\r\n",
            b"GET /v1/runs/\xff HTTP/1.1\r\nhost: x\r\n",
            b"GET //v1//runs/../../secret HTTP/1.1\r\nhost: x\r\n",
            b"GET /v1/runs?" + b"a=1&" * 5000 + b" HTTP/1.1\r\nhost: x\r\n",
        )
    )
    return f"dialect {lines[:30]!r}", _talk(target, lines + b"\r\n", ends=True)


_QUICK: Final[tuple[Case, ...]] = (
    _noise,
    _changed,
    _changed,
    _large_head,
    _lengths,
    _lengths,
    _chunks,
    _pipeline,
    _short,
    _abandoned,
    _dialects,
)
