"""What the server tells about its runs: their rounds, events and evaluations."""

from __future__ import annotations

from protocol.messages import Event, Results, RunView
from protocol.quality import EvaluationView
from split_server.federation import views
from split_server.federation.liveness import Liveness
from split_server.federation.quality import evaluation_view
from split_server.federation.runs import RunRegistry
from split_server.federation.waiting import waiting_in


class RunReader:
    """Answers the requests that read runs and change nothing. Thread-safe.

    Args:
        runs: the registry of all runs.
        liveness: tracks participants with a recent request.
    """

    def __init__(self, runs: RunRegistry, liveness: Liveness) -> None:
        self._runs = runs
        self._liveness = liveness

    def views(self) -> list[RunView]:
        """Return all runs, the oldest first."""
        return [views.run_view(run) for run in self._runs.snapshots()]

    def results(self, run_id: str) -> Results:
        """Return rounds, participants and traffic of a run.

        Raises:
            NotFound: there is no such run.
        """
        self._runs.snapshot(run_id)
        with self._runs.lock(run_id), self._runs.store.reading() as session:
            run = self._runs.snapshot(run_id)
            return views.results(session, run, self._runs.meter, waiting_in(run, self._liveness))

    def evaluation(self, run_id: str, round_: int) -> EvaluationView:
        """Return how well a round's state classifies held-out images, in all and by device.

        Raises:
            NotFound: there is no such run, or it has closed no such round.
        """
        run = self._runs.snapshot(run_id)
        with self._runs.store.reading() as session:
            return evaluation_view(session, run, round_)

    def events(self, run_id: str, after: int) -> list[Event]:
        """Return a run's events after the one with this number.

        Raises:
            NotFound: there is no such run.
        """
        self._runs.snapshot(run_id)
        with self._runs.store.reading() as session:
            return views.events(session, run_id, after)
