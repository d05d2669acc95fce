"""The device at work while its link is: the next batch is made while one is away."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def one_ahead(items: Iterable[Item], make: Callable[[Item], Made]) -> Iterator[tuple[Item, Made]]:
    """Each item with what ``make`` makes of it, on a thread, one item ahead of whoever takes them.

    What ``make`` raises comes at its item's turn.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead") as thread:
        waiting: deque[tuple[Item, Future[Made]]] = deque()
        for item in items:
            waiting.append((item, thread.submit(make, item)))
            if len(waiting) > 1:
                first, made = waiting.popleft()
                yield first, made.result()
        for item, made in waiting:
            yield item, made.result()
