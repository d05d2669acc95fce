"""The device's secret: drawn once, also by concurrent processes, and readable by its user only."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from edge_client.storage.identity import device_secret
from protocol.errors import Conflict


def test_the_secret_is_created_once_and_readable_by_its_user_only(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        secret = device_secret(tmp_path / "home")
    finally:
        os.umask(old)
    assert len(secret) == 32
    assert device_secret(tmp_path / "home") == secret
    assert device_secret(tmp_path / "elsewhere") != secret
    (file,) = (tmp_path / "home").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_several_processes_at_once_have_the_same_secret(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys, time\n"
        "from edge_client.storage.identity import device_secret\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        f"print(device_secret(pathlib.Path({str(tmp_path / 'home')!r})).hex())\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:  # all are loaded: now at once
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    secrets_printed = {process.communicate(timeout=30)[0] for process in processes}
    assert secrets_printed == {device_secret(tmp_path / "home").hex() + "\n"}
    assert [file.name for file in (tmp_path / "home").iterdir()] == ["device.secret"]


@pytest.mark.parametrize("damaged", [b"", b"x" * 31, b"x" * 33])
def test_a_damaged_secret_is_an_error(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "device.secret").write_bytes(damaged)
    with pytest.raises(Conflict) as caught:
        device_secret(tmp_path)
    assert (caught.value.limit, caught.value.value) == (32, len(damaged))
