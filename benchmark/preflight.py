"""What a run needs of the machine, checked before anything is started."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import time
from collections.abc import Sequence
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


def run_folder(wanted: Path | None, name: str) -> Path:
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
