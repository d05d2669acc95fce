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
    """The ids of all training samples of a participant."""

    meta: StartMeta
    ids: list[bytes]


@dataclass(frozen=True)
class SolveRequest:
    """A participant's sums over its samples.

    Attributes:
        sums: of the features in each class, [C, r].
        counts: number of samples in each class, [C].
    """

    meta: StartMeta
    sums: Tensor
    counts: Tensor


def parse_start(request: SplitRequest) -> StartRequest:
    """Parse the ids of a participant's samples.

    Raises:
        InvalidField, RunClosed, StaleRound, MalformedFrame
    """
    meta = _parse_meta(request)
    check_tensors(request.frame, {"ids"})
    return StartRequest(meta, decode_sample_ids(request.frame))


def parse_solve(request: SplitRequest) -> SolveRequest:
    """Parse a participant's sums.

    Raises:
        InvalidField, RunClosed, StaleRound, MalformedFrame, WrongShape, NonFinite
    """
    meta = _parse_meta(request)
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
    return SolveRequest(meta, decode_floats(request.frame, "sums"), counts)


def _parse_meta(request: SplitRequest) -> StartMeta:
    meta = parse_message(StartMeta, dict(request.frame.meta))
    if not request.plan.model.depths:
        raise InvalidField(
            "this run has no closed-form start", field="depths", limit="above 0", value=0
        )
    request.permission.require_trainer(meta.round, meta.attempt)
    return meta
