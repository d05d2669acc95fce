"""A JSON body whose bytes change on the way counts for neither end; it is sent again."""

from __future__ import annotations

import json

import pytest

from edge_client.transport.client import Server
from edge_client.transport.retry import RetryPolicy
from protocol.checksums import JSONChecksum
from protocol.wire import CHECKSUM_HEADER
from tests.support.edge import RawServer, Recorder, as_json
from tests.support.server import ApiClient, RunningServer, code_of

JOIN = json.dumps(
    {"name": "c", "train_samples": 60, "test_samples": 10, "num_classes": 10}
).encode()

KEY = "join-c"


def join(api: ApiClient, run: str, body: bytes, key: str, checksum: str) -> str | None:
    headers = {CHECKSUM_HEADER: checksum, "content-type": "application/json"}
    path = f"/v1/runs/{run}/participants"
    response = api.call("POST", path, key=key, content=body, headers=headers)
    return None if response.is_success else code_of(response)


@pytest.mark.parametrize(
    ("body", "key"),
    [
        (JOIN.replace(b"60", b"20"), KEY),
        (JOIN.replace(b'"c"', b'"d"'), KEY),
        (JOIN[:-1], KEY),
        (JOIN, "join-d"),
    ],
)
def test_a_request_that_was_changed_on_the_way_is_damaged(
    server: RunningServer, run: str, body: bytes, key: str
) -> None:
    """Tried: a number or a key of a JSON request changes on its way. Stopped by: the checksum over
    body and key; nothing is stored."""
    checksum = JSONChecksum(KEY).update(JOIN).text()
    before = len(server.operator().call("GET", f"/v1/runs/{run}/results").json()["participants"])
    assert join(server.api(), run, body, key, checksum) == "damaged_frame"
    after = server.operator().call("GET", f"/v1/runs/{run}/results").json()["participants"]
    assert len(after) == before


def test_a_request_with_its_checksum_counts(server: RunningServer, run: str) -> None:
    """Tried: nothing. A request with the checksum that fits counts."""
    assert join(server.api(), run, JOIN, KEY, JSONChecksum(KEY).update(JOIN).text()) is None


@pytest.mark.parametrize("path", ["/v1/runs", "/v1/runs/absent", "/v1/health"])
def test_a_response_has_its_checksum(server: RunningServer, path: str) -> None:
    """Tried: nothing. Each answer has a checksum that devices can compare."""
    response = server.api().call("GET", path)
    assert response.headers[CHECKSUM_HEADER] == JSONChecksum().update(response.content).text()


def test_a_device_repeats_a_request_whose_response_was_changed() -> None:
    """Tried: an answer changes on its way. Stopped by: the checksum of the answer; the device asks
    again."""
    header = f"{CHECKSUM_HEADER}: {JSONChecksum().update(b'[]').text()}"
    with RawServer(Recorder(as_json([1], "200 OK", header), as_json([], "200 OK", header))) as raw:
        device = Server(raw.url, retry=RetryPolicy(first_wait_s=0.01))
        assert device.runs() == []
        device.close()
