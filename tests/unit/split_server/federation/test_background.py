"""Jobs that make a model again: one at a time, stopped, refused, retried."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from protocol.errors import InvalidField, SFPromptError
from split_server.federation import background
from split_server.federation.background import Check, RebuildJobs
from tests.support.server import wait_until


class Work:
    """Runs until the test ends it, then does what the test specifies."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.refused: list[tuple[str, SFPromptError]] = []
        self.may_end = threading.Event()
        self.then: Callable[[str], None] = lambda _run: None
        self.jobs = RebuildJobs(self._do, lambda run, error: self.refused.append((run, error)))

    def _do(self, run: str, check: Check) -> None:
        self.started.append(run)
        while not self.may_end.wait(0.005):
            check()
        self.then(run)


@pytest.fixture
def work() -> Iterator[Work]:
    background = Work()
    yield background
    background.may_end.set()
    background.jobs.close()


def test_jobs_run_one_at_a_time_and_once_per_run(work: Work) -> None:
    for run in ("a", "a", "b"):
        work.jobs.start(run)
    assert work.jobs.is_running("a")
    assert work.jobs.is_running("b"), "it waits for its turn"
    assert not work.jobs.is_running("c")
    wait_until(lambda: work.started == ["a"])
    work.may_end.set()
    wait_until(lambda: not work.jobs.is_running("b"))
    assert work.started == ["a", "b"]
    work.jobs.start("a")
    wait_until(lambda: work.started == ["a", "b", "a"])


def test_closing_stops_the_job_and_starts_no_other(work: Work) -> None:
    work.jobs.start("a")
    work.jobs.start("b")
    wait_until(lambda: work.started == ["a"])
    work.jobs.close()
    work.jobs.start("c")
    assert work.started == ["a"]
    assert all(work.jobs.is_running(run) for run in "abc"), "nobody goes on without it"


def test_a_typed_error_is_passed_on(work: Work) -> None:
    def refuse(_run: str) -> None:
        raise InvalidField("no such images", field="distillation.images")

    work.then = refuse
    work.may_end.set()
    work.jobs.start("a")
    wait_until(lambda: not work.jobs.is_running("a"))
    [(run, error)] = work.refused
    assert (run, error.field) == ("a", "distillation.images")


def test_a_temporary_failure_pauses_the_run(
    work: Work, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "_RETRY_S", 0.05)

    def fail(_run: str) -> None:
        raise OSError("the disk is full")

    work.then = fail
    work.may_end.set()
    work.jobs.start("a")
    wait_until(lambda: not work.jobs.is_running("a"))
    assert not work.refused
    assert "the disk is full" in caplog.text
    work.jobs.start("a")
    wait_until(lambda: work.started == ["a", "a"])
