"""Parse each request kind of the split plane, once, into a frozen dataclass.

A ``parse_*`` function makes all checks of the content: meta, permission, shapes, codecs, sizes and
finiteness. What it returns is valid for the run; handlers only look it up and submit it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from protocol.errors import InvalidField, MalformedFrame, StaleRound
from protocol.frames import Frame
from protocol.limits import FrameLimits
from protocol.messages import (
    ExchangeMeta,
    InferMeta,
    SamplesMeta,
    StepMeta,
    parse_message,
)
from protocol.plan import RunPlan
from split_model.backbone.architecture import anatomy
from split_model.parts.depths import feature_shape
from split_model.parts.tail import needed_tokens
from split_server.models.body_key import BodyKey
from split_server.payloads.samples import (
    EncodedSamples,
    check_encoded_samples,
    decode_sample_ids,
)
from split_server.payloads.tensors import (
    FLOAT32_BYTES,
    check_batch_size,
    check_decoded_size,
    decode_gradients,
    decode_smashed,
)


class Permission(Protocol):
    """Decides whether the participant may send a request now. The federation implements it."""

    def require_running(self) -> None:
        """Raise `RunClosed` if the run is over."""

    def require_trainer(self, round_: int, attempt: int | None) -> None:
        """Raise `RunClosed` or `StaleRound` unless the participant trains in this round now."""

    def require_trainer_or_evaluator(self, round_: int, attempt: int) -> bool:
        """Raise the same unless it trains or evaluates in this round; return if it evaluates."""

    def require_pending_update(self, round_: int, attempt: int) -> None:
        """The same, and raise `StaleRound` if the participant's update was counted."""


@dataclass(frozen=True)
class SplitRequest:
    """A request whose tensors are not decoded yet, and the plan of its run.

    Attributes:
        run, participant: their ids.
        plan: the run's.
        body: the run's frozen body.
        state: the SHA-256 of the device's part of the newest global state.
        permission: decides whether the participant may send this now.
        frame: the content.
        fingerprint: a hash of the content; distinguishes a repeat from another request under the
            same name.
        limits: of the server.
        device: tensors are decoded there.
        reserve: counts bytes that are about to be taken for the request; raises `Busy`.
    """

    run: str
    participant: str
    plan: RunPlan
    body: BodyKey
    state: str
    permission: Permission
    frame: Frame
    fingerprint: int
    limits: FrameLimits
    device: torch.device
    reserve: Callable[[int], None] = lambda _nbytes: None

    @cached_property
    def num_tokens(self) -> int | None:
        """Tokens of the features that the run returns; None: all."""
        if not self.plan.wire.pooled_features:
            return None
        return needed_tokens(self.plan.model)


def response_bytes(request: SplitRequest) -> int:
    """Return the bytes of the tensor that a valid request gets from the engine, in float32."""
    frame, model = request.frame, request.plan.model
    names = ("gradients",) if frame.kind == "backward" else ("smashed", "ids")
    samples = next((frame.specs[name].shape[0] for name in names if name in frame.specs), 0)
    sizes = anatomy(model)
    tokens = sizes.tokens + model.prompt_count
    if frame.kind not in ("forward", "backward", "exchange", "infer"):
        return 0
    if frame.kind == "backward":
        numbers = tokens * sizes.width
    elif model.depths:
        numbers = math.prod(feature_shape(model)) + model.num_classes
    else:
        numbers = (request.num_tokens or tokens) * sizes.width
    return FLOAT32_BYTES * samples * numbers


@dataclass(frozen=True)
class CachedBatch:
    """A batch that the server takes from its sample store."""

    ids: list[bytes]  # [B]


Batch = Tensor | CachedBatch  # a tensor is smashed data [B, T, D]


@dataclass(frozen=True)
class ForwardRequest:
    """A training step's smashed data [B, T, D]."""

    meta: StepMeta
    smashed: Tensor


