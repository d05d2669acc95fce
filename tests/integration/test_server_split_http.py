"""Forward, backward and inference over HTTP, and the traffic that a raw socket sees."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest
import torch

from protocol.messages import Task
from protocol.wire import PROTOCOL_VERSION, VERSION_HEADER
from tests.support.federation import TOKENS, WIDTH, smashed, state_of, step_frame
from tests.support.server import (
    ApiClient,
    RunningServer,
    code_of,
    joined,
    new_run,
    running_server,
    tensor_in,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("node")) as running:
        yield running


@pytest.fixture
def operator(server: RunningServer) -> ApiClient:
    return server.operator()


def test_split_steps_keep_to_the_open_round(server: RunningServer, operator: ApiClient) -> None:
    run = new_run(operator, min_participants=2, participants_per_round=1, evaluate_every=0)
    apis = {"a": joined(server, run, "a"), "b": joined(server, run, "b")}
    tasks = {one: api.assignment(run).task for one, api in apis.items()}
    assert sorted(tasks.values()) == [Task.TRAIN, Task.WAIT]
    trainer = next(api for one, api in apis.items() if tasks[one] is Task.TRAIN)
    waiter = next(api for one, api in apis.items() if tasks[one] is Task.WAIT)
    assert code_of(waiter.step("forward", smashed(), "s")) == "stale_round"
    assert code_of(trainer.step("forward", smashed(), "s", round_=2)) == "stale_round"
    assert code_of(trainer.step("backward", smashed(), "s")) == "step_lost"
    assert code_of(trainer.step("forward", smashed(batch=9), "s")) == "invalid_field"
    for wrong in (torch.zeros(2, TOKENS - 2, WIDTH), torch.zeros(0, TOKENS, WIDTH), torch.zeros(3)):
        assert code_of(trainer.step("forward", wrong, "s")) == "wrong_shape"
    nan = smashed() * float("nan")
    assert code_of(trainer.step("forward", nan, "s")) == "non_finite"
    assert code_of(trainer.step("forward", smashed(), "no/slash")) == "invalid_field"
    first = trainer.step("forward", smashed(), "s")
    assert first.content == trainer.step("forward", smashed(), "s").content
    assert code_of(trainer.step("forward", smashed(seed=3), "s")) == "idempotency_key_reused"
    back = trainer.step("backward", smashed(seed=1), "s")
    assert back.content == trainer.step("backward", smashed(seed=1), "s").content
    trainer.step("forward", smashed(), "t")
    assert trainer.update(run, state_of(1.0), "u").is_success
    assert code_of(trainer.step("backward", smashed(), "t")) == "stale_round"
    assert waiter.step("infer", smashed(), "i").is_success


def test_answers_use_the_codecs_of_the_run(server: RunningServer, operator: ApiClient) -> None:
    run = new_run(operator, wire={"features": "bfloat16", "gradients": "float16"})
    api = joined(server, run)
    api.assignment(run)
    assert tensor_in(api.step("forward", smashed(), "s"), "features").dtype is torch.bfloat16
    assert tensor_in(api.step("backward", smashed(), "s"), "gradients").dtype is torch.float16


@pytest.mark.parametrize(
    ("codec", "factor", "limit"), [("float16", 1e6, 65504.0), ("int8", 5e37, 127 * 2.0**119)]
)
def test_a_response_beyond_its_codec_is_not_the_requests_fault(
    server: RunningServer, operator: ApiClient, codec: str, factor: float, limit: float
) -> None:
    """What goes past the body's blocks on its way is as large as what came in."""
    run = new_run(operator, wire={"features": codec, "gradients": codec, "inference": codec})
    api = joined(server, run)
    api.assignment(run)
    large = smashed() * factor
    assert api.step("forward", smashed(), "fine").is_success
    for answer, name in (
        (api.step("forward", large, "large"), "features"),
        (api.step("infer", large, "large"), "features"),
        (api.step("backward", large, "fine"), "gradients"),
    ):
        error = answer.json()["error"]
        assert (code_of(answer), error["field"], error["limit"]) == ("non_finite", name, limit)
        assert error["value"] == "nan" or error["value"] > limit
    assert api.step("forward", smashed(), "next").is_success


class RawClient:
    """Sends HTTP over a raw socket and counts every byte."""

    def __init__(self, port: int, token: str | None = None) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        self.token = token
        self.sent = self.received = 0

    def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
        lines = [f"{method} {path} HTTP/1.1", "host: x", f"content-length: {len(body)}"]
        lines.append(f"{VERSION_HEADER}: {PROTOCOL_VERSION}")
        if self.token:
            lines.append(f"authorization: Bearer {self.token}")
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        data = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
        self.socket.sendall(data)
        self.sent += len(data)
        return self.answer()

    def answer(self) -> bytes:
        head = b""
        while b"\r\n\r\n" not in head:
            head += self._receive()
        head, _, body = head.partition(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length")
        )
        while len(body) < length:
            body += self._receive()
        return body

    def _receive(self) -> bytes:
        data = self.socket.recv(65536)
        assert data, "the server closed the connection"
        self.received += len(data)
        return data

    def take(self) -> tuple[int, int]:
        counted = self.sent, self.received
        self.sent = self.received = 0
        return counted

    def close(self) -> None:
        self.socket.close()


def test_the_meter_counts_what_a_raw_socket_counts(
    server: RunningServer, operator: ApiClient
) -> None:
    run = new_run(operator)
    raw = RawClient(server.port)
    raw.request("GET", f"/v1/runs/{run}")
    body = json.dumps(
        {"name": "raw", "train_samples": 9, "test_samples": 9, "num_classes": 10}
    ).encode()
    answer = raw.request(
        "POST",
        f"/v1/runs/{run}/participants",
        body,
        idempotency_key="k",
        content_type="application/json",
    )
    raw.token = json.loads(answer)["credential"]
    raw.request("GET", f"/v1/runs/{run}/assignment")
    control = raw.take()
    raw.request("GET", f"/v1/runs/{run}/head")
    download = raw.take()
    raw.request("POST", "/v1/split/forward", step_frame("forward", smashed(), "s"))
    up, down = raw.take()
    raw.request("POST", "/v1/split/backward", step_frame("backward", smashed(), "s"))
    raw.request("POST", "/v1/split/backward", step_frame("backward", smashed(), "lost"))
    gradients = raw.take()
    raw.request("POST", "/v1/split/infer", step_frame("infer", smashed(), "i"))
    inference = raw.take()
    raw.close()
    counted = operator.call("GET", f"/v1/runs/{run}/results").json()
    assert counted["traffic"] == {
        "download": {"up": download[0], "down": download[1]},
        "smashed": {"up": up, "down": 0},
        "features": {"up": 0, "down": down},
        "gradients": {"up": gradients[0], "down": gradients[1]},
        "inference": {"up": inference[0], "down": inference[1]},
        "control": {"up": control[0], "down": control[1]},
    }
    assert counted["participants"][0]["traffic"] == counted["traffic"]
