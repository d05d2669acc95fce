"""A federation on a real database in a temporary folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.federation import FederationHarness


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[FederationHarness]:
    with closing(FederationHarness(tmp_path)) as opened:
        yield opened
