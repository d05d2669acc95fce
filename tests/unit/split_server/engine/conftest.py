"""A small backbone and engines for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from split_server.models.body_key import BodyKey
from tests.support.engine import DEPTHS, Case, MakeEngine, engines, prepare_backbone
from tests.support.federation import run_settings


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_backbone(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(scope="session")
def key(backbone: Path) -> BodyKey:
    """The body of a run with prompts at the input."""
    return BodyKey.of(str(backbone), run_settings())


@pytest.fixture(scope="module")
def make() -> Iterator[MakeEngine]:
    """Makes engines; all of a file share their bodies."""
    with engines() as make_engine:
        yield make_engine


@pytest.fixture(params=DEPTHS)
def case(request: pytest.FixtureRequest, backbone: Path) -> Case:
    """A run with its prompts at the cut."""
    return Case(backbone, request.param)
