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


def let_go(error: BaseException) -> None:
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
