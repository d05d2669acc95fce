"""What tests of data sets share: a machine that nothing can be fetched from."""

from __future__ import annotations

from urllib.error import URLError

import pytest


def cut_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every download of torchvision fail, as it does where there is no network."""

    def refuse(*_: object, **__: object) -> None:
        raise URLError("no network here")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
