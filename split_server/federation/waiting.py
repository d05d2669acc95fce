"""Say for whom a run waits before it can go on."""

from __future__ import annotations

from collections.abc import Collection

from protocol.messages import RoundStatus
from split_server.federation.liveness import Liveness
from split_server.federation.rounds import is_unmeasured, pending_evaluators
from split_server.federation.snapshot import RunSnapshot

_MAX_NAMES = 8


def waiting_in(run: RunSnapshot, liveness: Liveness) -> str | None:
    """Return for whom a run waits now, see `waiting_for`."""
    if run.plan.shares_labels:
        return waiting_for(run, run.labelled, settled=True)
    settled = liveness.is_settled(run.id, (each.id for each in run.present))
    return waiting_for(run, liveness.live(run.id), settled=settled)


def waiting_for(run: RunSnapshot, live: Collection[str], *, settled: bool) -> str | None:
    """Return for whom a run waits; None: for nobody, or for the participants of an open round.

    Args:
        run: the run.
        live: ids of participants with a recent request.
        settled: the server has been up long enough for every live participant to call.
    """
    if run.status.is_over:
        return None
    if run.open_round is not None:
        if run.open_round.status == RoundStatus.TRAINING or not is_unmeasured(run, run.open_round):
            return None
        pending = pending_evaluators(run, run.open_round)
        if set(pending) & set(live):
            return None
        return f"one of these devices has to measure the last state: {_names(run, pending)}"
    if run.paused:
        return "its operator has paused the run"
    federation = run.plan.federation
    present = [each.id for each in run.trainers]
    if run.closed_rounds == 0 and len(present) < federation.min_participants:
        return _count(run, present, federation.min_participants)
    there = run.drawable(live)
    if len(there) < federation.min_updates:
        return _count(run, there, federation.min_updates)
    if not settled and len(there) < len(present):
        silent = [id_ for id_ in present if id_ not in there]
        return f"the server has started again; not heard from: {_names(run, silent)}"
    return None


def _count(run: RunSnapshot, there: list[str], needed: int) -> str:
    named = f": {_names(run, there)}" if there else ""
    return f"{len(there)} of {needed} devices{named}; {needed - len(there)} more needed"


def _names(run: RunSnapshot, ids: list[str]) -> str:
    return join_names([run.participants[id_].name for id_ in ids])


def join_names(names: Collection[str]) -> str:
    """Join the names of devices for people: the first eight, and how many more there are."""
    shown = [_shown(name) for name in names]
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(shown[:_MAX_NAMES]) + more


def _shown(name: str) -> str:
    return "".join(each if each.isprintable() else "?" for each in name)
