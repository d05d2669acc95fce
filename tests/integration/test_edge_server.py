"""The device's requests to a raw socket server, and its handling of the responses."""

import contextlib
import json
import ssl
from pathlib import Path

import pytest
import torch
import trustme

from edge_client.storage.blob_cache import BlobCache
from edge_client.transport.client import Server
from edge_client.transport.retry import RetryPolicy
from protocol import errors
from protocol.errors import (
    Busy,
    InternalError,
    InvalidField,
    MalformedFrame,
    NotFound,
    SFPromptError,
    TooLarge,
    Unreachable,
)
from protocol.frames import decode_frame
from protocol.messages import (
    Assignment,
    BlobRef,
    EvaluationReport,
    JoinRequest,
    RunStatus,
    RunView,
    Task,
    UpdateMeta,
)
from protocol.settings import RunSettings
from split_model.files import sha256_of
from split_server.client import OperatorClient
from tests.support.edge import (
    NO_PATIENCE,
    Connection,
    RawServer,
    Recorder,
    Request,
    as_json,
    impatient,
    response,
)

REF = BlobRef(sha256="a" * 64, nbytes=10)

VIEW = RunView(
    id="r1",
    status=RunStatus.RUNNING,
    settings=RunSettings(),
    plan=RunSettings().plan,
    round=1,
    participants=1,
    created_at=1.0,
    backbone_bytes=1,
    head=REF,
    state=REF,
)

JOIN = JoinRequest(name="n", train_samples=1, test_samples=0, num_classes=2)


def test_every_request_carries_version_and_its_own_id() -> None:
    serve = Recorder(as_json([VIEW.model_dump(mode="json")]))
    with RawServer(serve) as raw:
        server = impatient(raw)
        assert server.runs() == [VIEW]
        server.runs()
        server.close()
    first, second = serve.requests
    assert (first.method, first.target, first.body) == ("GET", "/v1/runs", b"")
    assert first.headers["sfprompt-version"] == "2"
    assert first.headers["accept-encoding"] == "identity"
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    assert "authorization" not in first.headers


def test_joining_and_the_next_requests() -> None:
    joined = {"participant": "p", "credential": "secret", "run": VIEW.model_dump(mode="json")}
    stop = Assignment(task=Task.STOP, round=2, state=REF, status=RunStatus.FINISHED)
    receipt = {"round": 1, "samples": 3}
    serve = Recorder(
        as_json(joined),
        as_json(stop.model_dump(mode="json")),
        as_json(stop.model_dump(mode="json")),
        as_json(receipt),
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n",
    )
    with RawServer(serve) as raw:
        server = impatient(raw)
        answer = server.join("r1", JOIN, "key-1", join_token="token")
        server.authenticate(answer.credential)
        assert server.assignment("r1", None, 20) == stop
        server.assignment("r1", stop, 2.5)
        meta = UpdateMeta(round=1, attempt=2, samples=3)
        state = {"prompts": torch.ones(2, 3)}
        assert server.send_update("r1", meta, state, "bfloat16").samples == 3
        report = EvaluationReport(round=1, attempt=0, samples=1, correct=1, loss_sum=0.5)
        server.send_evaluation("r1", report)
        server.leave("r1")
        server.close()
    join, first, later, update, evaluation, leave = serve.requests
    assert (join.method, join.target) == ("POST", "/v1/runs/r1/participants")
    assert join.headers["authorization"] == "Bearer token"
    assert join.headers["idempotency-key"] == "key-1"
    assert join.headers["content-type"] == "application/json"
    assert json.loads(join.body) == JOIN.model_dump()
    assert first.headers["authorization"] == "Bearer secret"
    assert first.target == "/v1/runs/r1/assignment"
    assert later.target == "/v1/runs/r1/assignment?task=stop&round=2&attempt=0&wait=2.5"
    assert (update.method, update.target) == ("PUT", "/v1/runs/r1/update")
    assert update.headers["idempotency-key"] == "update-1-2"
    frame = decode_frame(update.body)
    assert (frame.kind, dict(frame.meta)) == ("update", meta.model_dump())
    assert frame.specs["prompts"].codec == "bfloat16"
    assert evaluation.headers["idempotency-key"] == "evaluation-1-0"
    assert json.loads(evaluation.body) == report.model_dump()
    assert (leave.method, leave.target) == ("DELETE", "/v1/runs/r1/participants/me")
    assert leave.headers["content-length"] == "0"


def test_a_run_s_name_stays_one_segment_of_the_path() -> None:
    serve = Recorder(as_json(NotFound("no such run").to_wire(), "404 Not Found"))
    with RawServer(serve) as raw:
        server = impatient(raw)
        for name in ("a/../b", "a?b=c", "a b#c"):
            with pytest.raises(NotFound):
                server.run(name)
        server.close()
    assert [r.target for r in serve.requests] == [
        "/v1/runs/a%2F..%2Fb",
        "/v1/runs/a%3Fb%3Dc",
        "/v1/runs/a%20b%23c",
    ]


