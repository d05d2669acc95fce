"""The metered transport, against a server of raw sockets that counts for itself."""

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trustme

from edge_client.transport.connection import CountingSocket
from edge_client.transport.http_transport import BODY_EXTENSION, MeteredTransport
from edge_client.transport.link import Link
from protocol.errors import InvalidField, TooLarge
from protocol.traffic import Phase
from protocol.wire import FORWARD_PATH
from tests.support.edge import Connection, RawServer, answering, response
from tests.support.transport import Forgetful, Pieces, client_of, counted, server_side

BIG = 8 * 1024 * 1024


@pytest.fixture(params=[None, "1gbit,1ms"], ids=["plain", "link"])
def transport(request: pytest.FixtureRequest) -> Iterator[MeteredTransport]:
    """With a simulated link all is the same, but for the time."""
    link = Link.parse(request.param) if request.param else None
    metered = MeteredTransport(connect_timeout_s=5, link=link)
    yield metered
    metered.close()


def test_device_and_server_count_the_same_bytes(transport: MeteredTransport) -> None:
    seen = []

    def answer(request):
        seen.append(request)
        return response(b"abc" * 1000, "200 OK", "x-more: of the header")

    with RawServer(answering(answer)) as server:
        client = client_of(transport)
        assert client.get(f"{server.url}/v1/runs").content == b"abc" * 1000
        pieces = Pieces(b"one", b"", b"two" * 50_000)
        headers = {"content-length": str(3 + 150_000)}
        answer_ = client.post(f"{server.url}{FORWARD_PATH}", content=pieces, headers=headers)
        assert answer_.extensions[BODY_EXTENSION] == b"abc" * 1000
        assert answer_.headers["x-more"] == "of the header"
        client.put(f"{server.url}/v1/runs/r/update", content=b"x")
        assert counted(transport) == (server.received, server.sent)
        assert len(server.connections) == 1  # kept alive
    assert seen[1].body == b"one" + b"two" * 50_000
    assert "transfer-encoding" not in seen[1].headers
    traffic = transport.traffic()
    assert set(traffic.up) == {Phase.CONTROL, Phase.SMASHED, Phase.UPDATES}
    assert set(traffic.down) == {Phase.CONTROL, Phase.FEATURES, Phase.UPDATES}


def test_phases_are_recognised_behind_a_prefix() -> None:
    with RawServer(answering(lambda _: response())) as server:
        transport = MeteredTransport(prefix="/gpu/")
        client_of(transport).post(f"{server.url}/gpu{FORWARD_PATH}", content=b"x")
        assert set(transport.traffic().up) == {Phase.SMASHED}
        transport.close()


