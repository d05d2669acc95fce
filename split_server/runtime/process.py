"""The process: logging, clock, allocator and file descriptors."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from protocol.printable import printable

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None  # type: ignore[assignment]

# Options of mallopt, from glibc's malloc.h
_M_TRIM_THRESHOLD = -1

_M_MMAP_THRESHOLD = -3

_THRESHOLD_BYTES = 256 * 1024 * 1024

_MAX_DESCRIPTORS = 65_536

_DEFAULT_DESCRIPTORS = 8192  # where the system has no limit

request_id: ContextVar[str] = ContextVar("request_id", default="-")

_FORMAT = "%(asctime)s %(levelname)-7s %(request_id)s %(name)s: %(message)s"


class _OneLine(logging.Filter):
    """Add the request's id; keep names and paths of others from writing lines of their own."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        record.msg, record.args = printable(record.getMessage()), None
        return True


def set_up_logging(level: str) -> None:
    """Log messages of at least ``level`` to standard error, with the id of the request."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT))
    handler.addFilter(_OneLine())
    for name in ("split_server", "split_model", "tuning_methods", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False
    logging.getLogger("uvicorn.access").disabled = True  # the request middleware logs requests


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """Make every file that the block creates 0600 and every folder 0700, whichever library does."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def keep_large_buffers() -> bool:
    """Make glibc's allocator reuse large buffers; return whether the allocator is glibc's."""
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return all(
        mallopt(option, _THRESHOLD_BYTES) == 1 for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)
    )


@dataclass(frozen=True)
class Clock:
    """The current time, as two functions that tests can replace."""

    monotonic: Callable[[], float] = time.monotonic  # seconds, for durations
    wall: Callable[[], float] = time.time  # seconds since 1970, for dates


def raise_descriptor_limit() -> None:
    """Raise the limit of open files, which is often 1,024: each connection needs one."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < target:
        with contextlib.suppress(ValueError, OSError):  # some systems allow less than they report
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))


def descriptor_limit() -> int:
    """Return the current limit of open files."""
    if resource is None:
        return _DEFAULT_DESCRIPTORS
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
