"""The engine's worker: one thread, one batch after the other."""

from __future__ import annotations

import threading
import time

from protocol.errors import Busy
from split_server.engine.executor import Executor
from split_server.engine.figures import EngineFigures, Turn
from split_server.engine.schedule import Batch, Schedule
from split_server.engine.steps import RetainedSteps
from split_server.engine.tasks import BackwardTask, ForwardTask, OwnTask, Task


class Worker:
    """Takes batches from the schedule and runs them.

    Args:
        schedule: of the waiting tasks.
        executor: runs a batch.
        figures: count what was run.
        lock: guards the schedule; notified when a task comes.
        steps: that are retained: whose gradients may still come.
        queued_bytes: the most that may wait.
    """

    def __init__(
        self,
        schedule: Schedule,
        executor: Executor,
        figures: EngineFigures,
        lock: threading.Condition,
        steps: RetainedSteps,
        queued_bytes: int,
    ) -> None:
        self._schedule = schedule
        self._executor = executor
        self._figures = figures
        self._lock = lock
        self._steps = steps
        self._queued_limit = queued_bytes
        self._seconds_per_sample = 0.01  # a running mean
        self._closed = False
        self.queued_bytes = 0
        self._thread = threading.Thread(target=self._work, name="split-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    # Under the lock

    def add(self, task: Task) -> None:
        """Put a task into the queue: one that goes on with a job is refused at the end alone."""
        if self._closed:
            task.fail(_stopping())
            return
        now = time.monotonic()
        if isinstance(task, ForwardTask | OwnTask):
            self._schedule.add_forward(task, now)
        elif isinstance(task, BackwardTask):
            self._schedule.add_backward(task, now)
        self.queued_bytes += task.nbytes
        self._lock.notify()

    def require_room(self, nbytes: int) -> None:
        """Refuse a job for whose tensors the queue has no room. One alone is always let in.

        Raises:
            Busy: the queue is full, or the engine stops.
        """
        if self._closed:
            raise _stopping()
        if self.queued_bytes and self.queued_bytes + nbytes > self._queued_limit:
            raise self.busy("the queue is full")

    def busy(self, why: str) -> Busy:
        """To be asked again when what waits now has been worked off."""
        self._figures.refused(Busy.code)
        wait = self._seconds_per_sample * (self._schedule.samples + 1)
        return Busy(f"{why}; try again later", retry_after_s=round(min(max(wait, 0.1), 30.0), 2))

    # Without it

    def close(self) -> None:
        """Stop after the batch at work. What waits is refused."""
        with self._lock:
            self._closed = True
            waiting = self._schedule.drain()
            self._lock.notify_all()
        for task in waiting:
            task.fail(_stopping())
        self._thread.join(timeout=30)

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            began = time.monotonic()
            try:
                self._executor.run(batch)
            except Exception as error:  # whatever it is, nobody waits for ever
                for task in batch.tasks:
                    task.fail(error)
            self._count(batch, began, time.monotonic() - began)
            del batch  # what it holds is not kept while nothing is to do

    def _next(self) -> Batch | None:
        """The next batch, waited for; None: there is none any more."""
        with self._lock:
            while not self._closed:
                found = self._schedule.next(time.monotonic(), self._steps.wanted)
                if isinstance(found, Batch):
                    self._taken(found)
                    return found
                self._lock.wait(min(found, threading.TIMEOUT_MAX))
            return None

    def _taken(self, batch: Batch) -> None:
        self.queued_bytes -= sum(task.nbytes for task in batch.tasks)
        if batch.graph is not None:
            own = {task.key for task in batch.tasks if isinstance(task, BackwardTask)}
            self._steps.spend(batch.graph, own)

    def _count(self, batch: Batch, began: float, seconds: float) -> None:
        turns = [Turn(t.sender[0], t.samples, began - t.arrived) for t in batch.tasks]
        self._figures.ran(_work_of(batch), turns, seconds)
        samples = sum(turn.samples for turn in turns)
        with self._lock:
            now = seconds / max(1, samples)
            self._seconds_per_sample += 0.1 * (now - self._seconds_per_sample)


def _stopping() -> Busy:
    return Busy("the server is shutting down", retry_after_s=5.0)


def _work_of(batch: Batch) -> str:
    first = batch.tasks[0]
    if isinstance(first, OwnTask):
        return first.work
    if isinstance(first, ForwardTask):
        return "inference" if first.kind.keep == "nothing" else "forward"
    return "recompute" if batch.graph is None else "backward"
