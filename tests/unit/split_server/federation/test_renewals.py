"""Work of minutes beside the requests: once at a time, stopped, refused, tried again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from protocol.errors import InvalidField, SFPromptError
from split_server.federation import background
from split_server.federation.background import Check, RedistillationJobs
from tests.support.server import wait_until


class Work:
    """Goes on until it may end; does with each run what the test says."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.refused: list[tuple[str, SFPromptError]] = []
        self.may_end = threading.Event()
        self.then: Callable[[str], None] = lambda _run: None
        self.renewals = RedistillationJobs(
            self._do, lambda run, error: self.refused.append((run, error))
        )

    def _do(self, run: str, check: Check) -> None:
        self.begun.append(run)
        while not self.may_end.wait(0.005):
            check()
        self.then(run)


@pytest.fixture
def work() -> Iterator[Work]:
    made = Work()
    yield made
    made.may_end.set()
    made.renewals.close()


def test_a_run_s_work_is_done_once_at_a_time_and_each_in_its_turn(work: Work) -> None:
    for run in ("a", "a", "b"):
        work.renewals.start(run)
    assert work.renewals.is_running("a")
    assert work.renewals.is_running("b"), "it waits for its turn"
    assert not work.renewals.is_running("c")
    wait_until(lambda: work.begun == ["a"])
    work.may_end.set()
    wait_until(lambda: not work.renewals.is_running("b"))
    assert work.begun == ["a", "b"]
    work.renewals.start("a")
    wait_until(lambda: work.begun == ["a", "b", "a"])


def test_closing_stops_the_work_and_begins_no_other(work: Work) -> None:
    work.renewals.start("a")
    work.renewals.start("b")
    wait_until(lambda: work.begun == ["a"])
    work.renewals.close()
    work.renewals.start("c")
    assert work.begun == ["a"]
    assert all(work.renewals.is_running(run) for run in "abc"), "nobody goes on without it"


def test_a_refusal_is_told(work: Work) -> None:
    def refuse(_run: str) -> None:
        raise InvalidField("no such images", field="distillation.images")

    work.then = refuse
    work.may_end.set()
    work.renewals.start("a")
    wait_until(lambda: not work.renewals.is_running("a"))
    [(run, error)] = work.refused
    assert (run, error.field) == ("a", "distillation.images")


def test_a_failure_that_may_pass_holds_the_run_for_a_while(
    work: Work, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "_RETRY_S", 0.05)

    def fail(_run: str) -> None:
        raise OSError("the disk is full")

    work.then = fail
    work.may_end.set()
    work.renewals.start("a")
    wait_until(lambda: not work.renewals.is_running("a"))
    assert not work.refused
    assert "the disk is full" in caplog.text
    work.renewals.start("a")
    wait_until(lambda: work.begun == ["a", "a"])
