"""Work of minutes that a run waits for, away from everybody's requests: one piece at a time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from protocol.errors import SFPromptError

log = logging.getLogger(__name__)

_RETRY_S = 5.0  # after a failure that may pass (a full disk, say)

Check = Callable[[], None]


class Stopped(Exception):
    """Nobody waits for this work any more."""


class RedistillationJobs:
    """Does the work of runs in a thread of its own, each run's once at a time.

    Args:
        work: does all of one run's, calling the check now and then, which may raise `Stopped`.
        refused: is told of a typed error: the work cannot be done.
    """

    def __init__(
        self, work: Callable[[str, Check], None], refused: Callable[[str, SFPromptError], None]
    ) -> None:
        self._work = work
        self._refused = refused
        self._threads = ThreadPoolExecutor(1, "split-renewal")
        self._busy: set[str] = set()
        self._closing = threading.Event()

    def is_running(self, run: str) -> bool:
        """Whether a run has to wait: for its work, or for the server's next start."""
        return run in self._busy or self._closing.is_set()

    def start(self, run: str) -> None:
        """Do a run's work soon, unless that is so already."""
        if self.is_running(run):
            return
        self._busy.add(run)
        try:
            self._threads.submit(self._carry_out, run)
        except RuntimeError:  # closed in the meantime
            self._busy.discard(run)

    def check(self) -> None:
        """Raises `Stopped` when the server is about to stop: the work is done after its restart."""
        if self._closing.is_set():
            raise Stopped

    def close(self) -> None:
        """Stop at the next check, and wait for that."""
        self._closing.set()
        self._threads.shutdown(cancel_futures=True)

    def _carry_out(self, run: str) -> None:
        try:
            self._work(run, self.check)
        except Stopped:
            log.info("run %s: its work is left for later", run)
        except SFPromptError as error:
            self._refused(run, error)
        except Exception:
            log.exception("run %s could not go on; trying again later", run)
            self._closing.wait(_RETRY_S)
        finally:
            self._busy.discard(run)
