"""Pass results between threads and the event loop.

This module replaces `run_in_executor` and `asyncio.to_thread`. They create reference cycles, which
keep megabytes of results in memory until the next garbage collection.
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
    """Run a function on one of the threads, in the context of the caller, and return its result."""
    waiting: asyncio.Future[R] = asyncio.get_running_loop().create_future()
    run = contextvars.copy_context().run
    threads.submit(run, function).add_done_callback(partial(_pass_on, waiting))
    try:
        return await waiting
    finally:
        del waiting  # breaks a cycle: its error refers to this frame


def deliver(waiting: asyncio.Future[R], result: R) -> None:
    """Set a future's result, unless it is done already. Thread-safe."""
    _settle(waiting, waiting.set_result, result)


def deliver_error(waiting: asyncio.Future[R], error: BaseException) -> None:
    """Set a future's exception, unless it is done already. Thread-safe."""
    _settle(waiting, waiting.set_exception, error)


def _pass_on(waiting: asyncio.Future[R], done: Future[R]) -> None:
    error = done.exception()
    if error is None:
        deliver(waiting, done.result())
    else:
        deliver_error(waiting, error)


def drop_traceback(error: BaseException) -> None:
    """Drop the tracebacks of an error and its causes, after it has been reported.

    A traceback keeps its frames in memory, with their tensors.
    """
    cause: BaseException | None = error
    while cause is not None and cause.__traceback__ is not None:
        cause.__traceback__ = None
        cause = cause.__cause__ or cause.__context__


def _settle(waiting: asyncio.Future[R], set_outcome: Callable[..., None], outcome: object) -> None:
    def settle() -> None:
        if not waiting.done():  # the wait may have been cancelled
            set_outcome(outcome)

    with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
        waiting.get_loop().call_soon_threadsafe(settle)


class Notifier:
    """Wakes coroutines when a run changes. They wait on one event loop; any thread may notify."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: dict[str, asyncio.Event] = {}
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether the server is shutting down: all waits must end."""
        return self._closed

    def get_event(self, run: str) -> asyncio.Event:
        """Return the event of the run's next change.

        Call it before reading the run, so that no change in between is missed.
        """
        if self._closed:
            done = asyncio.Event()
            done.set()
            return done
        return self._events.setdefault(run, asyncio.Event())

    def notify(self, run: str) -> None:
        """Wake all coroutines that wait for a change of this run. Thread-safe."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake, run)

    def close(self) -> None:
        """Wake all coroutines, and end all later waits at once."""
        self._closed = True
        for run in list(self._events):
            self._wake(run)

    def _wake(self, run: str) -> None:
        event = self._events.pop(run, None)
        if event is not None:
            event.set()


async def wait_for(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event; return whether it was set before the time ran out."""
    if seconds <= 0:
        return event.is_set()
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
