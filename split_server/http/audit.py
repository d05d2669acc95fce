"""The audit log: one line of JSON for each request that changes what the server stores."""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.types import Scope

from split_server.federation.credentials import (
    Anonymous,
    Identity,
    JoinTokenHolder,
    Operator,
    ParticipantIdentity,
)

AUDIT_FILE = "audit.log"

_MAX_BYTES, _BACKUPS = 10 * 1024 * 1024, 4

_READS = frozenset({"GET", "HEAD", "OPTIONS"})

_RUN = re.compile(r"/v1/runs/([^/]+)")

_MAX_PATH = 200  # characters

_ROLES: dict[type[Identity], str] = {
    Operator: "operator",
    JoinTokenHolder: "joiner",
    ParticipantIdentity: "participant",
    Anonymous: "stranger",
}


class AuditLog:
    """Appends to a file that its owner alone can read, and rotates it.

    Requests of the split plane are left out: what they change does not outlive the server. So are
    refused requests of strangers, who could push everything else out of the file.

    Args:
        path: of the file.
        wall: returns seconds since 1970.
    """

    def __init__(self, path: Path, wall: Callable[[], float]) -> None:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
        path.chmod(0o600)
        self._handler = logging.handlers.RotatingFileHandler(
            path, maxBytes=_MAX_BYTES, backupCount=_BACKUPS, encoding="utf-8"
        )
        self._wall = wall

    def record(self, scope: Scope, identity: Identity, status: int) -> None:
        """Write the line of a request, if it is one that changes something."""
        path = scope["path"]
        is_refused_stranger = isinstance(identity, Anonymous) and not 200 <= status < 400
        if scope["method"] in _READS or not path.startswith("/v1/runs") or is_refused_stranger:
            return
        client, run = scope.get("client"), _RUN.match(path)
        line: dict[str, Any] = {
            "time": round(self._wall(), 3),
            "role": _ROLES[type(identity)],
            "participant": getattr(identity, "participant", None),
            "address": client[0] if client else None,
            "route": f"{scope['method']} {path[:_MAX_PATH]}",
            "run": run[1][:_MAX_PATH] if run else None,
            "status": status,
        }
        text = json.dumps(line)  # in ASCII, and so in one line, whatever the path is
        self._handler.handle(logging.makeLogRecord({"msg": text, "name": __name__}))

    def close(self) -> None:
        """Close the file."""
        self._handler.close()
