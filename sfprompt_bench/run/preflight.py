"""Preparation of a run: disk space, packages, a free port, and backbones from a shared cache."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from edge_client.data.download import cache_dir
from protocol.errors import Conflict, NotFound, SFPromptError

_NEEDED_BYTES = 500 * 1024 * 1024  # weights, their conversion, states and logs

PACKAGES = ("fastapi", "uvicorn", "sqlalchemy", "onnx", "matplotlib", "sklearn")


def check_disk(folder: Path) -> None:
    """Raise `SFPromptError` if the folder's disk has too little free space for a run."""
    free = shutil.disk_usage(folder).free
    if free < _NEEDED_BYTES:
        raise SFPromptError(
            f"there is too little free disk space for a run in {folder}",
            field="disk",
            limit=_NEEDED_BYTES,
            value=free,
            hint="free some space, or choose another folder with --out",
        )


def make_run_folder(wanted: Path | None, name: str) -> Path:
    """Create ``wanted`` or runs/NAME-TIME and check its space. Raises as `check_disk` does."""
    folder = wanted or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(parents=True, exist_ok=True)
    check_disk(folder)
    return folder


def check_packages(needed: Sequence[str] = PACKAGES) -> None:
    """Raise `NotFound` if a package of an extra is not installed."""
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise NotFound(
            "packages are missing",
            field="packages",
            value=missing,
            hint='install the extras, from a checkout: pip install ".[bench]"',
        )


def choose_port(wanted: int) -> int:
    """Check that ``wanted`` is free on loopback, or choose a free port for 0.

    Raises:
        Conflict: the port is in use.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError as error:
            raise Conflict(
                f"port {wanted} cannot be used ({error.strerror})",
                field="port",
                value=wanted,
                hint="stop the program on this port, or choose another --port (0: any free port)",
            ) from error
        return int(probe.getsockname()[1])


_FINISHED = frozenset({".whl", ".safetensors", ".json"})  # partial files have other suffixes


@contextmanager
def shared_backbones(data_dir: Path) -> Iterator[None]:
    """Put cached backbones into a server's folder, and cache those that it adds.

    Backbone files do not change once they have their names, so that both folders can link to them.
    """
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
