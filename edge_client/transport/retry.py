"""Retry requests to a server that is busy, restarting or out of reach."""

from __future__ import annotations

import random
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from protocol.errors import Busy, DamagedFrame, InternalError, SFPromptError, Unreachable

T = TypeVar("T")

_FAULT_PATIENCE_S = 60.0  # with a fault that may be permanent; a disk error passes within this

# What OpenSSL says about a record whose bytes changed on their way, or the other end's alert of it.
_DAMAGED_RECORD = ("BAD_RECORD_MAC", "DECRYPTION_FAILED", "BAD_DECRYPT", "DECODE_ERROR")


@dataclass
class RetryPolicy:
    """Waits between attempts, exponentially longer and with jitter, up to a time limit.

    Retried are `Busy`, `Unreachable` unless TLS refused (a bad certificate stays bad), and for at
    most a minute `DamagedFrame` and `InternalError` (the server's disk may have failed for a
    moment). Other errors are permanent.

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
        failing_since: float | None = None
        wait = self.first_wait_s
        while True:
            try:
                return attempt()
            except (Busy, DamagedFrame, InternalError, Unreachable) as error:
                if _is_permanent(error.__cause__):
                    raise
                now = self.clock()
                failing_since = now if failing_since is None else failing_since
                pause = max(error.retry_after_s or 0.0, wait) * (1 + 0.25 * self.jitter.random())
                if now + pause > failing_since + self._patience(error):
                    raise
                self.on_wait(error, pause)
                self.sleep(pause)
                wait = min(2 * wait, self.max_wait_s)

    def _patience(self, error: SFPromptError) -> float:
        if isinstance(error, (DamagedFrame, InternalError)):
            return min(self.patience_s, _FAULT_PATIENCE_S)
        return self.patience_s


def _is_permanent(cause: BaseException | None) -> bool:
    """Whether TLS refused the server; a lost connection or a damaged record may recover."""
    lost = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
    if not isinstance(cause, ssl.SSLError) or isinstance(cause, lost):
        return False
    return not any(reason in str(cause) for reason in _DAMAGED_RECORD)