def test_eight_mebibytes_go_both_ways(transport: MeteredTransport) -> None:
    sent, back = bytes(range(256)) * (BIG // 256), b"\7" * BIG
    with RawServer(answering(lambda r: response(back if r.body == sent else b""))) as server:
        assert client_of(transport).post(server.url, content=sent).content == back
        assert counted(transport) == (server.received, server.sent)


def test_chunked_and_empty_answers_keep_the_connection(transport: MeteredTransport) -> None:
    chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    answers = iter(
        [
            chunked + b"4\r\nwiki\r\n6;x=y\r\npedia!\r\n0\r\n\r\n",
            chunked + b"0\r\n\r\n",
            chunked + b"1\r\na\r\n0\r\nx-trailer: b\r\n\r\n",
            b"HTTP/1.1 204 No Content\r\n\r\n",
            b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n",
            response(),
            response(b"last"),
        ]
    )
    with RawServer(answering(lambda _: next(answers))) as server:
        client = client_of(transport)
        responses = [client.get(server.url) for _ in range(7)]
        assert [received.content for received in responses] == [
            b"wikipedia!",
            b"",
            b"a",
            b"",
            b"",
            b"",
            b"last",
        ]
        assert "x-trailer" not in responses[2].headers
        assert len(server.connections) == 1
        assert counted(transport) == (server.received, server.sent)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(
    "early",
    [
        b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n",
        b"HTTP/1.1 150 Odd\r\nlink: </x>\r\ncontent-length: 2\r\n\r\nno",
    ],
)
def test_an_interim_response_is_not_the_response(
    transport: MeteredTransport, early: bytes, together: bool
) -> None:

    def serve(connection: Connection) -> None:
        while connection.request() is not None:
            for part in [early + response(b"all")] if together else [early, response(b"all")]:
                connection.send(part)
                time.sleep(0.02)

    with RawServer(serve) as server:
        client = client_of(transport)
        for _ in range(2):
            answer = client.get(server.url)
            assert (answer.status_code, answer.content) == (200, b"all")
            assert "link" not in answer.headers
        assert len(server.connections) == 1


def test_the_answer_to_head_ends_with_its_head(transport: MeteredTransport) -> None:
    answers = iter([b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", response(b"whole")])
    with RawServer(answering(lambda _: next(answers))) as server:
        client = client_of(transport)
        assert client.head(server.url).headers["content-length"] == "5"
        assert client.get(server.url).content == b"whole"
        assert len(server.connections) == 1


@pytest.mark.parametrize("value", ["a\r\nx-smuggled: 1", "a\nb", "a\rb"])
def test_a_header_of_two_lines_is_not_sent(transport: MeteredTransport, value: str) -> None:
    with RawServer(answering(lambda _: response())) as server:
        with pytest.raises(InvalidField):
            client_of(transport).get(server.url, headers={"x-mine": value})
        assert server.received == 0


def test_a_connection_with_extra_bytes_is_not_used_again(transport: MeteredTransport) -> None:
    """Bytes behind an answer belong to nobody; what follows them could be anything."""
    with RawServer(answering(lambda _: response(b"one") + response(b"two"))) as server:
        client = client_of(transport)
        assert [client.get(server.url).content for _ in range(2)] == [b"one", b"one"]
        assert len(server.connections) == 2


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 300000\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n",
    ],
)
def test_a_body_ahead_of_the_connection_s_end_is_read_whole(
    transport: MeteredTransport, head: bytes
) -> None:
    def serve(connection: Connection) -> None:
        connection.request()
        connection.send(head)
        for _ in range(3):
            connection.send(b"z" * 100_000)

    with RawServer(serve) as server:
        client = client_of(transport)
        assert client.get(server.url).content == b"z" * 300_000
        assert client.get(server.url).content == b"z" * 300_000
        assert len(server.connections) == 2
        assert counted(transport) == (server.received, server.sent)


def test_a_stale_connection_is_replaced(transport: MeteredTransport) -> None:
    serve = Forgetful(Connection.reset, lambda connection: connection.raw.close())
    with RawServer(serve) as server:
        serve.talk_to(client_of(transport), server.url)
        assert len(server.connections) == 3
        assert counted(transport) == (server.received, server.sent)  # nothing sent into the void


def test_a_stale_connection_is_replaced_once_only(transport: MeteredTransport) -> None:
    requests = []

    def serve(connection: Connection) -> None:
        requests.append(connection.request())
        if len(requests) == 1:
            connection.send(response())
            requests.append(connection.request())

    with RawServer(serve) as server:
        client = client_of(transport)
        client.get(server.url)
        with pytest.raises(httpx.ReadError):
            client.get(server.url)
        assert len(requests) == 3
        assert len(server.connections) == 2


def test_a_new_connection_that_dies_is_an_error_at_once(transport: MeteredTransport) -> None:
    with RawServer(lambda connection: connection.request()) as server:
        with pytest.raises(httpx.ReadError):
            client_of(transport).get(server.url)
        assert len(server.connections) == 1


@pytest.mark.parametrize("warm", [False, True])
def test_an_answer_that_breaks_off_is_a_read_error(transport: MeteredTransport, warm: bool) -> None:
    """Also on a kept-alive connection: part of an answer has come, so it was not stale."""

    def serve(connection: Connection) -> None:
        if warm:
            connection.request()
            connection.send(response())
        connection.request()
        connection.send(response(b"x" * 1000)[:-10])

    with RawServer(serve) as server:
        client = client_of(transport)
        if warm:
            client.get(server.url)
        with pytest.raises(httpx.ReadError, match="10 bytes are missing"):
            client.get(server.url)
        assert counted(transport) == (server.received, server.sent)
        assert len(server.connections) == 1


def test_a_chunked_answer_that_breaks_off_is_a_read_error(transport: MeteredTransport) -> None:
    def serve(connection: Connection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nff\r\nonly")

    with RawServer(serve) as server, pytest.raises(httpx.ReadError):
        client_of(transport).get(server.url)


def test_a_silent_server_is_a_read_timeout(transport: MeteredTransport) -> None:
    done = threading.Event()

    def serve(connection: Connection) -> None:
        connection.request()
        done.wait(5)

    with RawServer(serve) as server:
        with pytest.raises(httpx.ReadTimeout, match=r"0\.1 s"):
            client_of(transport, timeout=0.1).get(server.url)
        done.set()
        with pytest.raises(httpx.ReadError):  # the connection was not kept
            client_of(transport).get(server.url)


def test_a_slow_answer_is_not_a_silent_server(transport: MeteredTransport) -> None:
    """The time-out is for the wait between two bytes, not for the whole."""

    def serve(connection: Connection) -> None:
        connection.request()
        for byte in (b"HTTP/1.1 200 OK\r\n", b"content-length: 2\r\n\r\n", b"o", b"k"):
            time.sleep(0.2)
            connection.send(byte)

    with RawServer(serve) as server:
        assert client_of(transport, timeout=0.6).get(server.url).content == b"ok"


def test_a_slow_upload_does_not_time_out_while_it_progresses() -> None:
    near, far = socket.socketpair()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 12)
    near.settimeout(0.3)
    received = bytearray()

    def read_slowly() -> None:
        while len(received) < 200_000:
            time.sleep(0.03)
            received.extend(far.recv(10_000))

    thread = threading.Thread(target=read_slowly)
    thread.start()
    counting = CountingSocket(near)
    data = bytes(range(250)) * 800
    counting.send_all(data)  # takes 20 waits of 0.03 s
    thread.join()
    assert received == data
    assert counting.sent == len(data)
    with pytest.raises(TimeoutError):
        counting.send_all(bytes(10_000_000))
    assert 0 < counting.sent - len(data) < 10_000_000  # what has left counts all the same
    near.close()
    far.close()


def test_a_refused_connection(transport: MeteredTransport) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(httpx.ConnectError):
        client_of(transport).get(f"http://127.0.0.1:{port}")
    assert transport.traffic().total() == 0


def test_a_refusal_ahead_of_the_body_is_heard(transport: MeteredTransport) -> None:
    """A server that is full says so without reading megabytes first."""

    def serve(connection: Connection) -> None:
        connection.receive()
        connection.send(response(b"later", "503 Service Unavailable", "connection: close"))
        connection.raw.shutdown(socket.SHUT_WR)
        time.sleep(0.05)  # then it closes with bytes unread, which resets the connection

    with RawServer(serve) as server:
        answer = client_of(transport).post(server.url, content=bytes(4 * BIG))
        assert (answer.status_code, answer.content) == (503, b"later")


def test_threads_share_a_transport(transport: MeteredTransport) -> None:
    wrong = []
    with RawServer(answering(lambda r: response(r.body * 2))) as server:
        client = client_of(transport)

        def talk(name: int) -> None:
            for number in range(20):
                body = f"{name}.{number}".encode() * 500
                if client.post(server.url, content=body).content != body * 2:
                    wrong.append((name, number))

        threads = [threading.Thread(target=talk, args=(name,)) for name in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert len(server.connections) <= 6
        assert counted(transport) == (server.received, server.sent)


def test_an_answer_over_the_limit_is_refused() -> None:
    chunk = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"2\r\nab\r\n" * 11
    answers = iter([response(b"x" * 20), response(b"x" * 21), chunk + b"0\r\n\r\n"])
    transport = MeteredTransport(max_body_bytes=20)
    with RawServer(answering(lambda _: next(answers))) as server:
        client = client_of(transport)
        assert len(client.get(server.url).content) == 20
        for value in (21, 22):
            with pytest.raises(TooLarge) as caught:
                client.get(server.url)
            assert (caught.value.limit, caught.value.value) == (20, value)
    transport.close()


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def test_https_with_an_own_authority(authority: trustme.CA, tmp_path: Path) -> None:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    transport = MeteredTransport(ssl.create_default_context(cafile=str(tmp_path / "ca.pem")))
    with RawServer(answering(lambda r: response(r.body)), server_side(authority, "127.0.0.1")) as s:
        client = client_of(transport)
        body = bytes(range(256)) * 4096
        assert client.post(s.url, content=body).content == body
        assert client.post(s.url, content=b"again").content == b"again"
        assert len(s.connections) == 1
        assert counted(transport) == (s.received, s.sent)  # of HTTP, above TLS
    transport.close()


def test_bytes_behind_a_response_are_dropped_under_tls_too(
    authority: trustme.CA, tmp_path: Path
) -> None:
    """TLS has read them with the answer's last bytes: the socket itself is silent."""
    body = b"x" * 20_000
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    transport = MeteredTransport(ssl.create_default_context(cafile=str(tmp_path / "ca.pem")))
    serve = answering(lambda _: response(body) + response(b"[evil]"))
    with RawServer(serve, server_side(authority, "127.0.0.1")) as server:
        client = client_of(transport)
        assert [client.get(server.url).content == body for _ in range(3)] == [True] * 3
        assert len(server.connections) == 3
    transport.close()


def test_a_stale_https_connection_is_replaced(authority: trustme.CA, tmp_path: Path) -> None:
    def say_goodbye(connection: Connection) -> None:
        connection.raw.settimeout(0)
        with contextlib.suppress(ssl.SSLWantReadError):
            connection.raw.unwrap()

    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    transport = MeteredTransport(ssl.create_default_context(cafile=str(tmp_path / "ca.pem")))
    serve = Forgetful(Connection.reset, say_goodbye, lambda connection: connection.raw.close())
    with RawServer(serve, server_side(authority, "127.0.0.1")) as server:
        serve.talk_to(client_of(transport), server.url)
        assert len(server.connections) == 4
        assert counted(transport) == (server.received, server.sent)
    transport.close()


def test_an_untrusted_or_foreign_certificate_is_refused(
    authority: trustme.CA, tmp_path: Path
) -> None:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    trusting = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    for context, name in ((None, "127.0.0.1"), (trusting, "another.example")):
        transport = MeteredTransport(context)
        with RawServer(answering(lambda _: response()), server_side(authority, name)) as server:
            with pytest.raises(httpx.ConnectError) as caught:
                client_of(transport).get(server.url)
            assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
        transport.close()
