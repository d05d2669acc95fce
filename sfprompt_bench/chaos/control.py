"""A process's control page: its clock's offset, and the point at which it is killed.

The parent writes the page, the child reads it in each of the patched calls. The production code
has no part in this: the child patches functions of Python and SQLAlchemy that the code calls.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PAGE = struct.Struct("<dii")  # the clock's offset in s, the point's number, calls until the kill

_FIRED = -1  # in place of the calls

_FILE_POINTS = (
    "before sync",
    "after sync",
    "before rename",
    "after rename",
    "before deletion",
    "after deletion",
)

SERVER_POINTS = ("before commit", "after commit", *_FILE_POINTS)

DEVICE_POINTS = _FILE_POINTS[:4]

_NUMBERS = {point: number for number, point in enumerate(SERVER_POINTS, start=1)}


class ControlPage:
    """The page of one process, in a file that parent and child map.

    Args:
        path: of the file; created if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, _PAGE.size)
            self._map = mmap.mmap(descriptor, _PAGE.size)
        finally:
            os.close(descriptor)

    def set_clock(self, offset_s: float) -> None:
        """Make the process's clock jump to this offset from the system's."""
        struct.pack_into("<d", self._map, 0, offset_s)

    def clock_offset(self) -> float:
        """Return the clock's offset in seconds."""
        return float(struct.unpack_from("<d", self._map, 0)[0])

    def arm(self, point: str, calls: int) -> None:
        """Kill the process at this point, in so many calls from now."""
        struct.pack_into("<ii", self._map, 8, _NUMBERS[point], calls)

    def disarm(self) -> None:
        """Kill the process at no point; the restarted process must not be killed."""
        struct.pack_into("<ii", self._map, 8, 0, 0)

    def has_fired(self) -> bool:
        """Whether the process died at its point."""
        return bool(_PAGE.unpack_from(self._map)[2] == _FIRED)

    def pass_point(self, point: str) -> None:
        """Die here if the parent has ordered it."""
        _, number, calls = _PAGE.unpack_from(self._map)
        if number != _NUMBERS[point]:
            return
        if calls > 1:
            struct.pack_into("<ii", self._map, 8, number, calls - 1)
        else:
            struct.pack_into("<ii", self._map, 8, 0, _FIRED)
            os.kill(os.getpid(), signal.SIGKILL)


def follow_page(page: ControlPage) -> None:
    """Patch this process's clock, file operations and commits to follow the page."""
    real_time = time.time

    def skewed() -> float:
        return real_time() + page.clock_offset()

    _patch(time, "time", skewed)
    for name, word in (("fsync", "sync"), ("replace", "rename"), ("unlink", "deletion")):
        _patch(os, name, _passing(page, getattr(os, name), word))


def follow_page_in_server(page: ControlPage) -> None:
    """The same for what only the server has: its clock, and its database's transactions."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine
    from sqlalchemy.orm import Session

    from split_server.runtime.process import Clock

    defaults: Any = Clock.__init__
    defaults.__defaults__ = (time.monotonic, time.time)  # bound before the patch
    event.listen(Engine, "commit", lambda _connection: page.pass_point("before commit"))
    event.listen(Session, "after_commit", lambda _session: page.pass_point("after commit"))


def _patch(module: Any, name: str, function: Callable[..., Any]) -> None:
    setattr(module, name, function)


def _passing(page: ControlPage, function: Callable[..., Any], word: str) -> Callable[..., Any]:
    def passing(*args: Any, **kwargs: Any) -> Any:
        page.pass_point(f"before {word}")
        result = function(*args, **kwargs)
        page.pass_point(f"after {word}")
        return result

    return passing
