"""A server with small limits, and participants of its runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from protocol.messages import Task
from tests.support.federation import run_settings
from tests.support.server import ApiClient, RunningServer, running_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("node")
    with running_server(folder, max_frame_mib=1, queue_mib=1, body_timeout_s=2.0) as running:
        yield running


@pytest.fixture(scope="module")
def run(server: RunningServer) -> str:
    return server.operator().create(run_settings(min_participants=2)).id


@pytest.fixture(scope="module")
def member(server: RunningServer, run: str) -> ApiClient:
    api = server.api(server.api().join(run, "a").credential)
    server.api().join(run, "b")
    return api


@pytest.fixture(scope="module")
def cut_member(server: RunningServer) -> ApiClient:
    """A participant of a run with prompts at the cut; the server stores its samples."""
    settings = run_settings(prompt_at="cut", wire={"keep_smashed": True})
    run = server.operator().create(settings, key="cut-member").id
    api = server.api(server.api().join(run, "a").credential)
    assert api.assignment(run).task is Task.TRAIN
    return api
