"""Backbones that runs on this machine have in common: fetched and converted once."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_client.data.places import cache_dir

_WHOLE = frozenset({".whl", ".safetensors", ".json"})  # and nothing that is being written


@contextmanager
def shared_backbones(data_dir: Path) -> Iterator[None]:
    """A server's folder with the backbones that are here; what it adds is kept for later runs.

    Its files never change once they have their names, so that both places can hold the same.
    """
    common, own = cache_dir() / "backbones", data_dir / "backbones"
    _share(common, own)
    try:
        yield
    finally:
        _share(own, common)


def _share(source: Path, target: Path) -> None:
    files = [file for file in source.glob("*") if file.suffix in _WHOLE]
    if files:
        target.mkdir(parents=True, exist_ok=True)
    for file in files:
        if not (target / file.name).exists():
            _put(file, target / file.name)


def _put(file: Path, place: Path) -> None:
    try:
        place.hardlink_to(file)
    except FileExistsError:  # another run was faster
        return
    except OSError:  # another disk, or one without links
        number, temporary = tempfile.mkstemp(dir=place.parent)
        os.close(number)
        shutil.copyfile(file, temporary)
        Path(temporary).replace(place)