KINDS = [
    getattr(errors, name)
    for name in errors.__all__
    if name not in ("FieldValue", "error_from_wire", "Unreachable")
]


def test_every_typed_error_comes_back_as_its_class() -> None:
    sent = [kind("why", field="f", limit=[1, 2], value=3, hint="do this") for kind in KINDS]
    serve = Recorder(*[as_json(e.to_wire(), f"{e.status or 500} No") for e in sent])
    with RawServer(serve) as raw:
        server = impatient(raw)
        for error in sent:
            with pytest.raises(SFPromptError) as caught:
                server.runs()
            assert type(caught.value) is type(error)
            assert str(caught.value) == str(error)
        server.close()


@pytest.mark.parametrize(
    ("status", "kind"),
    [("404 x", NotFound), ("502 x", Busy), ("413 x", TooLarge), ("500 x", InternalError)],
)
def test_a_proxy_s_page_is_the_nearest_error(status: str, kind: type[SFPromptError]) -> None:
    with RawServer(Recorder(response(b"<html>", status))) as raw:
        server = impatient(raw)
        with pytest.raises(kind):
            server.runs()
        server.close()


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("3", 3.0), ("0.5", 0.5), ("soon", None), ("nan", None), ("-1", None), ("inf", 86_400.0)],
)
def test_retry_after_is_read_from_the_header(header: str, seconds: float | None) -> None:
    with RawServer(Recorder(response(b"", "503 x", f"retry-after: {header}"))) as raw:
        server = impatient(raw)
        with pytest.raises(Busy) as caught:
            server.runs()
        assert caught.value.retry_after_s == seconds
        server.close()


def test_a_redirect_names_the_other_address() -> None:
    answer = response(b"", "301 Moved", "location: https://node/v1/runs")
    with RawServer(Recorder(answer)) as raw:
        server = impatient(raw)
        with pytest.raises(InvalidField, match="https://node/v1/runs"):
            server.runs()
        server.close()


def test_a_busy_server_gets_the_same_request_again() -> None:
    later = as_json(Busy("full", retry_after_s=2.0).to_wire(), "503 x")
    serve = Recorder(later, later, as_json({"round": 1, "samples": 3}))
    pauses: list[float] = []
    with RawServer(serve) as raw:
        server = Server(raw.url, retry=RetryPolicy(sleep=pauses.append))
        meta = UpdateMeta(round=1, attempt=0, samples=3)
        server.send_update("r", meta, {"t": torch.arange(50_000.0)}, "float32")
        server.close()
    assert len(pauses) == 2
    assert all(2 <= pause <= 2.5 for pause in pauses)
    bodies = {request.body for request in serve.requests}
    keys = {request.headers["idempotency-key"] for request in serve.requests}
    assert (len(serve.requests), len(bodies), len(keys)) == (3, 1, 1)


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 100_000, b'"x"', b"{}", b"7"])
def test_malformed_json_is_refused(body: bytes) -> None:
    serve = Recorder(response(body))
    with RawServer(serve) as raw:
        server = Server(raw.url)
        for ask in (server.runs, lambda: server.run("r")):
            with pytest.raises((MalformedFrame, InvalidField)):
                ask()
        server.close()
    assert len(serve.requests) == 2


# Downloads

CONTENT = bytes(range(256)) * 40_000  # 10 MB: three pieces

FILE_REF = BlobRef(sha256="0" * 64, nbytes=len(CONTENT))


def ranged(request: Request) -> bytes:
    start, end = map(int, request.headers["range"].removeprefix("bytes=").split("-"))
    part = CONTENT[start : end + 1]
    span = f"content-range: bytes {start}-{start + len(part) - 1}/{len(CONTENT)}"
    return response(part, "206 Partial Content", span)


def test_a_download_comes_in_pieces(tmp_path: Path) -> None:
    (tmp_path / "whole").write_bytes(CONTENT)
    ref = BlobRef(sha256=sha256_of(tmp_path / "whole"), nbytes=len(CONTENT))
    serve = Recorder(ranged)
    with RawServer(serve) as raw:
        server = impatient(raw)
        path = BlobCache(tmp_path).fetch(ref, lambda start: server.head("r", start))
        assert path.read_bytes() == CONTENT
        assert server.state("r", FILE_REF, 9_999_000) == CONTENT[9_999_000:]
        server.close()
    ranges = [request.headers["range"] for request in serve.requests]
    mib4 = 4 * 1024 * 1024
    assert ranges[:3] == [f"bytes={i * mib4}-{(i + 1) * mib4 - 1}" for i in range(3)]
    assert serve.requests[0].target == "/v1/runs/r/head"
    assert serve.requests[3].target == f"/v1/runs/r/states/{'0' * 64}/state"
    assert set(server.traffic().to_dict()) == {"download", "updates"}


