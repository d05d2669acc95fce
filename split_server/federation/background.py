"""Background jobs that take minutes and that a run's next round waits for, one at a time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from protocol.errors import SFPromptError

log = logging.getLogger(__name__)

_RETRY_S = 5.0  # pause after a failure that may be temporary, e.g. a full disk

Check = Callable[[], None]


class Stopped(Exception):
    """Raised by a check, because the result is no longer needed."""


class RebuildJobs:
    """Rebuilds the models of runs in one thread; a run has at most one job.

    Args:
        work: does the job of a run; it often calls the check, which may raise `Stopped`.
        refused: called with the run and the typed error of a job that cannot be done.
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
        """Whether the job of a run is queued or running, or the server is stopping."""
        return run_id in self._running or self._closing.is_set()

    def start(self, run_id: str) -> None:
        """Queue the job of a run, unless it is already queued or running."""
        if self.is_running(run_id):
            return
        self._running.add(run_id)
        try:
            self._threads.submit(self._execute, run_id)
        except RuntimeError:  # `close` was called meanwhile
            self._running.discard(run_id)

    def check(self) -> None:
        """Raise `Stopped` if the server is stopping; the job begins again after its restart."""
        if self._closing.is_set():
            raise Stopped

    def close(self) -> None:
        """Stop the running job at its next check, and wait for its end."""
        self._closing.set()
        self._threads.shutdown(cancel_futures=True)

    def _execute(self, run_id: str) -> None:
        try:
            self._work(run_id, self.check)
        except Stopped:
            log.info("run %s: rebuilding its model was stopped", run_id)
        except SFPromptError as error:
            self._refused(run_id, error)
        except Exception:
            log.exception("run %s: rebuilding its model failed; retrying in %g s", run_id, _RETRY_S)
            self._closing.wait(_RETRY_S)
        finally:
            self._running.discard(run_id)
