"""Decode many pictures in parallel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from edge_client.data.errors import CorruptImageError
from edge_client.data.pictures import Colour, Picture, read_picture

Progress = Callable[[int, int], None]  # pictures read, pictures in total

_THREADS = 2

_AHEAD = 8  # pictures that are decoded ahead of the one that is yielded next

T = TypeVar("T")


@dataclass(frozen=True)
class Unreadable:
    """The result for a picture that cannot be read."""

    reason: str


class ParallelReader(Generic[T]):
    """Decodes pictures on two threads and yields the result for each, in order.

    Args:
        paths: paths of the files.
        background: colour behind transparent parts, (R, G, B).
        process: computes the result for a decoded picture; called on a thread.
        progress: called with the number of pictures read and of all pictures.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        background: Colour,
        process: Callable[[Path, Picture], T],
        progress: Progress = lambda done, total: None,
    ) -> None:
        self._paths, self._background = paths, background
        self._process, self._progress, self._done = process, progress, 0

    def __iter__(self) -> Iterator[tuple[Path, T | Unreadable]]:
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="decode") as threads:
            waiting: list[tuple[Path, Future[T | Unreadable]]] = []
            for path in self._paths:
                waiting.append((path, threads.submit(self._read, path)))
                if len(waiting) >= _AHEAD:
                    first, future = waiting.pop(0)
                    yield first, self._count(future.result())
            for first, future in waiting:
                yield first, self._count(future.result())

    def _count(self, result: T | Unreadable) -> T | Unreadable:
        self._done += 1
        self._progress(self._done, len(self._paths))
        return result

    def _read(self, path: Path) -> T | Unreadable:
        try:
            picture = read_picture(path, self._background)
        except CorruptImageError as error:
            return Unreadable(error.hint or "unreadable")
        return self._process(path, picture)