def test_a_download_survives_broken_connections(tmp_path: Path) -> None:
    """Received pieces are kept; only the interrupted piece is requested again."""
    (tmp_path / "whole").write_bytes(CONTENT)
    ref = BlobRef(sha256=sha256_of(tmp_path / "whole"), nbytes=len(CONTENT))
    ranges_asked: list[str] = []

    def serve(connection: Connection) -> None:
        while (request := connection.request()) is not None:
            ranges_asked.append(request.headers["range"])
            answer = ranged(request)
            if len(ranges_asked) % 2:
                connection.send(answer[: len(answer) // 2])
                return
            connection.send(answer)

    with RawServer(serve) as raw:
        server = Server(raw.url, retry=RetryPolicy(sleep=lambda _: None))
        path = BlobCache(tmp_path).fetch(ref, lambda start: server.head("r", start))
        assert path.read_bytes() == CONTENT
        server.close()
    starts = [int(text.removeprefix("bytes=").split("-")[0]) for text in ranges_asked]
    assert starts == sorted(starts)
    assert len(ranges_asked) == 6


def test_a_server_without_range_support_works() -> None:
    with RawServer(Recorder(response(CONTENT))) as raw:
        server = impatient(raw)
        assert server.head("r") == CONTENT
        assert server.head("r", 9_000_000) == CONTENT[9_000_000:]
        server.close()


def test_another_range_than_requested_is_refused() -> None:
    answers = [response(b"x", "206 x", f"content-range: bytes {s}-9/10") for s in (0, 50, 55)]
    with RawServer(Recorder(*answers, response(b"x", "206 x"))) as raw:
        server = impatient(raw)
        for _ in range(4):
            with pytest.raises(MalformedFrame, match="another part"):
                server.head("r", 5)
        server.close()


# Addresses and certificates


@pytest.mark.parametrize(
    "url",
    ["", "node:8500", "ftp://node", "http://", "http://node:99999999", "http://[::1", "http://\n"],
)
def test_an_invalid_address(url: str) -> None:
    with pytest.raises(InvalidField) as caught:
        Server(url)
    assert (caught.value.field, caught.value.value) == ("url", url)


def test_a_token_that_no_header_can_carry() -> None:
    server = Server("http://127.0.0.1:1", retry=NO_PATIENCE)
    for token in ("two words", "line\n", "schlüssel", "\0\0"):
        with pytest.raises(InvalidField) as caught:
            server.join("r", JOIN, "k", join_token=token)
        assert caught.value.field == "join_token"
        assert token not in str(caught.value)
    server.close()


def test_an_unreachable_server_says_where() -> None:
    server = Server("http://127.0.0.1:1", retry=NO_PATIENCE)
    with pytest.raises(Unreachable) as caught:
        server.runs()
    assert caught.value.value == "http://127.0.0.1:1"
    server.close()


def test_a_ca_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "text.pem").write_text("no certificate")
    for path in (tmp_path / "text.pem", tmp_path / "absent.pem", tmp_path):
        with pytest.raises(InvalidField) as caught:
            Server("https://node", ca_file=path)
        assert caught.value.field == "ca_file"


def test_a_refused_certificate_is_not_tried_again(tmp_path: Path) -> None:
    authority, other = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "own.pem"))
    other.cert_pem.write_to_path(str(tmp_path / "other.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    pauses: list[float] = []
    with RawServer(Recorder(as_json([])), context) as raw:
        for ca_file in (None, tmp_path / "other.pem"):
            retry = RetryPolicy(sleep=pauses.append)
            server = Server(raw.url, retry=retry, ca_file=ca_file)
            with pytest.raises(Unreachable, match="certificate is not trusted") as caught:
                server.runs()
            assert "--ca-file" in str(caught.value)
            assert "running" not in str(caught.value)
            assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
            server.close()
        with (
            contextlib.closing(OperatorClient(raw.url)) as operator,
            pytest.raises(Unreachable, match=r"certificate is not trusted.*--ca-file"),
        ):
            operator.runs()
        trusting = impatient(raw, ca_file=tmp_path / "own.pem")
        assert trusting.runs() == []
        trusting.close()
    assert pauses == []


def test_plain_http_behind_an_https_address_is_not_tried_again() -> None:
    pauses: list[float] = []

    def plain(connection: Connection) -> None:
        connection.receive()
        connection.send(response(b"plain", "400 Bad Request"))

    with RawServer(plain) as raw:
        url = raw.url.replace("http:", "https:")
        server = Server(url, retry=RetryPolicy(sleep=pauses.append))
        with pytest.raises(Unreachable, match=r"does not speak TLS.*http://"):
            server.runs()
        server.close()
    assert pauses == []
