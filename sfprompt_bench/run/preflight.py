"""What a run needs of the machine, checked before anything is started."""

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

from protocol.errors import Conflict, NotFound, SFPromptError

_NEEDED_BYTES = 500 * 1024 * 1024  # weights, their conversion, states and logs

PACKAGES = ("fastapi", "uvicorn", "sqlalchemy", "onnx", "matplotlib", "sklearn")


def check_disk(folder: Path) -> None:
    """Raises `SFPromptError` if too little is free where the run is to be written."""
    free = shutil.disk_usage(folder).free
    if free < _NEEDED_BYTES:
        raise SFPromptError(
            f"too little space is free for a run in {folder}",
            field="disk",
            limit=_NEEDED_BYTES,
            value=free,
            hint="free some space, or choose another place with --out",
        )


def make_run_folder(wanted: Path | None, name: str) -> Path:
    """``wanted``, or runs/NAME-TIME; made, and with room for a run. Raises as `check_disk` does."""
    folder = wanted or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(parents=True, exist_ok=True)
    check_disk(folder)
    return folder


def check_packages(needed: Sequence[str] = PACKAGES) -> None:
    """Raises `NotFound` if an extra that brings one of these was not installed."""
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise NotFound(
            "packages are missing",
            field="packages",
            value=missing,
            hint='install the extras, from a checkout: pip install ".[bench]"',
        )


def choose_port(wanted: int) -> int:
    """``wanted`` if it is free, or for 0 any free port on loopback.

    Raises:
        Conflict: something listens there already.
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
                hint="stop what listens there, or give another --port (0: any free one)",
            ) from error
        return int(probe.getsockname()[1])


_WHOLE = frozenset({".whl", ".safetensors", ".json"})  # and nothing that is being written


@contextmanager
def shared_backbones(data_dir: Path) -> Iterator[None]:
    """A server's folder with the backbones that are here; what it adds is kept for later runs.

    Its files never change once they have their names, so that both places can hold the same.
    """
    from edge_client.data.download import cache_dir  # imports torch, which a help text need not

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
