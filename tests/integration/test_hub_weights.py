"""Weights from a model hub, by timm's own way there: a hub on this machine, over HTTP."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from split_model.backbone.libraries import timm

NAME = "vit_tiny_patch16_224"

PREPARE = """
import sys
from protocol.plan import ModelPlan
from split_model import WeightSourceError, prepare_backbone
settings = ModelPlan(backbone=sys.argv[1], image_size=224, cut=1, num_classes=3)
try:
    print(prepare_backbone(settings, "hub", sys.argv[2]).path)
except WeightSourceError as error:
    sys.exit(f"{error.field}: {error}")
"""


class Hub(ThreadingHTTPServer):
    """Serves files as a model hub does: under a repository's name, with a commit and a hash."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), Answer)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        content = self.server.files.get(self.path)
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Nothing on the tests' screen."""


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """What the hub has: a model with a classifier of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return dict(timm.create_model(NAME).state_dict())


@pytest.fixture
def hub(published: dict[str, torch.Tensor]) -> Iterator[Hub]:
    repository = timm.get_pretrained_cfg(NAME).hf_hub_id
    with Hub({f"/{repository}/resolve/main/model.safetensors": save(published)}) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def prepared(name: str, hub: Hub, folder: Path) -> subprocess.CompletedProcess[str]:
    # A process of its own: the hub's address is read when its library is imported.
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", PREPARE, name, str(folder / "backbones")]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_weights_come_from_the_hub_without_the_classifier_and_once(
    hub: Hub, published: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    done = prepared(NAME, hub, tmp_path)
    assert done.returncode == 0, done.stderr
    backbone = load_file(done.stdout.strip())
    assert set(backbone) == {name for name in published if not name.startswith("head.")}
    for name, tensor in backbone.items():
        assert torch.equal(tensor, published[name]), name
    known = len(hub.asked)
    assert known > 0
    assert prepared(NAME, hub, tmp_path).stdout == done.stdout
    assert len(hub.asked) == known


def test_weights_that_would_have_to_be_unpickled_are_not_fetched(hub: Hub, tmp_path: Path) -> None:
    [(path, content)] = hub.files.items()
    hub.files = {path.replace("model.safetensors", "pytorch_model.bin"): content}
    done = prepared(NAME, hub, tmp_path)
    assert done.returncode == 1
    assert "model.weights: the source does not give the weights" in done.stderr
    assert f"weights for {NAME}" in done.stderr
    assert not [asked for asked in hub.asked if "pytorch_model" in asked]
    assert not list(tmp_path.glob("backbones/*.safetensors"))
