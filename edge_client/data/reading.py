"""Decode many pictures on a few threads, each once."""

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

_AHEAD = 8  # pictures whose results may wait for their turn

T = TypeVar("T")


@dataclass(frozen=True)
class Failed:
    """Why a picture cannot be read."""

    reason: str


class Reading(Generic[T]):
    """Decodes pictures on a few threads, each once, and yields what is made of each, in order.

    Args:
        paths: of the files.
        background: colour behind transparent parts.
        look: makes of a picture what is to be kept; runs on a thread.
        progress: receives the count.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        background: Colour,
        look: Callable[[Path, Picture], T],
        progress: Progress = lambda done, total: None,
    ) -> None:
        self._paths, self._background = paths, background
        self._look, self._progress, self._done = look, progress, 0

    def __iter__(self) -> Iterator[tuple[Path, T | Failed]]:
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="decode") as threads:
            waiting: list[tuple[Path, Future[T | Failed]]] = []
            for path in self._paths:
                waiting.append((path, threads.submit(self._read, path)))
                if len(waiting) >= _AHEAD:
                    first, future = waiting.pop(0)
                    yield first, self._count(future.result())
            for first, future in waiting:
                yield first, self._count(future.result())

    def _count(self, result: T | Failed) -> T | Failed:
        self._done += 1
        self._progress(self._done, len(self._paths))
        return result

    def _read(self, path: Path) -> T | Failed:
        try:
            picture = read_picture(path, self._background)
        except CorruptImageError as error:
            return Failed(error.hint or "unreadable")
        return self._look(path, picture)
