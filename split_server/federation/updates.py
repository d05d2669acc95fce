"""What an update tells of the neurons of the proxy's MLPs, in rounds that ask for it."""

from __future__ import annotations

from torch import Tensor

from protocol.errors import EmptyUpdate, InvalidField, WrongShape
from protocol.frames import Frame
from protocol.messages import MAX_LOSS, NEURONS, BlobRef, EvaluationReport, UpdateMeta
from protocol.plan import RunPlan
from split_model import SplitSettings
from split_model.proxies.neurons import neurons_shape
from split_server.federation.snapshot import Member
from split_server.payloads.tensors import decode_floats


def check_samples(meta: UpdateMeta, member: Member) -> None:
    """Refuse a weight that the participant cannot have.

    Raises:
        EmptyUpdate: no sample was kept.
        InvalidField: more samples than the participant has.
    """
    if meta.samples == 0:
        raise EmptyUpdate(
            "an update that was trained on no sample is not counted",
            field="samples",
            limit=1,
            value=0,
            hint="wait for the next round",
        )
    if meta.samples > member.train_samples:
        raise InvalidField(
            "an update cannot weigh more than the samples its participant has joined with",
            field="samples",
            limit=member.train_samples,
            value=meta.samples,
        )


def require_base(meta: UpdateMeta, state: BlobRef) -> None:
    """Refuse changes against another state than the round's.

    Raises:
        InvalidField: it is another.
    """
    if meta.base is not None and meta.base != state.sha256:
        raise InvalidField(
            "the changes of an update are against the state that its round began with",
            field="base",
            limit=state.sha256,
            value=meta.base,
        )


def check_report(report: EvaluationReport, member: Member) -> None:
    """Refuse an evaluation that this participant cannot have made.

    Raises:
        InvalidField: more samples than it has, or a loss out of range.
    """
    if report.samples > member.test_samples:
        raise InvalidField(
            "an evaluation covers at most all of the participant's samples",
            field="samples",
            limit=member.test_samples,
            value=report.samples,
        )
    if not 0 <= report.loss_sum <= MAX_LOSS * report.samples:
        raise InvalidField(
            "a sum of losses is not negative, and no loss is that large",
            field="loss_sum",
            limit=[0, MAX_LOSS * report.samples],
            value=report.loss_sum,
        )


def asked_shape(settings: RunPlan, round_: int) -> tuple[int, int] | None:
    """The shape [layers, neurons] of what an update of this round has to tell; None: nothing."""
    if not settings.distillation.due(round_, settings.federation.rounds):
        return None
    return neurons_shape(SplitSettings.of(settings.model))


def read_neurons(frame: Frame, settings: RunPlan, round_: int) -> dict[str, Tensor]:
    """How often each neuron was inactive, [layers, neurons], by its name; empty where unasked.

    Raises:
        WrongShape: it is missing, or of another shape.
        InvalidField: a number is no share, or its codec carries no floating-point numbers.
        NonFinite: NaN or infinity in it.
    """
    shape = asked_shape(settings, round_)
    if shape is None:
        return {}
    spec = frame.specs.get(NEURONS)
    if spec is None or spec.shape != shape:
        raise WrongShape(
            "an update of this round tells how often each neuron was inactive",
            field=NEURONS,
            limit=list(shape),
            value="missing" if spec is None else list(spec.shape),
        )
    shares = decode_floats(frame, NEURONS)
    for found in (shares.min().item(), shares.max().item()):
        if not 0 <= found <= 1:
            raise InvalidField(
                "how often a neuron was inactive is a share of the tokens",
                field=NEURONS,
                limit=[0, 1],
                value=found,
            )
    return {NEURONS: shares}
