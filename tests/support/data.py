"""Data set tests without a network."""

from __future__ import annotations

from urllib.error import URLError

import pytest


def cut_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torchvision's downloads fail, as without a network."""

    def refuse(*_: object, **__: object) -> None:
        raise URLError("no network here")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
