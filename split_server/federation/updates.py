"""Check updates and evaluations against what their participant may send."""

from __future__ import annotations

from protocol.errors import EmptyUpdate, InvalidField
from protocol.messages import MAX_LOSS, BlobRef, EvaluationReport, JoinRequest, UpdateMeta
from split_server.federation.snapshot import Participant


def check_join(request: JoinRequest, max_samples: int) -> None:
    """Refuse numbers of samples that would give a participant too much weight.

    Raises:
        InvalidField: it has more than the run allows.
    """
    for field in ("train_samples", "test_samples"):
        if getattr(request, field) > max_samples:
            raise InvalidField(
                "a participant of this run cannot have so many samples",
                field=field,
                limit=max_samples,
                value=getattr(request, field),
                hint="raise federation.max_samples in a new run, if the number is right",
            )


def check_samples(meta: UpdateMeta, participant: Participant) -> None:
    """Refuse a weight that the participant cannot have.

    Raises:
        EmptyUpdate: the update was trained on no sample.
        InvalidField: more samples than the participant has.
    """
    if meta.samples == 0:
        raise EmptyUpdate(
            "an update that was trained on no sample does not count",
            field="samples",
            limit=1,
            value=0,
            hint="wait for the next round",
        )
    if meta.samples > participant.train_samples:
        raise InvalidField(
            "an update cannot have more samples than its participant joined with",
            field="samples",
            limit=participant.train_samples,
            value=meta.samples,
        )


def check_base(meta: UpdateMeta, state: BlobRef) -> None:
    """Refuse changes relative to another state than the round's.

    Raises:
        InvalidField: they are.
    """
    if meta.base is not None and meta.base != state.sha256:
        raise InvalidField(
            "an update's changes must be relative to the state that its round began with",
            field="base",
            limit=state.sha256,
            value=meta.base,
        )


def check_report(report: EvaluationReport, participant: Participant) -> None:
    """Refuse an evaluation that the participant cannot have made.

    Raises:
        InvalidField: more samples than it has, or a loss out of range.
    """
    if report.samples > participant.test_samples:
        raise InvalidField(
            "an evaluation cannot have more samples than its participant joined with",
            field="samples",
            limit=participant.test_samples,
            value=report.samples,
        )
    if report.selection_samples > participant.train_samples:
        raise InvalidField(
            "a device cannot select states by more samples than it joined with",
            field="selection_samples",
            limit=participant.train_samples,
            value=report.selection_samples,
        )
    if not 0 <= report.loss_sum <= MAX_LOSS * report.samples:
        raise InvalidField(
            "the sum of losses is out of range",
            field="loss_sum",
            limit=[0, MAX_LOSS * report.samples],
            value=report.loss_sum,
        )
