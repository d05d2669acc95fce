"""A machine's cores, divided between the server and its clients."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Cores:
    """A machine's cores, divided.

    Attributes:
        server: of the server, and of the loop that it is compared with.
        clients: of all clients together; the server's if there is only one core.
        pinned: whether processes can be pinned to their cores on this machine.
    """

    server: tuple[int, ...]
    clients: tuple[int, ...]
    pinned: bool = True

    @property
    def shared(self) -> bool:
        """Whether clients take processor time from the server."""
        return not self.pinned or bool(set(self.server) & set(self.clients))

    @property
    def threads(self) -> int:
        """CPU threads of the body, and of the loop."""
        return len(self.server)


def divide_cores() -> Cores:
    """Divide the cores of this process: a quarter, at least one, for the clients."""
    if not hasattr(os, "sched_getaffinity"):
        return divide(range(os.cpu_count() or 1), pinned=False)
    return divide(sorted(os.sched_getaffinity(0)), pinned=True)


def divide(cores: Sequence[int], *, pinned: bool) -> Cores:
    """Divide some cores; a single one is shared."""
    if len(cores) == 1:
        return Cores(tuple(cores), tuple(cores), pinned)
    clients = max(1, len(cores) // 4)
    return Cores(tuple(cores[:-clients]), tuple(cores[-clients:]), pinned)


@contextmanager
def pinned_to(cores: Sequence[int]) -> Iterator[None]:
    """Pin the threads and processes that start in the block to these cores."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
