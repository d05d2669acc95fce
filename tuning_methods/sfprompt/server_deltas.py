"""Parse forwards that send deltas, and rebuild smashed data from them and the server's cache.

Server and device cache the same smashed data of a sample, in float32. A request names, for each
sample, the cached version that its delta refers to and the version that results. A version is
written once and identifies one content: a repeated request finds its work done, and a sample whose
version does not match is requested in full. See AQ-SGD (arXiv 2206.01299) and SplitCom
(arXiv 2602.10564).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

from protocol.codecs import get_codec
from protocol.errors import MalformedFrame, NonFinite, WrongShape
from protocol.frames import Frame
from protocol.limits import FrameLimits
from protocol.messages import StepMeta
from protocol.plan import ModelPlan
from split_model.backbone.architecture import anatomy
from split_server.payloads.requests import SplitRequest, parse_step_meta
from split_server.payloads.samples import decode_sample_ids, require_codec, require_row_wise
from split_server.payloads.tensors import (
    FLOAT32_BYTES,
    check_batch_size,
    check_decoded_size,
    decode_floats,
    is_finite,
)
from split_server.storage.sample_store import Owner, RowForm, SampleStore, StoredSample

# Name of the rows' tensor: name of the tensor with their indices in the batch.
_ROWS: Final[Mapping[str, str]] = {"whole": "whole_rows", "changes": "change_rows"}

_TENSORS: Final = {"ids", "versions", *_ROWS, *_ROWS.values()}

_CACHE_CODEC = "float32"

_CACHE_FORM = f"version, {_CACHE_CODEC}"  # a sample's version, then its smashed data

_VERSION = struct.Struct("<q")

_MAX_REPORTED = 16  # wrong numbers in an error


@dataclass(frozen=True)
class Rows:
    """Some rows of a batch."""

    indices: list[int]  # in the batch, ascending
    tensor: Tensor  # [len(indices), T, D], float32


@dataclass(frozen=True)
class DeltaBatch:
    """A batch of a forward; rows in neither part equal the cached ones.

    Attributes:
        ids: one for each sample, unique, [B].
        before: the cached versions that the request refers to, [B].
        after: the versions that it leaves in the cache, [B].
        whole: rows that replace the cached ones.
        changes: rows to be added to the cached ones.
    """

    ids: list[bytes]
    before: list[int]
    after: list[int]
    whole: Rows
    changes: Rows


@dataclass(frozen=True)
class DeltaForward:
    """A training step's batch, sent as deltas."""

    meta: StepMeta
    batch: DeltaBatch


def parse_delta_forward(request: SplitRequest) -> DeltaForward:
    """Parse a forward that names its samples and sends their deltas.

    Raises:
        InvalidField, RunClosed, StaleRound, MalformedFrame, WrongShape, TooLarge, NonFinite
    """
    meta = parse_step_meta(request)
    max_samples = request.plan.training.batch_size
    settings = request.body.settings
    return DeltaForward(meta, decode_deltas(request.frame, settings, request.limits, max_samples))


def decode_deltas(
    frame: Frame, settings: ModelPlan, limits: FrameLimits, max_samples: int
) -> DeltaBatch:
    """Decode and check a batch of deltas, of at most ``max_samples`` samples.

    Raises:
        MalformedFrame: a tensor is missing, unknown or contradicts another.
        TooLarge: the decoded batch exceeds the limits, however little was sent.
        InvalidField: too many samples, or a codec whose rows cannot be separated.
        WrongShape: rows are not [T, D] of this run.
        NonFinite: NaN or infinity.
    """
    if not set(frame.specs) <= _TENSORS:
        raise MalformedFrame(
            "a forward with deltas carries no other tensors than these",
            field="tensors",
            limit=sorted(_TENSORS),
            value=sorted(frame.specs),
        )
    ids = decode_sample_ids(frame)
    check_batch_size(len(ids), max_samples, "ids")
    if len(set(ids)) < len(ids):
        raise MalformedFrame(
            "sample ids must be unique", field="ids", limit=len(ids), value=len(set(ids))
        )
    versions = _decode_integers(frame, "versions", (len(ids), 2))
    shape = (anatomy(settings).tokens + settings.prompt_count, anatomy(settings).width)
    check_decoded_size(len(ids) * math.prod(shape), "ids", limits)
    if frame.meter is not None:
        frame.meter(FLOAT32_BYTES * len(ids) * math.prod(shape))
    whole, changes = (_decode_rows(frame, name, len(ids), shape) for name in _ROWS)
    batch = DeltaBatch(ids, versions[:, 0].tolist(), versions[:, 1].tolist(), whole, changes)
    _check_versions(batch)
    return batch


