"""Describe a run at this moment for the operator."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from protocol.messages import RoundStatus
from protocol.run_state import DeviceState, DeviceStatus, RunState
from split_server.engine.engine import Engine
from split_server.federation.liveness import Liveness
from split_server.federation.rounds import pending_evaluators, pending_trainers
from split_server.federation.runs import RunRegistry
from split_server.federation.snapshot import OpenRound, Participant, RunSnapshot
from split_server.federation.waiting import join_names, waiting_in


class RunStates:
    """Describes runs, from memory alone. Thread-safe.

    Args:
        runs: the registry of all runs.
        liveness: knows who was heard when.
        engine: computes for the runs.
    """

    def __init__(self, runs: RunRegistry, liveness: Liveness, engine: Engine) -> None:
        self._runs = runs
        self._liveness = liveness
        self._engine = engine

    def of(self, run_id: str) -> RunState:
        """Describe a run.

        Raises:
            NotFound: there is no such run.
        """
        run = self._runs.snapshot(run_id)
        clock, open_round = self._runs.clock, run.open_round
        closes_at = None
        if run.deadline is not None and not run.status.is_over:
            closes_at = round(clock.wall() + run.deadline - clock.monotonic())
        live, away = self._liveness.live(run_id), self._liveness.away(run_id)
        silent = {each.id for each in run.present if each.id not in live and each.id not in away}
        return RunState(
            id=run.id,
            name=run.settings.name,
            status=run.status,
            paused=run.paused,
            round=run.round,
            rounds=run.plan.federation.rounds,
            phase=open_round.status if open_round else None,
            closes_at=closes_at,
            summary=summarise(run, waiting_in(run, self._liveness), silent),
            devices=tuple(self._devices(run, live, away)),
            engine=self._engine.figures(run_id).to_dict(),
        )

    def _devices(
        self, run: RunSnapshot, live: Collection[str], away: Collection[str]
    ) -> Iterable[DeviceState]:
        heard, meter = self._liveness.heard_ago(run.id), self._runs.meter
        now = self._runs.clock.wall()
        for each in sorted(run.participants.values(), key=lambda device: device.ordinal):
            traffic = meter.participant(run.id, each.id)
            ago = heard.get(each.id)
            yield DeviceState(
                id=each.id,
                name=each.name,
                status=_status(run, each, live, away),
                heard_at=None if ago is None else round(now - ago),
                train_samples=each.train_samples,
                test_samples=each.test_samples,
                up=sum(traffic.up.values()),
                down=sum(traffic.down.values()),
            )


def _status(
    run: RunSnapshot, device: Participant, live: Collection[str], away: Collection[str]
) -> DeviceStatus:
    if device.removed:
        return DeviceStatus.REMOVED
    if device.left or device.id in away or run.status.is_over:
        return DeviceStatus.GONE
    if device.id not in live:
        return DeviceStatus.SILENT
    if run.open_round is None or device.id not in _pending(run, run.open_round):
        return DeviceStatus.WAITING
    is_training = run.open_round.status == RoundStatus.TRAINING
    return DeviceStatus.TRAINING if is_training else DeviceStatus.EVALUATING


def _pending(run: RunSnapshot, open_round: OpenRound) -> list[str]:
    is_training = open_round.status == RoundStatus.TRAINING
    return (pending_trainers if is_training else pending_evaluators)(run, open_round)


def summarise(run: RunSnapshot, waiting: str | None, silent: Collection[str]) -> str:
    """Say in one sentence what a run does or waits for.

    Args:
        run: the run.
        waiting: for whom it waits before it can go on, see `waiting_in`.
        silent: ids of the devices that have sent no request for long.
    """
    if run.status.is_over:
        return f"The run is {run.status}" + (f": {run.reason}." if run.reason else ".")
    if run.open_round is None:
        if run.paused:
            return "The run is paused; resume it to go on."
        return f"The run waits: {waiting}." if waiting else "The next round is about to begin."
    pausing = "; then the run pauses" if run.paused else ""
    if waiting:
        return f"The run waits: {waiting}{pausing}."
    open_round, rounds = run.open_round, run.plan.federation.rounds
    title = f"Round {open_round.round} of {rounds}"
    is_training = open_round.status == RoundStatus.TRAINING
    if not (pending := _pending(run, open_round)):
        return f"{title} is being {'averaged' if is_training else 'closed'}{pausing}."
    what = "the updates of" if is_training else "the evaluations of"
    names = [run.participants[id_].name + (" (silent)" if id_ in silent else "") for id_ in pending]
    return f"{title} waits for {what} {join_names(names)}{pausing}."
