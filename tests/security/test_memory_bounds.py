"""Small requests that cost much memory or time, and what stops them."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from protocol.codecs import get_codec
from protocol.frames import encode_frame, join_frame
from protocol.wire import PROTOCOL_VERSION, VERSION_HEADER
from tests.support.federation import run_settings, smashed
from tests.support.server import (
    ApiClient,
    RunningServer,
    code_of,
    joined,
    measured,
    running_server,
    wait_until,
)

MIB = 1024 * 1024

QUEUE_MIB = 8


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("bounded")
    with running_server(folder, queue_mib=QUEUE_MIB, stall_timeout_s=1.0) as running:
        yield running


@pytest.fixture(scope="module")
def run(server: RunningServer) -> str:
    return server.operator().create(run_settings(min_participants=2), key="bounds").id


@pytest.fixture(scope="module")
def member(server: RunningServer, run: str) -> ApiClient:
    api = joined(server, run, "a")
    joined(server, run, "b")
    return api


def bomb(codec: str, samples: int) -> bytes:
    zeros = torch.zeros(samples, 7, 192)
    frame = encode_frame("infer", {"step": "s", "round": 1}, {"smashed": (zeros, codec)})
    return bytes(join_frame(frame))


@pytest.mark.parametrize("codec", ["svd:1", "topk:0.000001", "float32+zstd"])
def test_many_small_frames_that_decode_to_much_take_bounded_memory(
    server: RunningServer, run: str, member: ApiClient, codec: str
) -> None:
    """Tried: 24 frames of a few hundred bytes at once, each of 3 MiB once it is decoded. Stopped
    by: the codec's declared size is counted against queue_mib before a byte is decoded."""
    content = bomb(codec, 3 * MIB // (4 * 7 * 192))
    assert len(content) < 4096
    token = member.http.headers["authorization"].removeprefix("Bearer ")
    answers: list[str] = []

    def ask(api: ApiClient) -> None:
        answer = api.call("POST", "/v1/split/infer", content=content)
        answers.append("ok" if answer.is_success else code_of(answer))

    threads = [threading.Thread(target=ask, args=(server.api(token),)) for _ in range(24)]
    for thread in threads:
        thread.start()
    services = server.server._application.services
    assert services is not None
    peak = 0
    while any(thread.is_alive() for thread in threads):
        peak = max(peak, services.body_budget.taken)
        time.sleep(0.001)
    assert set(answers) <= {"ok", "busy"}
    ask(member)
    assert answers[-1] == "ok", "one alone is served"
    assert 3 * MIB < peak < (QUEUE_MIB + 4) * MIB  # a response is a little longer than expected
    wait_until(lambda: server_taken(server) == 0)
    assert member.step("infer", smashed(), "after").is_success


def server_taken(server: RunningServer) -> float:
    return measured(server)["sfprompt_requests_bytes", frozenset()]


def request_of(member: ApiClient, content: bytes, length: int | None = None) -> bytes:
    lines = [
        "POST /v1/split/infer HTTP/1.1",
        "host: x",
        f"{VERSION_HEADER}: {PROTOCOL_VERSION}",
        f"authorization: {member.http.headers['authorization']}",
        f"content-length: {len(content) if length is None else length}",
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def most_taken_unread(server: RunningServer, member: ApiClient, content: bytes) -> float:
    """Send two requests whose responses nobody reads; return the most bytes that they took."""
    most, give_up_at, count_at = 0.0, time.monotonic() + 60, time.monotonic() + 6
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.sendall(request_of(member, content))
        while (taken := server_taken(server)) or time.monotonic() < count_at:
            assert time.monotonic() < give_up_at, f"{taken} bytes stay taken"
            most = max(most, taken)
            if most and not taken:
                break
    return most


def test_responses_that_nobody_reads_are_counted_and_given_up(
    server: RunningServer, member: ApiClient
) -> None:
    """Tried: requests of a few hundred bytes whose responses of 8 MB stay unread. Stopped by: a
    response is counted before it is computed and until it was taken; the connection of a client
    that takes nothing is closed after stall_timeout_s."""
    content = bomb("svd:1", 8 * MIB // (4 * 7 * 192))
    # A busy machine may compute a response and give it up between two looks at the metrics.
    assert any(most_taken_unread(server, member, content) > 5 * MIB for _ in range(4))
    assert member.step("infer", smashed(), "after-unread").is_success


def test_a_body_that_stops_one_byte_short_blocks_nobody_for_long(
    server: RunningServer, member: ApiClient
) -> None:
    """Tried: two bodies that fill the budget and stop before their last byte. Stopped by: a body
    that has stalled gives way to other requests after two seconds, and ends after
    stall_timeout_s."""
    size = 5 * MIB
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            with contextlib.suppress(OSError):  # refused while it was sent
                one.sendall(request_of(member, bytes(size - 1), size))
        began = time.monotonic()
        wait_until(lambda: member.step("infer", smashed(), "beside").is_success, 10)
        assert time.monotonic() - began < 5


def test_a_body_that_trickles_is_given_up(server: RunningServer, member: ApiClient) -> None:
    """Tried: a body of 1 MB, ten bytes a second. Stopped by: 10 KiB have to come in the time of
    a stall."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as one:
        one.sendall(request_of(member, b"x" * 100, 1_000_000))
        answered = threading.Event()

        def trickle() -> None:
            while not answered.wait(0.1):
                try:
                    one.sendall(b"x")
                except OSError:
                    return

        sender = threading.Thread(target=trickle)
        sender.start()
        began = time.monotonic()
        answer = one.recv(65536)
        answered.set()
        sender.join()
    assert b"malformed_frame" in answer or b" 400 " in answer
    assert time.monotonic() - began < 5


def test_a_hostile_klt_frame_costs_no_more_than_its_decoded_size(tmp_path: Path) -> None:
    """Tried: entropy-coded columns of zeros, 2,800 codes in two bytes. Stopped by: a gather from
    a table for each code; the codes are at most as many as the decoded elements, which count."""
    tokens = torch.zeros(20_000, 8, 48)
    tokens[0, 0, 0] = 1.0
    codec = get_codec("klt:1")
    buffers = [memoryview(bytearray(part)) for part in codec.encode(tokens)]
    began = time.process_time()
    codec.decode(buffers, tokens.shape)
    assert time.process_time() - began < 3


def test_a_damaged_state_is_named_and_not_sent(server: RunningServer, run: str) -> None:
    """Tried: a bit of a state's file changes on the server's disk. Stopped by: the file is
    checked against its hash before its first byte is sent."""
    operator = server.operator()
    state = operator.call("GET", f"/v1/runs/{run}").json()["state"]["sha256"]
    services = server.server._application.services
    assert services is not None
    path = services.runs.files(run).state(state)
    whole = path.read_bytes()
    assert operator.call("GET", f"/v1/runs/{run}/states/{state}/state").content == whole
    try:
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        answer = operator.call("GET", f"/v1/runs/{run}/states/{state}/state")
        assert (answer.status_code, code_of(answer)) == (500, "damaged_file")
        assert state in answer.json()["error"]["value"]
    finally:
        path.write_bytes(whole)
