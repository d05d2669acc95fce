"""One server for all tests of a file; torch uses one thread, so that results are repeatable."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.server import RunningServer, running_server


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("node")


@pytest.fixture(scope="module")
def server(data_dir: Path) -> Iterator[RunningServer]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with running_server(data_dir) as running:
        yield running
    torch.set_num_threads(before)
