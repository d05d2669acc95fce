"""A device's identity: stable over restarts, locked by one process, readable by its user only."""

import fcntl
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest

from edge_client.storage import identity as module
from edge_client.storage.identity import Identity, credential_of
from protocol.errors import Conflict

URL = "http://node:8500"


def key(folder: Path, url: str = URL, run: str = "run", name: str = "device") -> str:
    with Identity(folder, url, run, name) as identity:
        return identity.key


def test_the_key_survives_a_restart(tmp_path: Path) -> None:
    first = key(tmp_path)
    assert key(tmp_path) == first
    assert key(tmp_path, url=URL + "/") == first
    assert len(first) == 32


def test_every_server_run_and_name_has_its_own(tmp_path: Path) -> None:
    keys = {
        key(tmp_path),
        key(tmp_path, url="http://other:8500"),
        key(tmp_path, run="other"),
        key(tmp_path, name="other"),
        key(tmp_path / "elsewhere"),
    }
    assert len(keys) == 5


def test_a_second_process_under_the_name_is_refused(tmp_path: Path) -> None:
    program = (
        "import pathlib\nfrom edge_client.storage.identity import Identity\n"
        "for name in ('device-2', 'device'):\n"
        f"    Identity(pathlib.Path({str(tmp_path)!r}), {URL!r}, 'run', name)\n"
        "    print(name)"
    )
    with Identity(tmp_path, URL, "run", "device"):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
        )
    assert done.returncode == 1
    assert "another process on this device" in done.stderr
    assert done.stdout == "device-2\n"
    key(tmp_path)


def test_refused_within_one_process_too(tmp_path: Path) -> None:
    with Identity(tmp_path, URL, "run", "device"), pytest.raises(Conflict) as caught:
        Identity(tmp_path, URL, "run", "device")
    assert (caught.value.field, caught.value.value) == ("name", "device")


def test_only_this_user_reads_it(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        key(tmp_path / "identities")
    finally:
        os.umask(old)
    (file,) = (tmp_path / "identities").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    file.chmod(0o644)
    key(tmp_path / "identities")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("damaged", ["", "{", '{"url": "http', "[]", "null", '{"key": 5}', "{}"])
def test_an_incomplete_file_is_replaced(tmp_path: Path, damaged: str) -> None:
    """The key is on the disk before it is used: a broken file was never joined with."""
    key(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(damaged)
    assert key(tmp_path) == key(tmp_path) == json.loads(file.read_text())["key"]


def test_a_credential_that_cannot_be_written_does_not_cost_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(known: Any, file: IO[str]) -> None:
        file.write(json.dumps(known)[:20])
        file.flush()
        raise OSError("no space left")

    with Identity(tmp_path, URL, "run", "device") as identity:
        first = identity.key
        with monkeypatch.context() as broken:
            broken.setattr(module.json, "dump", cut_off)
            with pytest.raises(OSError, match="no space"):
                identity.remember("secret")
        with pytest.raises(Conflict):  # it is locked as before
            Identity(tmp_path, URL, "run", "device")
    assert len(list(tmp_path.iterdir())) == 1
    assert key(tmp_path) == first


def test_the_credential_survives_a_restart_and_its_file_stays_locked(
    tmp_path: Path,
) -> None:
    for credential in ("first", "second"):
        with Identity(tmp_path, URL, "run", "device") as identity:
            identity.remember(credential)
            with pytest.raises(Conflict):
                Identity(tmp_path, URL, "run", "device")
    assert credential_of(tmp_path, URL + "/", "run", "device") == "second"
    assert credential_of(tmp_path, URL, "run", "another") is None


def test_no_lock_is_taken_of_a_file_that_another_has_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process has opened the file; before it locks it, another joins and remembers."""
    holder, real = Identity(tmp_path, URL, "run", "device"), fcntl.flock
    tries: list[int] = []

    def late(file: Any, how: int) -> None:
        tries.append(how)
        if len(tries) == 1:
            holder.remember("secret")
        real(file, how)

    monkeypatch.setattr(module.fcntl, "flock", late)
    with holder, pytest.raises(Conflict):
        Identity(tmp_path, URL, "run", "device")
    assert len(tries) == 3, "the holder's new file, the old one, and the new one once more"
