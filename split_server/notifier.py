"""Wakes those who wait for something to happen in a run."""

from __future__ import annotations

import asyncio


class Notifier:
    """One event per run. Notified from any thread, awaited on one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: dict[str, asyncio.Event] = {}
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether the server is shutting down: nobody should go on waiting."""
        return self._closed

    def ticket(self, run: str) -> asyncio.Event:
        """Take this *before* looking at the run: a change in between then still wakes."""
        if self._closed:
            done = asyncio.Event()
            done.set()
            return done
        return self._events.setdefault(run, asyncio.Event())

    def notify(self, run: str) -> None:
        """Something has changed in a run. Safe from any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake, run)

    def close(self) -> None:
        """Wake everybody for good."""
        self._closed = True
        for run in list(self._events):
            self._wake(run)

    def _wake(self, run: str) -> None:
        event = self._events.pop(run, None)
        if event is not None:
            event.set()


async def wait_for(ticket: asyncio.Event, seconds: float) -> bool:
    """Wait until the ticket is called; False: the time ran out first."""
    if seconds <= 0:
        return ticket.is_set()
    try:
        async with asyncio.timeout(seconds):
            await ticket.wait()
    except TimeoutError:
        return False
    return True
