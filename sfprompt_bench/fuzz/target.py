"""The server under test: its runs and credentials, valid requests, and its resources."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
import torch
from torch import Tensor

from edge_client.transport.client import Server
from protocol.errors import SFPromptError
from protocol.federation import FederationSettings
from protocol.frames import encode_frame, join_frame
from protocol.messages import JoinRequest
from protocol.plan import ModelPlan, RunPlan, TrainingPlan, WirePlan
from protocol.wire import FRAME_MEDIA_TYPE, PROTOCOL_VERSION, VERSION_HEADER
from sfprompt_bench.engine.workload import shape_of
from split_model.checkpoints.state import state_shapes
from split_server.client import OperatorClient
from tuning_methods.custom.settings import Custom

# Small limits: memory that a server may take by its settings must not hide a leak.
SERVER_SETTINGS: Final[Mapping[str, object]] = {
    "max_address_connections": 256,
    "max_frame_mib": 8,
    "engine_memory_mib": 32,
    "queue_mib": 32,
    "answer_mib": 8,
    "samples_mib": 8,
    "samples_disk_mib": 16,
    "participant_samples_mib": 8,
    "body_timeout_s": 2.0,
    "stall_timeout_s": 1.0,
    "first_request_timeout_s": 1.0,
    "max_wait_s": 0.1,
    "log_level": "warning",
}

_MODEL: Final = ModelPlan(
    backbone="test_vit", weights="random:0", image_size=32, cut=1, prompt_count=2
)

_PARTICIPANTS: Final = 2

_JSON: Final = "application/json"


@dataclass(frozen=True)
class Request:
    """An HTTP request."""

    method: str
    path: str
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    def to_bytes(self) -> bytes:
        """Write it for the wire, with the length of its body."""
        lines = [f"{self.method} {self.path} HTTP/1.1", "host: x"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        if self.body or self.method not in ("GET", "HEAD", "DELETE"):
            lines.append(f"content-length: {len(self.body)}")
        return "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n" + self.body


@dataclass
class FuzzedRun:
    """A run with an open round, and its participants."""

    id: str
    plan: RunPlan
    state: str
    credentials: list[str]


class Target:
    """A server under test.

    Args:
        url: of the server.
        operator_token: of the server.
        process: its id.
    """

    def __init__(self, url: str, operator_token: str, process: int) -> None:
        self.url, self.operator_token = url, operator_token
        host, _, port = url.removeprefix("http://").rpartition(":")
        self.address = (host, int(port))
        self.process = psutil.Process(process)
        self.runs = [_open_run(url, operator_token, plan) for plan in _plans()]

    def resident_bytes(self) -> int:
        """Measure the server's resident memory."""
        return int(self.process.memory_info().rss)

    def cpu_s(self) -> float:
        """Measure the server's processor time so far, in seconds."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def descriptors(self) -> int:
        """Count its open descriptors."""
        return len(os.listdir(Path("/proc") / str(self.process.pid) / "fd"))

    def is_running(self) -> bool:
        """Whether the process lives."""
        return bool(self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE)

    def valid_requests(self) -> list[Request]:
        """List valid requests to every route."""
        return [request for run in self.runs for request in self._requests_of(run)]

    def _requests_of(self, run: FuzzedRun) -> list[Request]:
        base, (first, second) = f"/v1/runs/{run.id}", run.credentials
        operator = _headers(self.operator_token)
        member, other, joiner = _headers(first), _headers(second), _headers()
        join = {"name": "x", "train_samples": 9, "test_samples": 3, "num_classes": 10}
        report = {"round": 1, "attempt": 0, "samples": 9, "correct": 3, "loss_sum": 1.5}
        settings = Custom.of(run.plan).model_dump(mode="json")
        return [
            Request("GET", "/v1/health"),
            Request("GET", "/metrics", operator),
            Request("GET", "/v1/runs", joiner),
            Request("GET", base, member),
            Request("GET", f"{base}/results", member),
            Request("GET", f"{base}/events?after=0&wait=0.01", member),
            Request("GET", f"{base}/assignment?task=train&round=1&attempt=0&wait=0.01", member),
            Request("GET", f"{base}/head", {**member, "range": "bytes=8-64"}),
            Request("GET", f"{base}/states/{run.state}/state", member),
            Request("GET", f"{base}/states/{run.state}/delta?base={run.state}", member),
            Request("DELETE", f"{base}/samples", other),
            _json_request("POST", f"{base}/participants", joiner, join),
            _json_request("PUT", f"{base}/evaluation", member, report),
            _json_request("POST", "/v1/runs", member, settings),
            _json_request("POST", "/v1/runs", operator, {**settings, "seed": -1}),
            _json_request("POST", "/v1/runs/calm-otter-2345/cancel", operator, {}),
            Request("DELETE", "/v1/runs/calm-otter-2345/participants/me", {**member, **_key()}),
            *_frame_requests(run, member, other),
        ]


def _headers(credential: str | None = None) -> dict[str, str]:
    headers = {VERSION_HEADER: str(PROTOCOL_VERSION)}
    return {**headers, "authorization": f"Bearer {credential}"} if credential else headers


def _key() -> dict[str, str]:
    return {"idempotency-key": os.urandom(8).hex()}


def _json_request(method: str, path: str, headers: dict[str, str], body: object) -> Request:
    extra = {**_key(), "content-type": _JSON}
    return Request(method, path, {**headers, **extra}, json.dumps(body).encode())


def _plans() -> list[RunPlan]:
    """Plans whose runs accept all kinds of frames."""
    parts = {
        "federation": FederationSettings(
            rounds=100_000, min_participants=_PARTICIPANTS, round_timeout_s=604_800
        ),
        "training": TrainingPlan(batch_size=8),
    }
    cut = {"prompt_at": "cut"}
    body = {"prompt_count": 0, "tune": "full", "tune_body": True}
    start = {"prompt_at": "cut", "depths": 2, "rank": 16, "prompt_count": 0}
    once = {"local_epochs": 1, "split_epochs": 0, "keep_fraction": 1.0, "pruning": "random"}
    return [
        RunPlan(name="input", model=_MODEL, **parts),
        RunPlan(
            name="cut",
            model=_MODEL.model_copy(update=cut),
            wire=WirePlan(keep_smashed=True),
            **parts,
        ),
        RunPlan(name="body", model=_MODEL.model_copy(update=body), **parts),
        RunPlan(
            name="start",
            model=_MODEL.model_copy(update=start),
            federation=parts["federation"],
            training=TrainingPlan.model_validate({"batch_size": 8, **once}),
            wire=WirePlan(keep_smashed=True, pooled_features=True),
        ),
    ]


def _open_run(url: str, operator_token: str, plan: RunPlan) -> FuzzedRun:
    operator, device = OperatorClient(url, operator_token), Server(url)
    try:
        run = operator.create_run(Custom.of(plan))
        credentials = []
        for number in range(_PARTICIPANTS):
            request = JoinRequest(
                name=f"fuzz-{number}", train_samples=100, test_samples=10, num_classes=10
            )
            credentials.append(device.join(run.id, request, os.urandom(8).hex()).credential)
        device.authenticate(credentials[0])
        assignment = device.assignment(run.id, None, 0.0)
        if assignment.task != "train":
            raise SFPromptError(f"the round did not open: {assignment.task}")
        return FuzzedRun(run.id, plan, assignment.state.sha256, credentials)
    finally:
        operator.close()
        device.close()


def _frame_requests(run: FuzzedRun, member: dict[str, str], other: dict[str, str]) -> list[Request]:
    """List frames for all routes of the split plane, and an update."""
    model, generator = run.plan.model, torch.Generator().manual_seed(0)
    _, tokens, width = shape_of(model, 2)
    if model.prompt_at == "cut":
        tokens -= model.prompt_count
    smashed = torch.randn((2, tokens, width), generator=generator)
    ids = torch.arange(32, dtype=torch.uint8).reshape(2, 16)
    session = {"session": "s", "round": 1, "attempt": 0, "number": 0, "steps": 3}
    step = session if model.tune_body else {"step": "s", "round": 1}
    state = {name: torch.zeros(shape) for name, shape in state_shapes(model).items()}
    update = {"round": 1, "attempt": 0, "samples": 9, "session": "s"}
    sums = {"sums": torch.zeros((10, 16)), "counts": torch.zeros(10)}
    tensors: list[tuple[str, dict[str, Any], dict[str, Tensor]]] = [
        ("forward", step, {"smashed": smashed}),
        ("backward", step, {"gradients": smashed}),
        ("exchange", session, {"ids": ids}),
        ("exchange", session, {"smashed": smashed}),
        ("exchange", {**session, "number": 1}, {"gradients": smashed, "ids": ids}),
        ("infer", {"step": "s", "round": 1}, {"smashed": smashed}),
        ("infer", {"step": "s", "round": 1, "state": run.state}, {"ids": ids}),
        ("samples", {}, {"ids": ids, "smashed": smashed}),
        ("missing", {}, {"ids": ids}),
        ("start", {"round": 0, "attempt": 0}, {"ids": ids}),
        ("solve", {"round": 0, "attempt": 0}, sums),
        ("update", update, state),
        ("update", {**update, "base": run.state}, state),
    ]
    requests = []
    for kind, meta, content in tensors:
        for codec in ("float32", "int4", "klt:0.5+zstd"):
            headers = {**member, **_key(), "content-type": FRAME_MEDIA_TYPE}
            own = {
                name: (tensor, "uint8" if name == "ids" else codec)
                for name, tensor in content.items()
            }
            data = bytes(join_frame(encode_frame(kind, meta, own)))
            if kind == "update":  # of the second participant: the round stays open
                headers = {**headers, **other}
                requests.append(Request("PUT", f"/v1/runs/{run.id}/update", headers, data))
            else:
                requests.append(Request("POST", f"/v1/split/{kind}", headers, data))
    return requests
