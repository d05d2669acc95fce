"""Weights from a model hub, downloaded by timm over HTTP from a hub on this machine."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from split_model.backbone.libraries import timm

NAME, PICKLED_NAME = "vit_tiny_patch16_224", "deit_tiny_patch16_224"

# Prepares a backbone for each line of standard input: its name and a folder.
PREPARE = """
import sys
from protocol.plan import ModelPlan
from split_model.backbone.weights import prepare_backbone
from split_model.errors import WeightSourceError
for line in sys.stdin:
    name, folder = line.split()
    settings = ModelPlan(backbone=name, image_size=224, cut=1, num_classes=3)
    try:
        print(prepare_backbone(settings, "hub", folder).path, flush=True)
    except WeightSourceError as error:
        print("refused", " ".join(f"{error.field}: {error}".split()), flush=True)
"""

Prepare = Callable[[str, Path], str]


class Hub(ThreadingHTTPServer):
    """Serves files as a model hub does: under a repository's name, with a commit and a hash."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.requests: list[str] = []
        super().__init__(("127.0.0.1", 0), HubHandler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._respond(with_body=False)

    def do_GET(self) -> None:
        self._respond(with_body=True)

    def _respond(self, *, with_body: bool) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
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
        if with_body:
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """The weights on the hub: a whole model with its classifier."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return dict(timm.create_model(NAME).state_dict())


@pytest.fixture(scope="module")
def hub(published: dict[str, torch.Tensor]) -> Iterator[Hub]:
    """Has one model as safetensors, and another only as a pickle."""
    content = save(published)
    safe, pickled = (timm.get_pretrained_cfg(name).hf_hub_id for name in (NAME, PICKLED_NAME))
    files = {
        f"/{safe}/resolve/main/model.safetensors": content,
        f"/{pickled}/resolve/main/pytorch_model.bin": content,
    }
    with Hub(files) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def prepare(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepare]:
    """Calls `prepare_backbone` in a process, since the hub's library reads its address on import.

    Returns the backbone's path, or "refused" and the error.
    """
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path_factory.mktemp("hub")),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    with subprocess.Popen(
        [sys.executable, "-c", PREPARE],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def prepared(name: str, folder: Path) -> str:
            print(name, folder, file=stdin, flush=True)
            return stdout.readline().strip()

        yield prepared


def test_weights_are_downloaded_once_and_without_the_classifier(
    hub: Hub, prepare: Prepare, published: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = prepare(NAME, tmp_path)
    backbone = load_file(path)
    assert set(backbone) == {name for name in published if not name.startswith("head.")}
    for name, tensor in backbone.items():
        assert torch.equal(tensor, published[name]), name
    requests = len(hub.requests)
    assert requests > 0
    assert prepare(NAME, tmp_path) == path
    assert len(hub.requests) == requests


def test_pickled_weights_are_not_downloaded(hub: Hub, prepare: Prepare, tmp_path: Path) -> None:
    message = prepare(PICKLED_NAME, tmp_path)
    assert message.startswith("refused model.weights: the source does not give the weights")
    assert f"weights for {PICKLED_NAME}" in message
    repository = timm.get_pretrained_cfg(PICKLED_NAME).hf_hub_id
    requests = [request for request in hub.requests if repository in request]
    assert requests
    assert not [request for request in requests if "pytorch_model" in request]
    assert not list(tmp_path.glob("*.safetensors"))