@dataclass(frozen=True)
class BackwardRequest:
    """The gradient [B, T', D] of a training step's features."""

    meta: StepMeta
    gradients: Tensor


@dataclass(frozen=True)
class ExchangeRequest:
    """One request of a session that tunes prompts on the server.

    ``gradients`` [B, T', D] belong to the previous batch and are missing in the first request;
    ``batch`` is the next batch and is missing in the last request.
    """

    meta: ExchangeMeta
    gradients: Tensor | None
    batch: Tensor | CachedBatch | None


@dataclass(frozen=True)
class InferRequest:
    """A batch to run forward only."""

    meta: InferMeta
    batch: Tensor | CachedBatch


@dataclass(frozen=True)
class SamplesRequest:
    """Samples for the cache, still encoded."""

    samples: EncodedSamples


@dataclass(frozen=True)
class MissingRequest:
    """Ids of samples that may be missing in the cache."""

    ids: list[bytes]


def parse_forward(request: SplitRequest) -> ForwardRequest:
    """Parse a forward of a run whose prompts join at the input.

    Raises:
        InvalidField, RunClosed, StaleRound, MalformedFrame, WrongShape, TooLarge, NonFinite
    """
    meta = parse_step_meta(request)
    refuse_sample_ids(request)
    return ForwardRequest(meta, decode_batch(request))


def parse_backward(request: SplitRequest) -> BackwardRequest:
    """Parse a backward of a run whose prompts join at the input.

    Raises:
        InvalidField, RunClosed, StaleRound, MalformedFrame, WrongShape, TooLarge, NonFinite
    """
    return BackwardRequest(parse_step_meta(request), decode_batch_gradients(request))


def parse_exchange(request: SplitRequest) -> ExchangeRequest:
    """Parse one request of a session that tunes prompts on the server.

    Raises:
        InvalidField, RunClosed, StaleRound, MalformedFrame, WrongShape, TooLarge, NonFinite
    """
    meta = parse_message(ExchangeMeta, dict(request.frame.meta))
    _require_placement(request, "cut")
    request.permission.require_trainer(meta.round, meta.attempt)
    if meta.round < 1:
        raise InvalidField("round 0 tunes no prompts", field="round", limit=1, value=meta.round)
    _check_exchanged_tensors(request.frame, meta)
    return ExchangeRequest(
        meta,
        gradients=_decode_gradients(request) if meta.number > 0 else None,
        batch=(
            _decode_or_name_batch(request, request.plan.training.batch_size)
            if meta.number < meta.steps
            else None
        ),
    )


def parse_infer(request: SplitRequest) -> InferRequest:
    """Parse an inference.

    Raises:
        StaleRound: it names another global state than the newest.
        InvalidField, MalformedFrame, WrongShape, TooLarge, NonFinite
    """
    meta = parse_message(InferMeta, dict(request.frame.meta))
    if meta.state not in (None, request.state):
        raise StaleRound(
            "this is not the newest global state; fetch the newest, its tail belongs to the "
            "server's prompts",
            field="state",
            limit=request.state,
            value=meta.state,
        )
    check_tensors(request.frame, {"ids"} if "ids" in request.frame.specs else {"smashed"})
    return InferRequest(meta, _decode_or_name_batch(request, max_samples=None))


def parse_samples(request: SplitRequest) -> SamplesRequest:
    """Parse samples that the server is to cache.

    Raises:
        InvalidField, RunClosed, MalformedFrame, WrongShape, TooLarge, NonFinite
    """
    parse_message(SamplesMeta, dict(request.frame.meta))
    _require_sample_cache(request)
    request.permission.require_running()
    check_tensors(request.frame, {"ids", "smashed"})
    settings = request.body.settings
    return SamplesRequest(check_encoded_samples(request.frame, settings, request.limits))


def parse_missing(request: SplitRequest) -> MissingRequest:
    """Parse a query for missing samples.

    Raises:
        InvalidField, MalformedFrame
    """
    parse_message(SamplesMeta, dict(request.frame.meta))
    _require_sample_cache(request)
    check_tensors(request.frame, {"ids"})
    return MissingRequest(decode_sample_ids(request.frame))


