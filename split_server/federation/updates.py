"""Check joins, updates and evaluations against what their participant may send."""

from __future__ import annotations

from collections.abc import Collection

from protocol.errors import EmptyUpdate, InvalidField
from protocol.messages import MAX_LOSS, BlobRef, EvaluationReport, JoinRequest, UpdateMeta
from split_server.federation.snapshot import Participant, RunSnapshot


def check_join(request: JoinRequest, max_samples: int) -> None:
    """Refuse a participant with more samples than the run allows.

    Raises:
        InvalidField: a number of samples is above ``max_samples``.
    """
    for field in ("train_samples", "test_samples"):
        if getattr(request, field) > max_samples:
            raise InvalidField(
                "the participant has more samples than this run allows",
                field=field,
                limit=max_samples,
                value=getattr(request, field),
                hint="if the number is right, create a run with a larger federation.max_samples",
            )


def check_name(run: RunSnapshot, request: JoinRequest, live: Collection[str]) -> None:
    """Refuse the name of another device that takes part: people could not tell them apart.

    One that has lost its identity may join again once its former self counts as away.

    Raises:
        InvalidField: a live participant has the name.
    """
    for each in run.present:
        if each.name == request.name and each.train_samples and each.id in live:
            raise InvalidField(
                "another device takes part under this name",
                field="name",
                value=request.name,
                hint="give each device its own --name; a device that has lost its --home joins "
                "again a minute after its last request",
            )


def check_classes(run: RunSnapshot, request: JoinRequest) -> None:
    """Refuse data whose labels would mean other classes than those of the run.

    Raises:
        InvalidField: the classes differ in number or name.
    """
    if request.num_classes != run.plan.model.num_classes:
        raise InvalidField(
            "the device's data and the run differ in the number of classes",
            field="num_classes",
            limit=run.plan.model.num_classes,
            value=request.num_classes,
            hint="a device that lacks a class needs class_names in the run's settings",
        )
    known = {participant.classes_sha256 for participant in run.participants.values()} - {None}
    if request.classes_sha256 is not None and known - {request.classes_sha256}:
        raise InvalidField(
            "the classes of the device's data differ in name from those of earlier devices",
            field="classes_sha256",
            limit=sorted(filter(None, known)),
            value=request.classes_sha256,
            hint="use the same folder names, or list class_names in the run's settings",
        )


def check_consent(run: RunSnapshot, request: JoinRequest) -> None:
    """Refuse a device with samples whose owner has not agreed to what the run does with labels.

    Raises:
        InvalidField: the run shares labels, and the device does not.
    """
    has_samples = request.train_samples or request.test_samples
    if run.plan.shares_labels and has_samples and not request.shares_labels:
        raise InvalidField(
            "the devices of this run send their labels to the server; this one may not",
            field="shares_labels",
            limit=True,
            value=False,
            hint="if the server may have your labels: edge-client join --share-labels",
        )


def check_samples(meta: UpdateMeta, participant: Participant) -> None:
    """Refuse an update with an impossible number of samples.

    Raises:
        EmptyUpdate: the update was trained on no sample.
        InvalidField: more samples than the participant has.
    """
    if meta.samples == 0:
        raise EmptyUpdate(
            "an update without samples does not count",
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
    """Refuse an update whose changes are relative to another state than the round's.

    Raises:
        InvalidField: the base is another state.
    """
    if meta.base is not None and meta.base != state.sha256:
        raise InvalidField(
            "an update's changes must be relative to the state that its round began with",
            field="base",
            limit=state.sha256,
            value=meta.base,
        )


def check_report(report: EvaluationReport, participant: Participant, num_classes: int) -> None:
    """Refuse an evaluation with impossible numbers.

    Raises:
        InvalidField: more samples than it has, an unknown class, or a loss out of range.
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
    _check_classes(report, num_classes)
    if not 0 <= report.loss_sum <= MAX_LOSS * report.samples:
        raise InvalidField(
            "the sum of losses is out of range",
            field="loss_sum",
            limit=[0, MAX_LOSS * report.samples],
            value=report.loss_sum,
        )


def _check_classes(report: EvaluationReport, num_classes: int) -> None:
    if report.predictions is None:
        return
    highest = max((max(cell[:2]) for cell in report.predictions.confusion), default=0)
    if highest >= num_classes:
        raise InvalidField(
            "an evaluation counts a class that the run does not have",
            field="predictions.confusion",
            limit=num_classes - 1,
            value=highest,
        )
