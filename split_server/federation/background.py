"""Background work that takes minutes and that a run's next round waits for: one job at a time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from protocol.errors import SFPromptError

log = logging.getLogger(__name__)

_RETRY_S = 5.0  # after a failure that may be temporary, e.g. a full disk

Check = Callable[[], None]


class Stopped(Exception):
    """Raised by a check: the result is no longer needed."""


class RebuildJobs:
    """Makes runs' models again in one thread; a run has at most one job.

    Args:
        work: does the whole job of a run. It calls the check regularly, which may raise `Stopped`.
        refused: called with the typed error of a job that cannot be done.
    """

    def __init__(
        self, work: Callable[[str, Check], None], refused: Callable[[str, SFPromptError], None]
    ) -> None:
        self._work = work
        self._refused = refused
        self._threads = ThreadPoolExecutor(1, "split-rebuild")
        self._running: set[str] = set()
        self._closing = threading.Event()

    def is_running(self, run_id: str) -> bool:
        """Whether a run must wait for its job, or for the next start of the server."""
        return run_id in self._running or self._closing.is_set()

    def start(self, run_id: str) -> None:
        """Queue a run's job unless it is queued or running."""
        if self.is_running(run_id):
            return
        self._running.add(run_id)
        try:
            self._threads.submit(self._execute, run_id)
        except RuntimeError:  # closed in the meantime
            self._running.discard(run_id)

    def check(self) -> None:
        """Raise `Stopped` if the server is stopping; it does the job after its restart."""
        if self._closing.is_set():
            raise Stopped

    def close(self) -> None:
        """Stop the job at its next check and wait for that."""
        self._closing.set()
        self._threads.shutdown(cancel_futures=True)

    def _execute(self, run_id: str) -> None:
        try:
            self._work(run_id, self.check)
        except Stopped:
            log.info("run %s: making its model again was stopped", run_id)
        except SFPromptError as error:
            self._refused(run_id, error)
        except Exception:
            log.exception(
                "run %s: making its model again failed; retrying in %g s", run_id, _RETRY_S
            )
            self._closing.wait(_RETRY_S)
        finally:
            self._running.discard(run_id)
