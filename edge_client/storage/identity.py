"""A device's identity in a run, stored so that a restart is not a second participant."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import uuid
from pathlib import Path
from typing import IO

from protocol.errors import Conflict
from split_model.files import sync_folder, write_durably

_SECRET_BYTES = 32


class Identity:
    """The idempotency key with which a device joins, by server, run and device name.

    Joining again with the same key gives the same participant and credential. The file is locked
    while the process lives, so that two processes are never the same participant.

    Args:
        folder: for the keys' files, readable by this user only.
        url: the server's address.
        run: the run's id.
        name: the device's name.

    Raises:
        Conflict: another process takes part under this name.
    """

    def __init__(self, folder: Path, url: str, run: str, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        url = url.rstrip("/")
        self._path = _path_of(folder, url, run, name)
        try:
            self._file = _locked(self._path)
        except BlockingIOError:
            raise Conflict(
                "another process on this device already takes part under this name",
                field="name",
                value=name,
                hint="give each process its own --name",
            ) from None
        os.fchmod(self._file.fileno(), 0o600)  # the key gives access to the credential
        self._stored = {"url": url, "run": run, "name": name, **_parse(self._file.read())}
        if "key" not in self._stored:
            self._stored["key"] = uuid.uuid4().hex
            self._write()
        self.key: str = self._stored["key"]

    @property
    def credential(self) -> str | None:
        """The credential of the device's join; None: it has not joined."""
        return self._stored.get("credential")

    def renew(self) -> None:
        """Become a new participant of the run: draw another key, forget the credential."""
        self._stored["key"] = self.key = uuid.uuid4().hex
        self._stored.pop("credential", None)
        self._write()

    def remember(self, credential: str) -> None:
        """Store the credential, so that the device can leave the run later."""
        if credential != self.credential:
            self._stored["credential"] = credential
            self._write()

    def __enter__(self) -> Identity:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Unlock the identity: another process may take part under this name."""
        self._file.close()

    def _write(self) -> None:
        """Replace the file atomically; the new one is locked before it is renamed."""
        opened: list[IO[str]] = []

        def write(path: Path) -> None:
            file = path.open("r+")
            opened.append(file)
            fcntl.flock(file, fcntl.LOCK_EX)
            json.dump(self._stored, file)
            file.flush()

        try:
            write_durably(self._path, write, mode=0o600)
        except BaseException:
            for file in opened:
                with contextlib.suppress(OSError):  # closing flushes, which fails again
                    file.close()
            raise
        self._file.close()
        (self._file,) = opened


def credential_of(folder: Path, url: str, run: str, name: str) -> str | None:
    """Return the credential of the device with this name; None: it has not joined.

    Needs no lock, because the file is replaced atomically: another process may be taking part.
    """
    path = _path_of(folder, url.rstrip("/"), run, name)
    return _parse(path.read_text()).get("credential") if path.exists() else None


def _path_of(folder: Path, url: str, run: str, name: str) -> Path:
    digest = hashlib.sha256("\n".join((url, run, name)).encode()).hexdigest()[:24]
    return folder / f"{digest}.json"


def _locked(path: Path) -> IO[str]:
    """Open the file, created if it does not exist, and lock it.

    Raises:
        BlockingIOError: another process has locked it.
    """
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # another process has replaced the file meanwhile


def _parse(text: str) -> dict[str, str]:
    """Return key and credential from an identity's file; none from a truncated one.

    The device cannot have joined with a key whose writing was interrupted.
    """
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    if not isinstance(content, dict):
        return {}
    fields = {name: content.get(name) for name in ("key", "credential")}
    return {name: value for name, value in fields.items() if isinstance(value, str) and value}


def device_secret(folder: Path) -> bytes:
    """Return the device's secret of 32 bytes, drawn at the first call. It never leaves the device.

    Args:
        folder: for the secret's file, readable by this user only.

    Raises:
        Conflict: the file is damaged.
    """
    path = folder / "device.secret"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        temporary = folder / f".{uuid.uuid4().hex}.secret"
        write_durably(temporary, secrets.token_bytes(_SECRET_BYTES), mode=0o600)
        with contextlib.suppress(FileExistsError):  # another process was faster: use its secret
            os.link(temporary, path)
        temporary.unlink()
        sync_folder(folder)
    secret = path.read_bytes()
    if len(secret) != _SECRET_BYTES:
        raise Conflict(
            "the device's secret is damaged",
            field="device.secret",
            limit=_SECRET_BYTES,
            value=len(secret),
            hint=f"delete {path}; the samples are then sent again",
        )
    return secret
