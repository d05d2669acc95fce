"""The waits of the retry policy, measured with an injected clock."""

import random
import ssl
from collections.abc import Callable

import pytest

from edge_client.transport.retry import RetryPolicy
from protocol import errors
from protocol.errors import (
    Busy,
    DamagedFile,
    DamagedFrame,
    InternalError,
    SFPromptError,
    Unreachable,
)


class Clock:
    def __init__(self) -> None:
        self.now, self.pauses = 100.0, []

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


class Attempts:
    """Fails with each of these errors, then succeeds."""

    def __init__(self, *failures: SFPromptError) -> None:
        self.failures, self.count = list(failures), 0

    def __call__(self) -> str:
        self.count += 1
        if self.failures:
            raise self.failures.pop(0)
        return "done"


def policy(clock: Clock, jitter: float = 0.0, **settings: object) -> RetryPolicy:
    class Fixed(random.Random):
        def random(self) -> float:
            return jitter

    return RetryPolicy(sleep=clock.sleep, clock=lambda: clock.now, jitter=Fixed(), **settings)


@pytest.mark.parametrize("kind", [Busy, Unreachable])
def test_busy_and_unreachable_are_tried_again(kind: type[SFPromptError]) -> None:
    clock, attempts = Clock(), Attempts(kind("1"), kind("2"), kind("3"))
    assert policy(clock).call(attempts) == "done"
    assert clock.pauses == [0.2, 0.4, 0.8]


@pytest.mark.parametrize("kind", [InternalError, DamagedFile, DamagedFrame])
def test_a_fault_is_tried_again_but_not_for_long(kind: type[SFPromptError]) -> None:
    """A disk that fails for ten seconds ends no device; a server that always fails does."""
    clock, attempts = Clock(), Attempts(*[kind("fault")] * 6)
    assert policy(clock).call(attempts) == "done"
    assert clock.pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4]
    clock, lasting = Clock(), Attempts(*[kind("fault")] * 100)
    with pytest.raises(kind):
        policy(clock).call(lasting)
    assert 30 < clock.now - 100 <= 60


OTHERS = [
    getattr(errors, name)
    for name in errors.__all__
    if name not in ("FieldValue", "error_from_wire")
]

OTHERS = [
    kind
    for kind in OTHERS
    if not issubclass(kind, (Busy, DamagedFrame, InternalError, Unreachable))
]


@pytest.mark.parametrize("kind", OTHERS)
def test_every_other_error_is_final(kind: type[SFPromptError]) -> None:
    clock, attempts = Clock(), Attempts(kind("no", retry_after_s=1.0))
    with pytest.raises(kind):
        policy(clock).call(attempts)
    assert (attempts.count, clock.pauses) == (1, [])


def test_the_server_s_own_wait_is_obeyed() -> None:
    clock, attempts = Clock(), Attempts(Busy("1", retry_after_s=7.0), Busy("2", retry_after_s=0.1))
    policy(clock).call(attempts)
    assert clock.pauses == [7.0, 0.4]


@pytest.mark.parametrize(("jitter", "first"), [(0.0, 4.0), (0.5, 4.5), (1.0, 5.0)])
def test_jitter_adds_up_to_a_quarter_and_never_takes_away(jitter: float, first: float) -> None:
    clock = Clock()
    policy(clock, jitter).call(Attempts(Busy("1", retry_after_s=4.0)))
    assert clock.pauses == [pytest.approx(first)]


def test_waits_grow_to_the_longest() -> None:
    clock = Clock()
    settings = {"first_wait_s": 1.0, "max_wait_s": 5.0}
    policy(clock, **settings).call(Attempts(*[Unreachable("x") for _ in range(6)]))
    assert clock.pauses == [1, 2, 4, 5, 5, 5]


def test_patience_ends_with_the_last_error_and_never_oversleeps() -> None:
    clock = Clock()
    failures = [Unreachable(str(number)) for number in range(100)]
    attempts = Attempts(*failures)
    with pytest.raises(Unreachable) as caught:
        policy(clock, patience_s=10.0, first_wait_s=1.0).call(attempts)
    assert clock.now <= 110.0
    assert clock.pauses == [1, 2, 4]  # 8 more would be too long
    assert caught.value is failures[3]


def test_no_patience_means_one_attempt() -> None:
    attempts = Attempts(Unreachable("x"))
    with pytest.raises(Unreachable):
        policy(Clock(), patience_s=0.0).call(attempts)
    assert attempts.count == 1


def test_each_call_has_the_whole_patience() -> None:
    clock = Clock()
    patient = policy(clock, patience_s=1.0)
    for _ in range(5):
        patient.call(Attempts(Busy("x"), Busy("y")))
    assert len(clock.pauses) == 10


def test_it_says_why_it_waits() -> None:
    waits: list[tuple[str, float]] = []
    report: Callable[[SFPromptError, float], None] = lambda e, s: waits.append((e.message, s))  # noqa: E731
    policy(Clock(), on_wait=report).call(Attempts(Busy("full"), Unreachable("gone")))
    assert waits == [("full", 0.2), ("gone", 0.4)]


def caused_by(cause: BaseException) -> Unreachable:
    error = Unreachable("x")
    error.__cause__ = cause
    return error


def test_a_tls_error_is_not_retried() -> None:
    for cause in (ssl.SSLCertVerificationError(1, "self-signed"), ssl.SSLError(1, "WRONG_VERSION")):
        attempts = Attempts(caused_by(cause))
        with pytest.raises(Unreachable):
            policy(Clock()).call(attempts)
        assert attempts.count == 1


@pytest.mark.parametrize(
    "reason",
    [
        "[SSL: DECRYPTION_FAILED_OR_BAD_RECORD_MAC] decryption failed or bad record mac",
        "[SSL: SSLV3_ALERT_BAD_RECORD_MAC] sslv3 alert bad record mac",
    ],
)
def test_a_flipped_bit_on_a_tls_connection_is_retried(reason: str) -> None:
    assert policy(Clock()).call(Attempts(caused_by(ssl.SSLError(1, reason)))) == "done"


def test_an_interrupted_handshake_is_retried() -> None:
    attempts = Attempts(caused_by(ssl.SSLEOFError(8, "EOF")), caused_by(ConnectionResetError()))
    assert policy(Clock()).call(attempts) == "done"
