"""Between threads and the event loop, without holding on to what passes.

`asyncio.wrap_future`, and with it `run_in_executor` and `asyncio.to_thread`, ties a result into a
cycle of callbacks: its memory, megabytes here, would wait for a search for cycles.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

R = TypeVar("R")


async def run_on(threads: ThreadPoolExecutor, function: Callable[[], R]) -> R:
    """What ``function`` returns or raises on one of the threads, in the context of its asker."""
    waiting: asyncio.Future[R] = asyncio.get_running_loop().create_future()
    run = contextvars.copy_context().run
    threads.submit(run, function).add_done_callback(partial(_pass_on, waiting))
    try:
        return await waiting
    finally:
        del waiting  # an error holds this frame, and would be held by it


def deliver(waiting: asyncio.Future[R], result: R) -> None:
    """Give a result to whoever waits for it, if anybody still does. For any thread."""
    _tell(waiting, waiting.set_result, result)


def refuse(waiting: asyncio.Future[R], error: BaseException) -> None:
    """Give an error to whoever waits, if anybody still does. For any thread."""
    _tell(waiting, waiting.set_exception, error)


def _pass_on(waiting: asyncio.Future[R], done: Future[R]) -> None:
    error = done.exception()
    if error is None:
        deliver(waiting, done.result())
    else:
        refuse(waiting, error)


def drop_traceback(error: BaseException) -> None:
    """Forget where an error came from, once it has been told.

    Its traceback holds all frames on its way, and these what they work with: tensors, and often the
    error itself.
    """
    rest: BaseException | None = error
    while rest is not None and rest.__traceback__ is not None:
        rest.__traceback__ = None
        rest = rest.__cause__ or rest.__context__


def _tell(waiting: asyncio.Future[R], settle: Callable[..., None], outcome: object) -> None:
    def tell() -> None:
        if not waiting.done():  # whoever asked may have gone
            settle(outcome)

    with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
        waiting.get_loop().call_soon_threadsafe(tell)


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
