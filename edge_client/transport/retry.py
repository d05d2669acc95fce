"""Retry requests to a server that is busy, restarting or out of reach."""

from __future__ import annotations

import random
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from protocol.errors import Busy, InternalError, SFPromptError, Unreachable

T = TypeVar("T")

_MAX_SERVER_FAULTS = 3  # in one request, before the fault counts as permanent


@dataclass
class RetryPolicy:
    """Waits between attempts, exponentially longer and with jitter, up to a time limit.

    Retried are `Busy`, `Unreachable` unless TLS refused (a bad certificate stays bad), and a few
    `InternalError`s (the server's disk may have been full). Other errors are permanent.

    Attributes:
        patience_s: seconds from the first failure to giving up.
        first_wait_s: seconds before the second attempt; doubled after each further one.
        max_wait_s: upper limit of the doubled wait; a server's ``retry_after_s`` may be longer.
        on_wait: called with the error and the seconds before each wait.
    """

    patience_s: float = 300.0
    first_wait_s: float = 0.2
    max_wait_s: float = 15.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    jitter: random.Random = field(default_factory=random.Random)
    on_wait: Callable[[SFPromptError, float], None] = lambda _error, _seconds: None

    def call(self, attempt: Callable[[], T]) -> T:
        """Call ``attempt`` until it succeeds, fails permanently, or the time limit is reached.

        Raises:
            SFPromptError: the last attempt's error.
        """
        give_up_at: float | None = None
        wait, faults = self.first_wait_s, 0
        while True:
            try:
                return attempt()
            except (Busy, Unreachable, InternalError) as error:
                if _is_permanent(error.__cause__):
                    raise
                faults += isinstance(error, InternalError)
                if faults > _MAX_SERVER_FAULTS:
                    raise
                now = self.clock()
                give_up_at = now + self.patience_s if give_up_at is None else give_up_at
                pause = max(error.retry_after_s or 0.0, wait) * (1 + 0.25 * self.jitter.random())
                if now + pause > give_up_at:
                    raise
                self.on_wait(error, pause)
                self.sleep(pause)
                wait = min(2 * wait, self.max_wait_s)


def _is_permanent(cause: BaseException | None) -> bool:
    """Whether TLS refused the server; a connection lost during the handshake may recover."""
    lost = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
    return isinstance(cause, ssl.SSLError) and not isinstance(cause, lost)
