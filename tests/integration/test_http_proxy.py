"""An HTTP proxy between device and server: it refuses bodies, gives up early, or drops answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing

import httpx
import pytest
import torch

from edge_client.transport import client as client_module
from edge_client.transport.client import Server
from edge_client.transport.retry import RetryPolicy
from protocol.errors import SFPromptError, TooLarge, Unreachable
from protocol.messages import Task
from protocol.wire import SAMPLES_PATH
from split_server import client as operator_module
from split_server.client import OperatorClient
from tests.support.edge import Connection, RawServer, Request, answering, response
from tests.support.federation import OPERATOR, run_settings
from tests.support.server import RunningServer, new_run
from tuning_methods.custom.settings import Custom

HTML = "content-type: text/html"


def forwarding(server: RunningServer, timeout_s: float) -> Callable[[Request], bytes]:
    """A reverse proxy that answers 504 with a page if the server takes longer than this."""

    def forward(request: Request) -> bytes:
        try:
            answer = httpx.request(
                request.method,
                server.url + request.target,
                headers=request.headers,
                content=request.body,
                timeout=timeout_s,
                trust_env=False,
            )
        except httpx.TimeoutException:
            return response(b"<h1>504 Gateway Time-out</h1>", "504 Gateway Time-out", HTML)
        return response(answer.content, f"{answer.status_code} X", "content-type: application/json")

    return forward


def test_a_body_that_the_proxy_refuses_is_named_with_its_size_and_the_cure() -> None:
    def refuse(_request: Request) -> bytes:
        return response(b"<h1>413</h1>", "413 Request Entity Too Large", HTML)

    with RawServer(answering(refuse)) as proxy, closing(Server(proxy.url)) as device:
        tensors = {"smashed": (torch.zeros(1_000_000), "float32")}
        with pytest.raises(TooLarge) as refused:
            device.send_frame(SAMPLES_PATH, "samples", {}, tensors)
    said = str(refused.value)
    assert f"POST {SAMPLES_PATH} with 3.8 MiB was answered with status 413" in said
    assert "client_max_body_size" in said


def test_a_device_learns_to_poll_within_the_time_out_of_a_proxy(server: RunningServer) -> None:
    run = new_run(server.operator(), min_participants=2)
    credential = server.api().join(run, "a").credential
    with (
        RawServer(answering(forwarding(server, 1.3))) as proxy,
        closing(Server(proxy.url, retry=RetryPolicy(sleep=lambda _: None))) as device,
    ):
        device.authenticate(credential)
        first = device.assignment(run, None, 8.0)
        started = time.monotonic()
        for _ in range(2):
            assert device.assignment(run, first, 8.0).task is Task.WAIT
    assert 3.0 < time.monotonic() - started < 4.2, "one poll fails, two wait for a second"


def test_a_run_whose_creation_was_answered_by_a_proxy_is_found_and_not_made_twice(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator_module, "_CREATE_PAUSE_S", (0.01, 0.01))
    forward, posts, waits = forwarding(server, 60), [], []

    def lose_the_first(request: Request) -> bytes:
        answer = forward(request)
        posts.append(request)
        lost = response(b"<h1>504</h1>", "504 Gateway Time-out", HTML)
        return answer if len(posts) > 1 else lost

    with (
        RawServer(answering(lose_the_first)) as proxy,
        closing(OperatorClient(proxy.url, OPERATOR)) as operator,
    ):
        settings = Custom.of(run_settings(seed=77))
        run = operator.create_run(settings, on_wait=waits.append)
        assert [view.id for view in operator.runs() if view.settings.seed == 77] == [run.id]
        assert operator.create_run(settings, key="mine") == operator.create_run(
            settings, key="mine"
        )
    assert "504" in str(waits[0])
    assert "proxy_read_timeout" in str(waits[0])


def test_a_server_that_was_never_there_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[SFPromptError] = []
    with (
        closing(OperatorClient("http://127.0.0.1:9", OPERATOR)) as operator,
        pytest.raises(Unreachable, match="is it running"),
    ):
        operator.create_run(Custom.of(run_settings()), on_wait=waits.append)
    assert not waits


def test_silence_is_told_and_so_is_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "SILENCE_S", 0.1)
    told: list[tuple[str, str]] = []

    def slow(_request: Request) -> bytes:
        time.sleep(0.35)
        return response(b"[]")

    with (
        RawServer(answering(slow)) as raw,
        closing(Server(raw.url, tell=lambda *each: told.append(each))) as device,
    ):
        assert device.runs() == []
    assert [kind for kind, _ in told] == ["silence", "back"]


def test_a_connection_that_is_never_answered_is_given_up_and_tried_again() -> None:
    served = []

    def serve(connection: Connection) -> None:
        served.append(connection)
        while (connection.request()) is not None:
            if len(served) > 1:
                connection.send(response(b"[]"))

    retry = RetryPolicy(sleep=lambda _: None)
    with (
        RawServer(serve) as raw,
        closing(Server(raw.url, retry=retry, response_timeout_s=0.3)) as device,
    ):
        assert device.runs() == []
    assert len(served) == 2
