"""Small file systems in memory that can be filled, without root where the system allows it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from pathlib import Path

from protocol.errors import SFPromptError

_MIB = 1024 * 1024

_BALLAST = "ballast"

_HOLD = """
mount -t tmpfs -o size="$1" tmpfs "$2" && mount -t tmpfs -o size="$1" tmpfs "$3" &&
echo ready && exec cat
"""


class SmallDisks:
    """Two file systems, for the server and for the devices, in a mount namespace of a process.

    The process is `cat` in a user and mount namespace of its own, where an ordinary user may mount
    a tmpfs. It ends when its standard input closes, at the latest with this process, and both file
    systems end with it. Other processes `enter` its namespaces, or reach the files through its root
    in ``/proc``.

    Args:
        folder: where the mount points are created.
        mib: size of each.

    Attributes:
        server, devices: the mount points, in the namespace.

    Raises:
        SFPromptError: the system does not allow it.
    """

    def __init__(self, folder: Path, mib: int) -> None:
        points = [(folder / name).absolute() for name in ("server-disk", "device-disk")]
        for point in points:
            point.mkdir(parents=True, exist_ok=True)
        command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", _HOLD]
        command += ["sh", str(mib * _MIB), *map(str, points)]
        try:
            self._holder = subprocess.Popen(  # noqa: S603 - a fixed command with our own paths
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            raise SFPromptError(f"unshare cannot be run ({error})", field="disk") from error
        if self._holder.stdout is None or self._holder.stdout.readline() != b"ready\n":
            self.close()
            raise SFPromptError("this system allows no mount in a user namespace", field="disk")
        self.server, self.devices = points
        self.namespace = self._holder.pid  # for `enter`

    def outside(self, path: Path) -> Path:
        """Return the path by which a process outside the namespace reaches a file."""
        return Path(f"/proc/{self._holder.pid}/root") / path.relative_to("/")

    def close(self) -> None:
        """Remove both file systems, with their files."""
        for pipe in (self._holder.stdin, self._holder.stdout):
            if pipe is not None:
                pipe.close()
        self._holder.wait()


def enter(namespace: int) -> None:
    """Enter the user and mount namespace of a process; this one must have a single thread.

    Raises:
        OSError: the system does not allow it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in ("user", "mnt"):
        descriptor = os.open(f"/proc/{namespace}/ns/{kind}", os.O_RDONLY)
        try:
            if libc.setns(descriptor, 0) != 0:
                raise OSError(ctypes.get_errno(), "a namespace cannot be entered", kind)
        finally:
            os.close(descriptor)


def fill(folder: Path, spare_bytes: int) -> None:
    """Fill the file system of a folder up to ``spare_bytes``."""
    free = os.statvfs(folder)
    size = free.f_bavail * free.f_frsize - spare_bytes
    if size <= 0:
        return
    descriptor = os.open(folder / _BALLAST, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        with contextlib.suppress(OSError):  # somebody wrote meanwhile: it is full already
            os.posix_fallocate(descriptor, 0, size)
    finally:
        os.close(descriptor)


def empty(folder: Path) -> None:
    """Make the room that `fill` has taken free again."""
    (folder / _BALLAST).unlink(missing_ok=True)
