"""What a server asks of a device against its owner's will, and what stops it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_client import cli
from edge_client.policy import DevicePolicy
from edge_client.run_model import RunModel
from edge_client.storage.blob_cache import BlobCache
from edge_client.transport.client import Server
from protocol.errors import RefusedByDevice
from protocol.messages import (
    Assignment,
    BlobRef,
    JoinRequest,
    JoinResponse,
    RunStatus,
    RunView,
    Task,
)
from protocol.presets import over_form
from protocol.settings import RunSettings
from tests.support.edge import RawServer, Request, answering, response
from tests.support.federation import run_settings
from tests.support.server import RunningServer

FILE = BlobRef(sha256="a" * 64, nbytes=10)

Join = Callable[..., str]


def run_view(nbytes: int = 10, plan: dict[str, Any] | None = None, **training: Any) -> RunView:
    """A run as a server describes it, with these settings and this size of its head."""
    usual = RunSettings.model_validate(over_form("paper", {})).plan
    model = usual.model.replace(**(plan or {}))
    changed = usual.model_copy(
        update={"model": model, "training": usual.training.model_copy(update=training)}
    )
    return RunView(
        id="r1",
        status=RunStatus.WAITING,
        settings=RunSettings(),
        plan=changed,
        round=0,
        participants=0,
        created_at=1.0,
        backbone_bytes=1,
        head=FILE.model_copy(update={"nbytes": nbytes}),
        state=FILE,
    )


class HostileServer:
    """Shows one run to whoever asks, and another to whoever has joined."""

    def __init__(self, shown: RunView, joined: RunView | None = None) -> None:
        self.shown, self.joined = shown, joined or shown
        self.requests: list[str] = []
        self.reasons: list[str] = []

    def __call__(self, request: Request) -> bytes:
        self.requests.append(f"{request.method} {request.target}")
        if request.method == "POST":
            answer = JoinResponse(
                participant="p1", credential="x" * 20, run=self.joined
            ).model_dump_json()
        elif request.method == "PUT":
            self.reasons.append(json.loads(request.body)["reason"])
            answer = "{}"
        elif request.target == "/v1/runs":
            answer = f"[{self.shown.model_dump_json()}]"
        else:
            return response(b"never to be asked for")
        return response(answer.encode())


@pytest.fixture
def join(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Join:
    """Runs ``edge-client join`` against a hostile server, and returns what it says on stderr."""

    def run(server: HostileServer, *options: str, **environment: str) -> str:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with RawServer(answering(server)) as raw:
            words = ["join", raw.url, "--data", "digits", "--limit-train", "20", "--name", "a"]
            words += ["--home", str(tmp_path), "--progress", "json", "--patience", "0"]
            monkeypatch.setattr(sys, "argv", ["edge-client", *words, *options])
            with pytest.raises(SystemExit) as stop:
                cli.main()
        assert stop.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    return run


@pytest.mark.parametrize(
    ("view", "options", "words"),
    [
        (run_view(plan={"cut": 0}), [], "method.cut; allowed: at least 1; found: 0"),
        (
            run_view(plan={"cut": 2}),
            ["--min-cut", "3"],
            "method.cut; allowed: at least 3; found: 2",
        ),
        (run_view(local_epochs=10_000), [], "method.local_epochs; allowed: at most 1000"),
        (
            run_view(split_epochs=11),
            ["--max-epochs", "10"],
            "method.split_epochs; allowed: at most",
        ),
        (run_view(augment=True, views=999), ["--max-epochs", "10"], "training.views; allowed: at"),
        (run_view(nbytes=10**10), [], "head, state; allowed: 4294967296 bytes; found: 10000000010"),
        (run_view(), ["--max-download", "19"], "allowed: 19 bytes; found: 20 bytes"),
        (run_view(), ["--backbone", "vit_x"], "model.backbone; allowed: ['vit_x']; found: vit_sm"),
        (run_view(), ["--require-tls"], "url; allowed: https://…; found: http://127.0.0.1"),
    ],
)
def test_a_run_outside_the_owners_limits_gets_nothing(
    join: Join, view: RunView, options: list[str], words: str
) -> None:
    """Tried: a server asks for raw patches, 10,000 epochs, a huge download, another backbone, or
    plain HTTP. Stopped by: the device's policy, before it reads its images, joins or downloads."""
    server = HostileServer(view)
    error = join(server, *options)
    assert words in error
    assert "join with" in error
    assert server.requests == ([] if "--require-tls" in options else ["GET /v1/runs"])


def test_the_limits_may_stand_in_the_environment(join: Join) -> None:
    """Tried: a server asks too much of a device that runs as a service. Stopped by: limits as
    variables of the service."""
    server = HostileServer(run_view(plan={"cut": 2}))
    names = {"EDGE_CLIENT_BACKBONE": "vit_small_patch14_dinov2", "EDGE_CLIENT_MIN_CUT": "5"}
    assert "method.cut; allowed: at least 5; found: 2" in join(server, **names)
    names = {"EDGE_CLIENT_MAX_EPOCHS": "0", "EDGE_CLIENT_MIN_CUT": "1"}
    assert "method.local_epochs" in join(server, **names)
    assert "https" in join(server, EDGE_CLIENT_REQUIRE_TLS="1")


def test_another_run_after_joining_than_was_shown_is_refused(join: Join) -> None:
    """Tried: a server shows a harmless run, and sends other settings in the answer to the join.
    Stopped by: the same check before the first download; the server is told why."""
    server = HostileServer(run_view(), run_view(local_epochs=10_000))
    assert "method.local_epochs" in join(server)
    assert [request.split("/")[-1] for request in server.requests] == [
        "runs",
        "participants",
        "absence",
    ]
    assert server.reasons == ["refused_by_device"]


def test_a_larger_file_in_a_later_round_is_not_downloaded(
    server: RunningServer, tmp_path: Path
) -> None:
    """Tried: small files at the join, a huge head or state in an assignment. Stopped by: the
    limit of the join, for each assignment."""
    run = server.operator().create(run_settings(min_participants=9), key="policy").id
    client = Server(server.url)
    request = JoinRequest(name="a", train_samples=1, test_samples=0, num_classes=10)
    response = client.join(run, request, "key")
    client.authenticate(response.credential)
    files = BlobCache(tmp_path)
    size = response.run.head.nbytes + response.run.state.nbytes
    with pytest.raises(RefusedByDevice):
        RunModel.download(client, response.run, files, policy=DevicePolicy(max_download=size - 1))
    assert list(tmp_path.iterdir()) == []
    policy = DevicePolicy(max_download=size)
    model = RunModel.download(client, response.run, files, policy=policy)
    before = client.traffic().total()
    huge = FILE.model_copy(update={"nbytes": 10**9})
    for head, state in ((huge, response.run.state), (None, huge)):
        assignment = Assignment(
            task=Task.TRAIN, round=1, state=state, head=head, status=RunStatus.RUNNING
        )
        with pytest.raises(RefusedByDevice, match="--max-download"):
            model.update(assignment)
    assert client.traffic().total() == before
    client.close()


def test_the_usual_run_is_within_the_usual_limits() -> None:
    """Tried: nothing. The default policy lets in the default form and the paper's."""
    DevicePolicy().check_run(run_view())
    DevicePolicy(require_tls=True).check_address("HTTPS://node:8500")
    DevicePolicy().check_run(run_view().model_copy(update={"plan": RunSettings().plan}))
