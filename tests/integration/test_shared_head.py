"""A device with the head of one run downloads nothing to get that of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_client.run_model import RunModel
from edge_client.storage.blob_cache import BlobCache
from edge_client.transport.client import Server
from protocol.messages import JoinRequest
from tests.support.federation import run_settings
from tests.support.server import RunningServer, running_server

NEXT_RUN = {"num_classes": 6, "prompt_count": 7, "prompt_at": "cut", "prompt_depth": "deep"}


def download(server: RunningServer, folder: Path, **model: Any) -> tuple[RunModel, int]:
    """Create a run, join it and download its model; return it and the bytes for its head."""
    plan = run_settings(wire={"head": "int4"})
    plan = plan.model_copy(update={"model": plan.model.replace(**model)})
    run = server.operator().create(plan, key=str(model)).id
    client = Server(server.url)
    classes = plan.model.num_classes
    request = JoinRequest(name="a", train_samples=1, test_samples=0, num_classes=classes)
    response = client.join(run, request, "key")
    client.authenticate(response.credential)
    loaded = RunModel.download(client, response.run, BlobCache(folder))
    client.close()
    return loaded, client.traffic().to_dict().get("download", {"down": 0})["down"]


def test_the_head_of_another_run_is_not_downloaded_again(tmp_path: Path) -> None:
    with running_server(tmp_path / "server") as server:
        first, nbytes = download(server, tmp_path / "device")
        assert nbytes > first.head.nbytes
        second, nbytes = download(server, tmp_path / "device", **NEXT_RUN)
    assert second.head == first.head
    assert nbytes == 0
