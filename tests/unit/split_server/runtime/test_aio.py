"""Awaiting functions on threads: results, errors, cancellation, and no reference cycles."""

import asyncio
import contextvars
import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from split_server.runtime.aio import deliver, deliver_error, drop_traceback, run_on

WHO = contextvars.ContextVar("who", default="nobody")


class Large:
    """An object that supports weak references."""


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1, "worker") as made:
        yield made


def test_a_function_runs_on_the_thread_in_the_callers_context(
    threads: ThreadPoolExecutor,
) -> None:
    async def ask() -> tuple[str, str]:
        WHO.set("the asker")
        return await run_on(threads, lambda: (WHO.get(), threading.current_thread().name))

    assert asyncio.run(ask()) == ("the asker", "worker_0")


def test_an_error_is_raised_unchanged(threads: ThreadPoolExecutor) -> None:
    error = KeyError("x")

    def fail() -> None:
        raise error

    with pytest.raises(KeyError) as caught:
        asyncio.run(run_on(threads, fail))
    assert caught.value is error


def test_a_result_is_freed_once_it_is_taken(threads: ThreadPoolExecutor) -> None:
    async def ask() -> weakref.ref[Large]:
        return weakref.ref(await run_on(threads, Large))

    gc.disable()
    try:
        result = asyncio.run(ask())
        threads.submit(int).result()  # the thread has finished the earlier call
        assert result() is None
    finally:
        gc.enable()


def test_a_reported_error_refers_to_nothing(threads: ThreadPoolExecutor) -> None:
    held: list[weakref.ref[Large]] = []

    async def ask() -> None:
        large = Large()
        held.append(weakref.ref(large))

        def fail() -> None:
            own = Large()
            held.append(weakref.ref(own))
            raise ValueError(f"{large} {own}") from KeyError()

        try:
            await run_on(threads, fail)
        except ValueError as error:
            drop_traceback(error)

    gc.disable()
    try:
        asyncio.run(ask())
        threads.submit(int).result()
        assert [one() is None for one in held] == [True, True]
    finally:
        gc.enable()


def test_a_cancelled_wait_gets_no_result(threads: ThreadPoolExecutor) -> None:
    go_on, reported = threading.Event(), []

    async def ask_and_go() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, what: reported.append(what))
        asked = asyncio.create_task(run_on(threads, lambda: go_on.wait(5)))
        await asyncio.sleep(0)
        asked.cancel()
        go_on.set()
        await asyncio.to_thread(
            threads.submit(int).result
        )  # the thread has finished the earlier call
        await asyncio.sleep(0)
        assert asked.cancelled()

    asyncio.run(ask_and_go())
    assert reported == []


def test_a_closed_loop_gets_no_result() -> None:
    loop = asyncio.new_event_loop()
    waiting: asyncio.Future[int] = loop.create_future()
    loop.close()
    deliver(waiting, 1)
    deliver_error(waiting, ValueError())
    assert not waiting.done()
