"""Parse the requests of round 0, each once, into a frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from protocol.errors import InvalidField, WrongShape
from protocol.messages import StartMeta, parse_message
from split_model.parts.depths import feature_shape
from split_server.payloads.requests import SplitRequest, check_tensors
from split_server.payloads.samples import decode_sample_ids
from split_server.payloads.tensors import decode_floats


@dataclass(frozen=True)
class StartRequest:
    """The ids of all training samples of a participant.

    Attributes:
        meta: as sent.
        ids: of the samples.
        is_later: round 0 has its result already, and nobody is waited for.
    """

    meta: StartMeta
    ids: list[bytes]
    is_later: bool


@dataclass(frozen=True)
class SolveRequest:
    """A participant's sums over its samples.

    Attributes:
        sums: of the features in each class, [C, r].
        meta: as sent.
        counts: number of samples in each class, [C].
        is_later: round 0 has its result already, and nobody is waited for.
    """

    meta: StartMeta
    sums: Tensor
    counts: Tensor
    is_later: bool


def parse_start(request: SplitRequest) -> StartRequest:
    """Parse the ids of a participant's samples.

    Raises:
        InvalidField, RunClosed, StaleRound, MalformedFrame
    """
    meta, is_later = _parse_meta(request)
    check_tensors(request.frame, {"ids"})
    return StartRequest(meta, decode_sample_ids(request.frame), is_later)


def parse_solve(request: SplitRequest) -> SolveRequest:
    """Parse a participant's sums.

    Raises:
        InvalidField, RunClosed, StaleRound, MalformedFrame, WrongShape, NonFinite
    """
    meta, is_later = _parse_meta(request)
    check_tensors(request.frame, {"sums", "counts"})
    classes, (_, rank) = request.plan.model.num_classes, feature_shape(request.plan.model)
    for name, shape in (("sums", [classes, rank]), ("counts", [classes])):
        given = list(request.frame.spec(name).shape)
        if given != shape:
            raise WrongShape(
                "the sums of a start have one row for each class",
                field=name,
                limit=shape,
                value=given,
            )
    counts = decode_floats(request.frame, "counts")
    if bool((counts < 0).any()) or not torch.equal(counts, counts.round()):
        raise InvalidField("counts are whole numbers from 0", field="counts", limit=0)
    return SolveRequest(meta, decode_floats(request.frame, "sums"), counts, is_later)


def _parse_meta(request: SplitRequest) -> tuple[StartMeta, bool]:
    """Return the meta part, and whether round 0 has its result already."""
    meta = parse_message(StartMeta, dict(request.frame.meta))
    if not request.plan.model.depths:
        raise InvalidField(
            "this run has no closed-form start", field="depths", limit="above 0", value=0
        )
    evaluates = request.permission.require_trainer_or_evaluator(meta.round, meta.attempt)
    return meta, evaluates or meta.round > 0
