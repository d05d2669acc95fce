"""Sessions of browsers: an operator logs in with its token and gets a cookie."""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Callable, Mapping
from http.cookies import CookieError, SimpleCookie

COOKIE = "sfprompt_session"

LIFETIME_S = 12 * 3600

_MAX_SESSIONS = 64  # the oldest ends for a new one

_OWN_SITE = frozenset({b"same-origin", b"none"})  # none: the person typed the address


class Sessions:
    """The open sessions, in memory alone: a restart of the server ends all. Thread-safe.

    Args:
        monotonic: returns seconds.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._ends: dict[str, float] = {}  # by hash of the cookie, the oldest first
        self._lock = threading.Lock()

    def open(self) -> str:
        """Open a session and return the value of its cookie."""
        value = secrets.token_urlsafe(32)
        now = self._monotonic()
        with self._lock:
            self._ends = {key: end for key, end in self._ends.items() if end > now}
            while len(self._ends) >= _MAX_SESSIONS:
                self._ends.pop(next(iter(self._ends)))
            self._ends[_hash(value)] = now + LIFETIME_S
        return value

    def close(self, headers: Mapping[bytes, bytes]) -> None:
        """End the session of a request, if it has one."""
        with self._lock:
            self._ends.pop(_hash(_cookie(headers)), None)

    def is_open(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether a request belongs to a session.

        Requests that another site's page causes do not, even where a browser adds the cookie:
        for a browser, another port of the same host is the same site.

        Args:
            headers: of the request, with names in lower case.
        """
        if headers.get(b"sec-fetch-site", b"none") not in _OWN_SITE:
            return False
        value = _cookie(headers)
        with self._lock:
            return self._ends.get(_hash(value), 0.0) > self._monotonic()


def set_cookie(value: str, *, secure: bool) -> str:
    """Return the header ``set-cookie`` of a session; an empty value removes the cookie."""
    lifetime = LIFETIME_S if value else 0
    flags = f"Path=/; Max-Age={lifetime}; HttpOnly; SameSite=Strict"
    return f"{COOKIE}={value}; {flags}" + ("; Secure" if secure else "")


def _cookie(headers: Mapping[bytes, bytes]) -> str:
    try:
        cookies = SimpleCookie(headers.get(b"cookie", b"").decode("latin-1"))
    except CookieError:
        return ""
    return cookies[COOKIE].value if COOKIE in cookies else ""


def _hash(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()
