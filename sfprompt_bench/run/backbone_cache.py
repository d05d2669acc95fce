"""A cache of backbones that the servers of all runs share."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FINISHED = frozenset({".whl", ".safetensors", ".json"})  # partial files have other suffixes


@contextmanager
def shared_backbones(data_dir: Path) -> Iterator[None]:
    """Put cached backbones into a server's folder, and cache those that it adds.

    Backbone files do not change once they have their names, so that both folders can link to them.
    """
    from edge_client.data.download import cache_dir  # imports torch, which help texts do not need

    cache, server = cache_dir() / "backbones", data_dir / "backbones"
    _copy_missing(cache, server)
    try:
        yield
    finally:
        _copy_missing(server, cache)


def _copy_missing(source: Path, target: Path) -> None:
    files = [file for file in source.glob("*") if file.suffix in _FINISHED]
    if files:
        target.mkdir(parents=True, exist_ok=True)
    for file in files:
        if not (target / file.name).exists():
            _link_or_copy(file, target / file.name)


def _link_or_copy(file: Path, target: Path) -> None:
    try:
        target.hardlink_to(file)
    except FileExistsError:  # another run was faster
        return
    except OSError:  # another disk, or a file system without hard links
        number, temporary = tempfile.mkstemp(dir=target.parent)
        os.close(number)
        shutil.copyfile(file, temporary)
        Path(temporary).replace(target)