def parse_step_meta(request: SplitRequest) -> StepMeta:
    """Parse the meta of a training step through the frozen body.

    Raises:
        InvalidField, RunClosed, StaleRound
    """
    meta = parse_message(StepMeta, dict(request.frame.meta))
    _require_placement(request, "input")
    request.permission.require_trainer(meta.round, None)
    return meta


def decode_batch(request: SplitRequest) -> Tensor:
    """Decode and check the smashed data [B, T, D] of a frame with no other tensor."""
    check_tensors(request.frame, {"smashed"})
    return decode_smashed(
        request.frame,
        request.body.settings,
        request.limits,
        request.device,
        request.plan.training.batch_size,
    )


def decode_batch_gradients(request: SplitRequest) -> Tensor:
    """Decode and check the gradients [B, T', D] of a frame with no other tensor."""
    check_tensors(request.frame, {"gradients"})
    return _decode_gradients(request)


def check_tensors(frame: Frame, names: set[str]) -> None:
    """Refuse a frame with a missing tensor, or with one that its kind does not have.

    Raises:
        MalformedFrame
    """
    if set(frame.specs) != names:
        raise MalformedFrame(
            "a request carries exactly the tensors of its kind",
            field="tensors",
            limit=sorted(names),
            value=sorted(frame.specs),
        )


def _decode_gradients(request: SplitRequest) -> Tensor:
    return decode_gradients(
        request.frame,
        request.body.settings,
        request.limits,
        request.device,
        request.num_tokens,
        request.plan.training.batch_size,
    )


def _decode_or_name_batch(request: SplitRequest, max_samples: int | None) -> Tensor | CachedBatch:
    """Decode the smashed data of a frame, or the sample ids that it has instead."""
    frame, settings, limits = request.frame, request.body.settings, request.limits
    if "ids" not in frame.specs:
        return decode_smashed(frame, settings, limits, request.device, max_samples)
    _require_sample_cache(request)
    ids = decode_sample_ids(frame)
    check_batch_size(len(ids), max_samples, "ids")
    shape = anatomy(settings)
    elements = len(ids) * shape.tokens * shape.width
    check_decoded_size(elements, "ids", limits)
    request.reserve(FLOAT32_BYTES * elements)
    return CachedBatch(ids)


def _require_placement(request: SplitRequest, placement: str) -> None:
    if request.plan.model.prompt_at != placement:
        raise InvalidField(
            f"this request is for runs whose prompts join at the {placement}",
            field="prompt_at",
            limit=placement,
            value=request.plan.model.prompt_at,
        )


def refuse_sample_ids(request: SplitRequest) -> None:
    """Refuse a training step that names its samples instead of sending their smashed data.

    Raises:
        InvalidField
    """
    if "ids" in request.frame.specs:
        raise InvalidField(
            "a step of this run names no samples; send its smashed data without ids", field="ids"
        )


def _require_sample_cache(request: SplitRequest) -> None:
    if not request.plan.wire.keep_smashed:
        raise InvalidField(
            "the server caches no smashed data of this run; send them with the request",
            field="keep_smashed",
            limit=True,
        )


def _check_exchanged_tensors(frame: Frame, meta: ExchangeMeta) -> None:
    """Check that an exchange carries exactly the tensors of its number in the session."""
    names = set(frame.specs)
    expected = {"gradients"} if meta.number > 0 else set()
    batch = {"ids", "smashed"} & names if meta.number < meta.steps else set()
    if names != expected | batch or len(batch) > 1:
        raise MalformedFrame(
            "an exchange carries gradients (except the first) and ids or smashed data (except the "
            "last)",
            field="tensors",
            limit=sorted(expected | {"ids"}) if meta.number < meta.steps else sorted(expected),
            value=sorted(names),
        )
