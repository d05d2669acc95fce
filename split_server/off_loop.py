"""Between threads and the event loop, without holding on to what passes.

`asyncio.wrap_future`, and with it `run_in_executor` and `asyncio.to_thread`, ties a result into a
cycle of callbacks: its memory, megabytes here, would wait for a search for cycles.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

R = TypeVar("R")


async def run_on(threads: ThreadPoolExecutor, function: Callable[[], R]) -> R:
    """What ``function`` returns or raises on one of the threads, in the context of its asker."""
    waiting: asyncio.Future[R] = asyncio.get_running_loop().create_future()
    run = contextvars.copy_context().run

    def call() -> None:
        try:
            result = run(function)
        except BaseException as error:
            refuse(waiting, error)
        else:
            deliver(waiting, result)

    threads.submit(call)
    return await waiting


def deliver(waiting: asyncio.Future[R], result: R) -> None:
    """Give a result to whoever waits for it, if anybody still does. For any thread."""
    _tell(waiting, waiting.set_result, result)


def refuse(waiting: asyncio.Future[R], error: BaseException) -> None:
    """Give an error to whoever waits, if anybody still does. For any thread."""
    _tell(waiting, waiting.set_exception, error)


def _tell(waiting: asyncio.Future[R], settle: Callable[..., None], outcome: object) -> None:
    def tell() -> None:
        if not waiting.done():  # whoever asked may have gone
            settle(outcome)

    with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
        waiting.get_loop().call_soon_threadsafe(tell)
