"""Check updates and evaluations against their run, and decode an update's neuron statistics."""

from __future__ import annotations

from torch import Tensor

from protocol.errors import EmptyUpdate, InvalidField, WrongShape
from protocol.frames import Frame
from protocol.messages import MAX_LOSS, NEURONS, BlobRef, EvaluationReport, UpdateMeta
from protocol.plan import RunPlan
from split_server.federation.snapshot import Participant
from split_server.payloads.tensors import decode_floats
from tuning_methods.proxies.neurons import neurons_shape


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
    if not 0 <= report.loss_sum <= MAX_LOSS * report.samples:
        raise InvalidField(
            "the sum of losses is out of range",
            field="loss_sum",
            limit=[0, MAX_LOSS * report.samples],
            value=report.loss_sum,
        )


def expected_neurons_shape(plan: RunPlan, round_: int) -> tuple[int, int] | None:
    """Return the shape [layers, neurons] of the statistics in this round's updates; None: none."""
    if not plan.distillation.due(round_, plan.federation.rounds):
        return None
    return neurons_shape(plan.model)


def read_neurons(frame: Frame, plan: RunPlan, round_: int) -> dict[str, Tensor]:
    """Decode each neuron's share of inactive tokens, [layers, neurons], by the tensor's name.

    The result is empty in rounds without these statistics.

    Raises:
        WrongShape: the tensor is missing or differs in shape.
        InvalidField: a share is not in [0, 1], or the codec carries no floating-point numbers.
        NonFinite: NaN or infinity.
    """
    shape = expected_neurons_shape(plan, round_)
    if shape is None:
        return {}
    spec = frame.specs.get(NEURONS)
    if spec is None or spec.shape != shape:
        raise WrongShape(
            "an update of this round must report how often each neuron was inactive",
            field=NEURONS,
            limit=list(shape),
            value="missing" if spec is None else list(spec.shape),
        )
    shares = decode_floats(frame, NEURONS)
    for extreme in (shares.min().item(), shares.max().item()):
        if not 0 <= extreme <= 1:
            raise InvalidField(
                "a neuron's inactivity is a share of the tokens",
                field=NEURONS,
                limit=[0, 1],
                value=extreme,
            )
    return {NEURONS: shares}
