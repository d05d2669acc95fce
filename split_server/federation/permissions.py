"""Refuse requests that a run's open round does not accept."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from protocol.errors import Conflict, InvalidField, RunClosed, StaleRound
from protocol.messages import RoundStatus, RunStatus
from split_server.federation.snapshot import OpenRound, Participant, RunSnapshot


def require_running(run: RunSnapshot) -> None:
    """Refuse a request for a run that is over.

    Raises:
        RunClosed: the run is over.
    """
    if run.status.is_over:
        raise RunClosed(
            f"the run is {run.status}", field="run", limit=RunStatus.RUNNING, value=run.status
        )


def require_phase(
    run: RunSnapshot, round_: int, attempt: int | None, status: RoundStatus
) -> OpenRound:
    """Return the open round, if it is the round and the phase that a request belongs to.

    Args:
        run: the run.
        round_: round in the request.
        attempt: attempt in the request; None: the request has none.
        status: phase that the request belongs to.

    Raises:
        RunClosed: the run is over.
        StaleRound: another round, attempt or phase is open, or none.
    """
    require_running(run)
    open_round = run.open_round
    if open_round is None or open_round.round != round_:
        raise StaleRound(
            "this round is not open",
            field="round",
            limit=open_round.round if open_round else None,
            value=round_,
        )
    if attempt is not None and open_round.attempt != attempt:
        raise StaleRound(
            "this attempt at the round is not open",
            field="attempt",
            limit=open_round.attempt,
            value=attempt,
        )
    if open_round.status != status:
        raise StaleRound(
            f"the round is {open_round.status} now, not {status}",
            field="round",
            limit=str(status),
            value=str(open_round.status),
        )
    return open_round


def require_trainer(
    run: RunSnapshot, participant: Participant, round_: int, attempt: int | None
) -> OpenRound:
    """Return the open round, if it is training and has sampled this participant.

    Raises:
        RunClosed: the run is over.
        StaleRound: the round is not open for training, or did not sample this participant.
    """
    open_round = require_phase(run, round_, attempt, RoundStatus.TRAINING)
    if participant.id not in open_round.sampled:
        raise StaleRound(
            "this round did not sample this participant; wait for the next assignment",
            field="round",
            value=round_,
        )
    return open_round


def require_trainer_or_evaluator(
    run: RunSnapshot, participant: Participant, round_: int, attempt: int
) -> bool:
    """Return whether the round is in evaluation; refuse a participant that has no part in it.

    Raises:
        RunClosed: the run is over.
        StaleRound: the round is not open, or did not sample this participant.
    """
    if run.open_round is None or run.open_round.status != RoundStatus.EVALUATING:
        require_trainer(run, participant, round_, attempt)
        return False
    open_round = require_phase(run, round_, attempt, RoundStatus.EVALUATING)
    require_evaluator(open_round, participant.id)
    return True


def require_pending_update(
    run: RunSnapshot, participant: Participant, round_: int, attempt: int
) -> OpenRound:
    """Return the open round, if it can still count an update of this participant.

    Raises:
        RunClosed: the run is over.
        StaleRound: as in `require_trainer`, or the update was counted or refused already.
    """
    open_round = require_trainer(run, participant, round_, attempt)
    if participant.id in open_round.updated or participant.id in open_round.declined:
        raise StaleRound(
            "this participant's update was already counted or declined", field="round", value=round_
        )
    return open_round


def require_any_trainer(run: RunSnapshot, participant: Participant) -> None:
    """Refuse a participant from whom the open round, if any, expects no update.

    Raises:
        RunClosed: the run is over.
        StaleRound: no round is open for training, or it did not sample this participant.
    """
    require_running(run)
    if run.open_round is None:
        raise StaleRound(
            "no round is open", field="round", limit="an open round", value=str(run.status)
        )
    require_trainer(run, participant, run.open_round.round, None)


def require_own_labels(run: RunSnapshot) -> None:
    """Refuse an update of a device whose updates the server computes.

    Raises:
        InvalidField: the run's labels are shared.
    """
    if run.plan.shares_labels:
        raise InvalidField(
            "the server computes the updates of this run",
            field="training.labels",
            limit=["device", "noised:E"],
            value=run.plan.training.labels,
        )


def require_evaluator(open_round: OpenRound, participant_id: str) -> None:
    """Refuse an evaluation by a participant that is not an evaluator of the round.

    Raises:
        StaleRound: this participant is not an evaluator of the round.
    """
    if participant_id not in open_round.evaluators:
        raise StaleRound(
            "this participant was not selected to evaluate this round",
            field="round",
            value=open_round.round,
        )


def require_first(already: Collection[str], participant_id: str, what: str) -> None:
    """Refuse a second update or evaluation of a participant.

    Args:
        already: ids of the participants whose update or evaluation was counted.
        participant_id: the sender.
        what: "update" or "evaluation".

    Raises:
        Conflict: one was already counted.
    """
    if participant_id in already:
        raise Conflict(
            f"this participant's {what} for this round was counted already",
            field=what,
            limit=1,
            value=2,
        )


@dataclass(frozen=True)
class SenderPermission:
    """Decides whether a participant may send a request of the split plane.

    The methods call the functions of the same names.
    """

    run: RunSnapshot
    participant: Participant

    def require_running(self) -> None:
        """Raise `RunClosed` if the run is over."""
        require_running(self.run)

    def require_trainer(self, round_: int, attempt: int | None) -> None:
        """Raise `RunClosed` or `StaleRound` unless the participant is training in this round."""
        require_trainer(self.run, self.participant, round_, attempt)

    def require_trainer_or_evaluator(self, round_: int, attempt: int) -> bool:
        """As `require_trainer`, or in the round's evaluation; return whether it evaluates."""
        return require_trainer_or_evaluator(self.run, self.participant, round_, attempt)

    def require_pending_update(self, round_: int, attempt: int) -> None:
        """As `require_trainer`; raise `StaleRound` if the participant's update was counted."""
        require_pending_update(self.run, self.participant, round_, attempt)
