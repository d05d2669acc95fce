"""What another user of the server's machine tries on the data folder, and what stops it."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import httpx
import pytest

from sfprompt_bench.run.preflight import choose_port
from tests.support.federation import OPERATOR, run_settings
from tests.support.processes import CommandProcess
from tests.support.server import ApiClient

KEY = "0123456789abcdef-the-key-of-a-device"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of a server that has run as a process, with the usual umask."""
    base = tmp_path_factory.mktemp("node")
    data_dir, port = base / "data", choose_port(0)
    data_dir.mkdir(mode=0o755)
    url = f"http://127.0.0.1:{port}"
    (base / "token").write_text(f"{OPERATOR}\n")
    words = ["serve", "--port", str(port), "--data-dir", str(data_dir), "--torch-threads", "1"]
    words += ["--operator-token-file", str(base / "token")]
    server = CommandProcess("split_server.cli", words, base / "server.log")
    operator = ApiClient(url, OPERATOR)
    try:
        _wait_until_it_answers(url, server)
        run = operator.create(run_settings(min_participants=9)).id
        operator.join(run, "kitchen", key=KEY)
    finally:
        operator.close()
        server.stop()
    return data_dir


def _wait_until_it_answers(url: str, server: CommandProcess) -> None:
    for _ in range(600):
        assert server.exit_code() is None, server.last_lines()
        try:
            httpx.get(f"{url}/v1/health", trust_env=False)
        except httpx.TransportError:
            time.sleep(0.1)
        else:
            return


def test_no_other_user_can_read_a_file_or_list_a_folder(folder: Path) -> None:
    """Tried: another user of the machine reads database, states or secrets. Stopped by: files are
    0600 and folders 0700, whatever the umask is."""
    modes = {
        path.relative_to(folder).as_posix(): stat.S_IMODE(path.stat().st_mode)
        for path in [folder, *folder.rglob("*")]
    }
    assert len(modes) > 8
    assert {name: oct(mode) for name, mode in modes.items() if mode & 0o077} == {}


def test_no_file_has_a_devices_key(folder: Path) -> None:
    """Tried: a device's credential is taken with its join key, read from the database. Stopped by:
    keys are stored as hashes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.name.startswith("server.sqlite") for path in files)
    assert [path.name for path in files if KEY.encode() in path.read_bytes()] == []
