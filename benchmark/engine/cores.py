"""Which processor cores belong to the server and which to its clients."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Cores:
    """A machine's cores, divided.

    Attributes:
        server: of the server, and of the loop that it is measured against.
        clients: of all devices together; the server's own where there is no other.
        pinned: whether processes can be held on their cores here.
    """

    server: tuple[int, ...]
    clients: tuple[int, ...]
    pinned: bool = True

    @property
    def shared(self) -> bool:
        """Whether clients take time from the server."""
        return not self.pinned or bool(set(self.server) & set(self.clients))

    @property
    def threads(self) -> int:
        """CPU threads of the body, and of the loop."""
        return len(self.server)


def divide_cores() -> Cores:
    """The cores that this process may use: a quarter for the clients, one at least."""
    if not hasattr(os, "sched_getaffinity"):
        every = tuple(range(os.cpu_count() or 1))
        return _divided(every, pinned=False)
    return _divided(sorted(os.sched_getaffinity(0)), pinned=True)


def _divided(every: Sequence[int], *, pinned: bool) -> Cores:
    if len(every) == 1:
        return Cores(tuple(every), tuple(every), pinned)
    clients = max(1, len(every) // 4)
    return Cores(tuple(every[:-clients]), tuple(every[-clients:]), pinned)


@contextmanager
def held_on(cores: Sequence[int]) -> Iterator[None]:
    """Whatever is started within, thread or process, stays on these cores."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
