"""What a broken or hostile server tries on a device, and what stops it."""

import resource

import httpx
import pytest
import torch

from edge_client.transport.client import Server
from edge_client.transport.http_transport import MeteredTransport
from edge_client.transport.retry import RetryPolicy
from protocol.errors import SFPromptError, TooLarge, Unreachable
from tests.support.edge import Connection, RawServer


def talk(answer: bytes, *, then_close: bool = True) -> SFPromptError:
    """The typed error with which the device refuses this answer to its first request."""

    def serve(connection: Connection) -> None:
        connection.request()
        connection.send(answer)
        if not then_close:
            connection.receive()

    with RawServer(serve) as raw:
        server = Server(raw.url, retry=RetryPolicy(patience_s=0), response_timeout_s=1)
        with pytest.raises(SFPromptError) as caught:
            server.runs()
        server.close()
        assert len(raw.connections) == 1
    return caught.value


@pytest.mark.parametrize("length", [2**28 + 1, 10**15, 10**30])
def test_a_declared_length_takes_no_memory(length: int) -> None:
    """Tried: a server announces an answer of up to 10^30 bytes. Stopped by: the device's limit of
    an answer, before memory is taken."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = talk(f"HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n".encode())
    assert isinstance(error, TooLarge)
    assert (error.limit, error.value) == (2**28, length)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


def test_a_body_without_end_is_cut_off() -> None:
    """Tried: a server sends chunks without end. Stopped by: the limit of an answer, counted as they
    arrive."""

    def endless(connection: Connection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while True:
            connection.send(b"10000\r\n" + bytes(65536) + b"\r\n")

    transport = MeteredTransport(max_body_bytes=4 << 20)
    with RawServer(endless) as server, httpx.Client(transport=transport) as client:
        with pytest.raises(TooLarge):
            client.get(server.url)
        assert transport.traffic().total() < 16 << 20


@pytest.mark.parametrize(
    "chunks",
    [b"0\r\n" + b"a: b\r\n" * 50_000, b"0\r\nx: " + b"y" * 300_000, b"2;" + b"e" * 300_000],
    ids=["trailers", "a trailer", "an extension"],
)
def test_chunk_extensions_and_trailers_are_limited(chunks: bytes) -> None:
    """Tried: a server hides endless bytes in trailers and chunk extensions. Stopped by: the limit
    of the parser's buffer."""
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    assert isinstance(talk(head + chunks, then_close=False), Unreachable)


@pytest.mark.parametrize(
    "answer",
    [
        b"220 smtp ready\r\n",
        b"\x16\x03\x01\x00\x05hello",
        b"HTTP/1.1 999999 Strange\r\n\r\n",
        b"HTTP/1.1 two hundred\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nbody\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n-5\r\nbody\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"f" * 30 + b"\r\nx",
        b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1" + b"0" * 5000 + b"\r\n\r\n[]",
        b"",
    ],
)
def test_a_response_that_is_not_http_is_a_typed_error(answer: bytes) -> None:
    """Tried: a server answers in another protocol, or with broken HTTP. Stopped by: a typed error,
    never a traceback."""
    assert isinstance(talk(answer), (Unreachable, TooLarge))


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\ncontent-length: " + b"0" * 5000 + b"1\r\n\r\n{",
        b"HTTP/1.1 150 x\r\ncontent-length: 9\r\n\r\nsomething" + b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\nx-\xff\xfe: \xff\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\n : x\r\ncontent-length: 1\r\n\r\n{",
        b"HTTP/1.1 302 x\r\ncontent-length: 0\r\nlocation: http://[\r\n\r\n",
        b"HTTP/1.1 503 x\r\ncontent-length: 2\r\nretry-after: 1e999\r\n\r\n{}",
        b'HTTP/1.1 400 x\r\ncontent-length: 31\r\n\r\n{"error": {"code": ["x", {}, 5]}}',
        b"HTTP/1.1 500 x\r\ncontent-length: 200000\r\n\r\n" + b"[" * 200_000,
    ],
)
def test_odd_answers_are_typed_errors(answer: bytes) -> None:
    """Tried: lengths, headers, redirects and JSON that no server sends, among them JSON nested
    200,000 deep. Stopped by: each is a typed error."""
    talk(answer)


def test_a_server_that_sends_too_slowly_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried: a server stops in the middle of a header. Stopped by: the time-out of an answer."""
    error = talk(b"HTTP/1.1 200 OK\r\ncontent-le", then_close=False)
    assert isinstance(error, Unreachable)
    assert "no response within 1 s" in str(error)


def test_an_answer_to_another_question_is_not_read_as_the_next() -> None:
    """Tried: a server adds a second answer behind the first, for the next question. Stopped by:
    surplus bytes are dropped."""

    def serve(connection: Connection) -> None:
        for _ in range(3):
            connection.request()
            smuggled = b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n[evil]"
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]" + smuggled)

    with RawServer(serve) as raw:
        server = Server(raw.url, retry=RetryPolicy(patience_s=0), response_timeout_s=1)
        assert [server.runs() for _ in range(3)] == [[], [], []]
        server.close()


def test_non_finite_features_do_not_crash_the_device() -> None:
    """Tried: a server sends features that are NaN. Stopped by: the device declines the round."""
    from edge_client.training.context import Diverged
    from edge_client.training.split_training import split_train
    from tests.support.edge import BodyServer, round_context

    class Poisoned(BodyServer):
        def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
            return super().forward(*args, **kwargs).fill_(torch.nan)

    context = round_context(optimizer="sgd")
    with pytest.raises(Diverged, match="diverged"):
        split_train(context, Poisoned().plane, torch.arange(4))
