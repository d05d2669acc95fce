"""The audit log says who changed what, and nobody writes into it but the server."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from split_server.federation.credentials import Anonymous, Operator
from split_server.http import audit
from split_server.http.audit import AUDIT_FILE, AuditLog
from tests.support.federation import run_settings
from tests.support.server import running_server

JOIN = "the-join-token"


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / AUDIT_FILE).read_text().splitlines()]


def test_each_change_of_a_run_has_a_line(tmp_path: Path) -> None:
    """Tried: a participant, an operator and a stranger change a run, and the stranger fills the log
    to push the others out. Stopped by: one line for each change, with role and address; refused
    requests of strangers have none."""
    with running_server(tmp_path, join_token=JOIN) as server:
        operator = server.operator()
        run = operator.create(run_settings(min_participants=9)).id
        device = server.api(server.api(JOIN).join(run).credential)
        device.call("GET", f"/v1/runs/{run}/assignment")
        device.call("POST", f"/v1/runs/{run}/cancel", key="k")
        server.api().call("POST", f"/v1/runs/{run}/cancel", key="k")
        operator.call("POST", f"/v1/runs/{run}/cancel", key="k")
        device.ask("infer", {})
    expected = [
        ("operator", None, "POST /v1/runs", None, 201),
        ("participant", "p0001", f"POST /v1/runs/{run}/participants", run, 201),
        ("participant", "p0001", f"POST /v1/runs/{run}/cancel", run, 403),
        ("operator", None, f"POST /v1/runs/{run}/cancel", run, 200),
    ]
    names = ("role", "participant", "route", "run", "status")
    assert [tuple(line[name] for name in names) for line in lines(tmp_path)] == expected
    assert all(line["address"] == "127.0.0.1" and line["time"] > 1e9 for line in lines(tmp_path))
    assert stat.S_IMODE((tmp_path / AUDIT_FILE).stat().st_mode) == 0o600


def test_a_path_forges_no_line(tmp_path: Path) -> None:
    """Tried: line breaks and escape characters in a path, to forge lines of the log. Stopped by:
    JSON, which writes them as codes."""
    log = AuditLog(tmp_path / AUDIT_FILE, lambda: 1.0)
    path = '/v1/runs/x"}\n{"role": "operator"}/cancel\u2028\x1b'
    log.record({"method": "POST", "path": path}, Operator(), 404)
    log.close()
    [line] = lines(tmp_path)
    assert (line["route"], line["status"]) == (f"POST {path}", 404)


def test_the_log_is_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried: requests without end, to fill the disk with the log. Stopped by: five files of a
    bounded size."""
    monkeypatch.setattr(audit, "_MAX_BYTES", 1000)
    log = AuditLog(tmp_path / AUDIT_FILE, lambda: 1.0)
    for number in range(100):
        scope = {"method": "POST", "path": f"/v1/runs/r{number}/cancel", "client": ("::1", 9)}
        log.record(scope, Anonymous(), 200)
    log.close()
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [AUDIT_FILE, *(f"{AUDIT_FILE}.{number}" for number in range(1, 5))]
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())
    assert lines(tmp_path)[-1]["run"] == "r99"
