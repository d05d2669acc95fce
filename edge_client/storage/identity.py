"""Who this device is to a run, remembered so that a restart is not a second participant."""

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
    """The key of a device's joining, by server, run and device name.

    A device that joins again with the same key gets the same participant and credential. The file
    is locked as long as the process lives, so that two processes are never one participant.

    Args:
        folder: where keys are kept, readable by this user alone.

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
                hint="give each its own --name",
            ) from None
        os.fchmod(self._file.fileno(), 0o600)  # whoever has the key can get the credential
        self._known = {"url": url, "run": run, "name": name, **_known_in(self._file.read())}
        if "key" not in self._known:
            self._known["key"] = uuid.uuid4().hex
            self._write()
        self.key: str = self._known["key"]

    @property
    def credential(self) -> str | None:
        """What the server gave when this device joined; None: it has not."""
        return self._known.get("credential")

    def renew(self) -> None:
        """Be somebody else to the run from now on: another key, and no credential yet."""
        self._known["key"] = self.key = uuid.uuid4().hex
        self._known.pop("credential", None)
        self._write()

    def remember(self, credential: str) -> None:
        """Keep the credential, so that the device can leave when it does not take part."""
        if credential != self.credential:
            self._known["credential"] = credential
            self._write()

    def __enter__(self) -> Identity:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Let another process take part under this name."""
        self._file.close()

    def _write(self) -> None:
        """Put a whole file into the place of the old one; it is locked before it is there."""
        opened: list[IO[str]] = []

        def write(path: Path) -> None:
            file = path.open("r+")
            opened.append(file)
            fcntl.flock(file, fcntl.LOCK_EX)
            json.dump(self._known, file)
            file.flush()

        try:
            write_durably(self._path, write, mode=0o600)
        except BaseException:
            for file in opened:
                with contextlib.suppress(OSError):  # what it could not write before, it cannot now
                    file.close()
            raise
        self._file.close()
        (self._file,) = opened


def credential_of(folder: Path, url: str, run: str, name: str) -> str | None:
    """What the server gave the device of this name, which may be taking part; None: nothing yet.

    Needs no lock: a whole file is put into the place of the old one.
    """
    path = _path_of(folder, url.rstrip("/"), run, name)
    return _known_in(path.read_text()).get("credential") if path.exists() else None


def _path_of(folder: Path, url: str, run: str, name: str) -> Path:
    digest = hashlib.sha256("\n".join((url, run, name)).encode()).hexdigest()[:24]
    return folder / f"{digest}.json"


def _locked(path: Path) -> IO[str]:
    """The file at this path, made if it is not there, open and locked.

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
        file.close()  # its holder has put another into its place meanwhile


def _known_in(text: str) -> dict[str, str]:
    """Key and credential in an identity's file.

    A file that was cut off in writing the key was never joined with.
    """
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    own = {name: found.get(name) for name in ("key", "credential")}
    return {name: value for name, value in own.items() if isinstance(value, str) and value}


def device_secret(folder: Path) -> bytes:
    """32 bytes that never leave this device, made when they are first asked for.

    Args:
        folder: where they are kept, readable by this user alone.
    """
    path = folder / "device.secret"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        own = folder / f".{uuid.uuid4().hex}.secret"
        write_durably(own, secrets.token_bytes(_SECRET_BYTES), mode=0o600)
        with contextlib.suppress(FileExistsError):  # another process was faster: its secret counts
            os.link(own, path)
        own.unlink()
        sync_folder(folder)
    secret = path.read_bytes()
    if len(secret) != _SECRET_BYTES:
        raise Conflict(
            "the device's secret is damaged",
            field="device.secret",
            limit=_SECRET_BYTES,
            value=len(secret),
            hint=f"delete {path}; samples are then sent once more",
        )
    return secret
