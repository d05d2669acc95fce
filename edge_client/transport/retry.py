"""How long a device waits for a server that is busy, restarting or out of reach."""

from __future__ import annotations

import random
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from protocol.errors import Busy, InternalError, SFPromptError, Unreachable

T = TypeVar("T")

_FAULTS = 3  # of the server in one request, before they are taken for lasting


@dataclass
class RetryPolicy:
    """Waits between attempts, growing and with jitter, until patience runs out.

    `Busy` and `Unreachable` are tried again, but for what TLS refuses, such as a certificate; so is
    a fault of the server's own, which may have been a full disk. Every other error stays the same
    however often the request is sent.
    """

    patience_s: float = 300.0  # from the first failure to giving up
    first_wait_s: float = 0.2
    longest_wait_s: float = 15.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    jitter: random.Random = field(default_factory=random.Random)
    on_wait: Callable[[SFPromptError, float], None] = lambda _error, _seconds: None

    def call(self, attempt: Callable[[], T]) -> T:
        """Call until it succeeds, fails for good, or patience runs out.

        Raises:
            SFPromptError: the error of the last attempt.
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
                if faults > _FAULTS:
                    raise
                now = self.clock()
                give_up_at = now + self.patience_s if give_up_at is None else give_up_at
                asked = error.retry_after_s or 0.0
                pause = max(asked, wait) * (1 + 0.25 * self.jitter.random())
                if now + pause > give_up_at:
                    raise
                self.on_wait(error, pause)
                self.sleep(pause)
                wait = min(2 * wait, self.longest_wait_s)


def _is_permanent(cause: BaseException | None) -> bool:
    """Whether TLS itself refused; a connection that broke in its handshake may come back."""
    lost = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
    return isinstance(cause, ssl.SSLError) and not isinstance(cause, lost)