def apply_deltas(store: SampleStore, owner: Owner, batch: DeltaBatch) -> Tensor | list[int]:
    """Rebuild smashed data [B, T, D] in float32, or return the indices of missing samples.

    Afterwards the store contains the versions that the batch leaves. If samples are missing, the
    store is unchanged.

    Raises:
        NonFinite: the sum exceeds float32's range.
        TooLarge: one sample alone exceeds the store's limit.
    """
    cached = store.find(owner, batch.ids)
    needed = set(range(len(cached))) - set(batch.whole.indices)
    missing = [index for index in sorted(needed) if not _matches(cached[index], batch, index)]
    if missing:
        return missing
    shape = batch.whole.tensor.shape[1:]
    smashed = torch.empty(len(cached), *shape)
    _fill(
        smashed,
        {
            index: read_cached(sample)[1]
            for index in needed
            if (sample := cached[index]) is not None
        },
    )
    changes = [
        (index, change)
        for index, change in zip(batch.changes.indices, batch.changes.tensor, strict=True)
        if not _has_version(cached[index], batch.after[index])  # else a repeat: applied already
    ]
    for index, change in changes:
        smashed[index] += change
    for index, row in zip(batch.whole.indices, batch.whole.tensor, strict=True):
        smashed[index] = row
    if not is_finite(smashed):
        raise NonFinite("smashed data with their changes exceed float32's range", field="changes")
    updated = batch.whole.indices + [index for index, _ in changes]
    if updated:
        versions = b"".join(_VERSION.pack(batch.after[index]) for index in updated)
        store.put(
            owner,
            RowForm(_CACHE_FORM, tuple(shape), (_VERSION.size, smashed[0].nbytes)),
            [batch.ids[index] for index in updated],
            [memoryview(versions), *get_codec(_CACHE_CODEC).encode(smashed[updated])],
            replace=True,
        )
    return smashed


def read_cached(sample: StoredSample) -> tuple[int, memoryview]:
    """Return the version of a cached sample, and its smashed data in float32."""
    data = memoryview(sample.data)
    (version,) = _VERSION.unpack(data[: _VERSION.size])
    return int(version), data[_VERSION.size :]


def _matches(sample: StoredSample | None, batch: DeltaBatch, index: int) -> bool:
    """Whether the cached version is the one before or the one after this batch."""
    return _has_version(sample, batch.before[index]) or _has_version(sample, batch.after[index])


def _has_version(sample: StoredSample | None, version: int) -> bool:
    return sample is not None and read_cached(sample)[0] == version


def _fill(smashed: Tensor, cached: Mapping[int, memoryview]) -> None:
    """Write cached rows to their indices in [B, T, D]."""
    if cached:
        joined = memoryview(bytearray(b"".join(cached.values())))
        shape = (len(cached), *smashed.shape[1:])
        smashed[list(cached)] = get_codec(_CACHE_CODEC).decode([joined], shape)


def _decode_rows(frame: Frame, name: str, samples: int, shape: tuple[int, int]) -> Rows:
    """Decode one part's rows; none if the frame has neither the rows nor their indices."""
    if name not in frame.specs and _ROWS[name] not in frame.specs:
        return Rows([], torch.empty(0, *shape))
    spec = frame.spec(name)
    if len(spec.shape) != 3 or spec.shape[1:] != shape or spec.shape[0] < 1:
        raise WrongShape(
            "rows of a batch are [rows, tokens, width]",
            field=name,
            limit=["at least 1", *shape],
            value=list(spec.shape),
        )
    require_row_wise(spec)
    indices = _decode_integers(frame, _ROWS[name], (spec.shape[0],)).tolist()
    if not all(low < high for low, high in pairwise([-1, *indices, samples])):
        raise MalformedFrame(
            "row indices must ascend and lie within the batch",
            field=_ROWS[name],
            limit=samples - 1,
            value=indices[:_MAX_REPORTED],
        )
    return Rows(indices, decode_floats(frame, name))


def _decode_integers(frame: Frame, name: str, shape: tuple[int, ...]) -> Tensor:
    spec = frame.spec(name)
    require_codec(spec, "int64")
    if spec.shape != shape:
        raise MalformedFrame(
            "a tensor of integers differs in shape from the batch",
            field=name,
            limit=list(shape),
            value=list(spec.shape),
        )
    return frame.tensor(name)


def _check_versions(batch: DeltaBatch) -> None:
    """Check that a row is sent at most once, and has a new version exactly if it is sent."""
    sent = {*batch.whole.indices, *batch.changes.indices}
    rows = len(batch.whole.indices) + len(batch.changes.indices)
    if len(sent) < rows:
        raise MalformedFrame(
            "a row is sent either whole or as a change, not both",
            field="change_rows",
            limit=len(sent),
            value=rows,
        )
    for index, (before, after) in enumerate(zip(batch.before, batch.after, strict=True)):
        if (before == after) is (index in sent):
            raise MalformedFrame(
                "the version of a row changes if the row is sent, and only then",
                field="versions",
                limit=index,
                value=[before, after],
            )
