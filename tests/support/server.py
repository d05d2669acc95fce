"""A real server in a thread, and a client that sends valid or invalid requests to it."""

from __future__ import annotations

import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor

from protocol.frames import Frame, decode_frame, encode_frame, join_frame
from protocol.messages import Assignment, JoinResponse, RunView
from protocol.plan import RunPlan
from protocol.settings import RunSettings
from protocol.wire import IDEMPOTENCY_HEADER, PROTOCOL_VERSION, VERSION_HEADER
from split_server.app import Server, build_server, create_app
from split_server.settings import ServerSettings, load_settings
from tests.support.federation import OPERATOR, run_settings, step_frame, update_frame
from tuning_methods.custom.settings import Custom


class ApiClient:
    """Sends requests to a real server, with or without the required headers."""

    def __init__(self, url: str, token: str | None = None) -> None:
        self.url = url
        headers = {VERSION_HEADER: str(PROTOCOL_VERSION)}
        if token is not None:
            headers["authorization"] = f"Bearer {token}"
        self.http = httpx.Client(base_url=url, headers=headers, timeout=30, trust_env=False)

    def close(self) -> None:
        self.http.close()

    def call(
        self,
        method: str,
        path: str,
        *,
        key: str | None = None,
        json: object = None,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        extra = dict(headers or {})
        if key is not None:
            extra[IDEMPOTENCY_HEADER] = key
        return self.http.request(method, path, json=json, content=content, headers=extra)

    def create(self, settings: RunPlan | RunSettings, key: str = "create-1") -> RunView:
        run = Custom.of(settings) if isinstance(settings, RunPlan) else settings
        answer = self.call("POST", "/v1/runs", key=key, json=run.model_dump(mode="json"))
        assert answer.is_success, answer.text
        return RunView.model_validate(answer.json())

    def join(
        self, run: str, name: str = "a", *, key: str | None = None, train: int = 100, test: int = 10
    ) -> JoinResponse:
        request = {
            "name": name,
            "train_samples": train,
            "test_samples": test,
            "num_classes": 10,
        }
        path = f"/v1/runs/{run}/participants"
        answer = self.call("POST", path, key=key or f"join-{name}", json=request)
        assert answer.is_success, answer.text
        return JoinResponse.model_validate(answer.json())

    def assignment(self, run: str, query: str = "") -> Assignment:
        answer = self.call("GET", f"/v1/runs/{run}/assignment{query}")
        assert answer.is_success, answer.text
        return Assignment.model_validate(answer.json())

    def update(
        self, run: str, state: Mapping[str, Tensor], key: str, **meta: Any
    ) -> httpx.Response:
        full = {"round": 1, "attempt": 0, "samples": 10, **meta}
        return self.call(
            "PUT", f"/v1/runs/{run}/update", key=key, content=update_frame(state, full)
        )

    def evaluate(self, run: str, key: str, **report: Any) -> httpx.Response:
        full = {"round": 1, "attempt": 0, "samples": 10, "correct": 5, "loss_sum": 1.0, **report}
        return self.call("PUT", f"/v1/runs/{run}/evaluation", key=key, json=full)

    def step(self, kind: str, tensor: Tensor, step: str, round_: int = 1) -> httpx.Response:
        content = step_frame(kind, tensor, step, round_)
        return self.call("POST", f"/v1/split/{kind}", content=content)

    def ask(self, kind: str, meta: Mapping[str, Any], **tensors: Tensor) -> httpx.Response:
        """Send a frame of the split plane, each tensor with the codec of its dtype."""
        pieces = encode_frame(
            kind,
            meta,
            {name: (t, str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()},
        )
        return self.call("POST", f"/v1/split/{kind}", content=bytes(join_frame(pieces)))


def frame_in(answer: httpx.Response, kind: str) -> Frame:
    assert answer.is_success, answer.text
    frame: Frame = decode_frame(bytearray(answer.content))
    assert frame.kind == kind
    return frame


def tensor_in(answer: httpx.Response, name: str) -> Tensor:
    return frame_in(answer, name).tensor(name)


def code_of(answer: httpx.Response) -> str:
    """The code of an error response."""
    assert answer.is_error, answer.text
    return str(answer.json()["error"]["code"])


@dataclass
class RunningServer:
    """A real server on a loopback port, in a thread of this process."""

    url: str
    server: Server
    thread: threading.Thread
    apis: list[ApiClient] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def api(self, token: str | None = None) -> ApiClient:
        api = ApiClient(self.url, token)
        self.apis.append(api)
        return api

    def operator(self) -> ApiClient:
        return self.api(OPERATOR)

    def stop(self) -> None:
        for api in self.apis:
            api.close()
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive(), "the server does not stop"


def new_run(operator: ApiClient, **settings: Any) -> str:
    """Create a run of `run_settings`."""
    return operator.create(run_settings(**settings), key=uuid.uuid4().hex).id


def joined(server: RunningServer, run: str, name: str = "a") -> ApiClient:
    """Join a run and return a client with the new participant's credential."""
    return server.api(server.api().join(run, name).credential)


def server_settings(folder: Path, **changes: Any) -> ServerSettings:
    given = {"port": 0, "data_dir": folder, "operator_token": OPERATOR, "torch_threads": 1}
    return load_settings({**given, **changes})


@contextmanager
def running_server(folder: Path, **changes: Any) -> Iterator[RunningServer]:
    settings = server_settings(folder, **changes)
    server = build_server(create_app(settings), settings)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    running = RunningServer(f"http://127.0.0.1:{port}", server, thread)
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        assert server.started, "the server did not start"
        yield running
    finally:
        running.stop()


def measured(server: RunningServer) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of /metrics, by name and labels."""
    page = server.operator().http.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page.text)
        for sample in family.samples
    }


def labels(**pairs: str) -> frozenset[tuple[str, str]]:
    return frozenset(pairs.items())


def wait_until(true: Any, seconds: float = 20.0) -> None:
    give_up_at = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < give_up_at, "it did not come true in time"
        time.sleep(0.01)
