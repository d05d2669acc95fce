"""Forwards that bring changes: smashed data made of them and of the copies that the server has.

Both ends hold the same copy of a sample's smashed data, in float32. A request names, for each of
its samples, the version of the copy that it is against and the version of the copy that it leaves.
A version is made once and stands for one content, so a request that comes twice finds its own work
done, and whatever does not fit is asked for whole. See AQ-SGD (arXiv 2206.01299) and SplitCom
(arXiv 2602.10564).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

from protocol.codecs import codec_named
from protocol.errors import MalformedFrame, NonFinite, WrongShape
from protocol.frames import Frame
from protocol.limits import FrameLimits
from split_model import SplitSettings, anatomy
from split_server.payloads.samples import read_ids, require_codec, require_row_wise
from split_server.payloads.tensors import check_batch, check_decoded, is_finite, read_floats
from split_server.storage.sample_store import Owner, RowForm, SampleStore, StoredSample

_ROWS: Final[Mapping[str, str]] = {"whole": "whole_rows", "changes": "change_rows"}

_TENSORS: Final = {"ids", "versions", *_ROWS, *_ROWS.values()}

_PLAIN = "float32"  # of the copies

_SHOWN = 16  # wrong numbers in a refusal


@dataclass(frozen=True)
class Rows:
    """Some rows of a batch: their places in it, rising, and what came for them."""

    places: list[int]
    tensor: Tensor  # [len(places), T, D], float32


@dataclass(frozen=True)
class DeltaBatch:
    """What a forward brings of its samples; rows in neither part are as their copies are.

    Attributes:
        ids: one for each sample, none twice, [B].
        before: the versions of the copies that it is against, [B].
        after: those that it leaves, [B].
        whole: rows that stand for themselves.
        changes: rows that are to be added to their copies.
    """

    ids: list[bytes]
    before: list[int]
    after: list[int]
    whole: Rows
    changes: Rows


def read_revision(
    frame: Frame, settings: SplitSettings, limits: FrameLimits, most: int
) -> DeltaBatch:
    """A revision of at most ``most`` samples.

    Raises:
        MalformedFrame: a tensor is missing, unknown or at odds with another.
        TooLarge: the batch is over the limits once it is decoded, however little was sent.
        InvalidField: too many samples, or a codec that cannot be taken apart.
        WrongShape: rows that are not [T, D] of this run.
        NonFinite: NaN or infinity.
    """
    if not set(frame.specs) <= _TENSORS:
        raise MalformedFrame(
            "this is no tensor of a forward with changes",
            field="tensors",
            limit=sorted(_TENSORS),
            value=sorted(frame.specs),
        )
    ids = read_ids(frame)
    check_batch(len(ids), most, "ids")
    if len(set(ids)) < len(ids):
        raise MalformedFrame(
            "a sample is named twice", field="ids", limit=len(ids), value=len(set(ids))
        )
    versions = _read_numbers(frame, "versions", (len(ids), 2))
    shape = (anatomy(settings).tokens + settings.prompt_count, anatomy(settings).width)
    check_decoded(len(ids) * math.prod(shape), "ids", limits)
    whole, changes = (_read_rows(frame, name, len(ids), shape) for name in _ROWS)
    revision = DeltaBatch(ids, versions[:, 0].tolist(), versions[:, 1].tolist(), whole, changes)
    _check_versions(revision)
    return revision


def rebuild(store: SampleStore, owner: Owner, revision: DeltaBatch) -> Tensor | list[int]:
    """Smashed data [B, T, D] in float32; or the places of samples whose copies are missing.

    The store then has the copies that the revision leaves; or, where some are missing, it is as it
    was.

    Raises:
        NonFinite: a change leads out of float32's range.
        TooLarge: one sample alone is over what the server keeps.
    """
    kept = store.find(owner, revision.ids)
    standing = set(range(len(kept))) - set(revision.whole.places)
    missing = [place for place in sorted(standing) if not _fits(kept[place], revision, place)]
    if missing:
        return missing
    shape = revision.whole.tensor.shape[1:]
    smashed = torch.empty(len(kept), *shape)
    _fill(smashed, {place: copy.data for place in standing if (copy := kept[place]) is not None})
    changes = [
        (place, change)
        for place, change in zip(revision.changes.places, revision.changes.tensor, strict=True)
        if not _has(kept[place], revision.after[place])  # else this very request was here before
    ]
    for place, change in changes:
        smashed[place] += change
    for place, whole in zip(revision.whole.places, revision.whole.tensor, strict=True):
        smashed[place] = whole
    if not is_finite(smashed):
        raise NonFinite("a change leads out of the range of numbers", field="changes")
    renewed = revision.whole.places + [place for place, _ in changes]
    if renewed:
        store.replace(
            owner,
            RowForm(_PLAIN, tuple(shape), (smashed[0].nbytes,)),
            [revision.ids[place] for place in renewed],
            codec_named(_PLAIN).encode(smashed[renewed]),
            [revision.after[place] for place in renewed],
        )
    return smashed


def _fits(copy: StoredSample | None, revision: DeltaBatch, place: int) -> bool:
    """Whether a copy is the one that this revision is against, or the one that it leaves."""
    return _has(copy, revision.before[place]) or _has(copy, revision.after[place])


def _has(copy: StoredSample | None, version: int) -> bool:
    return copy is not None and copy.version == version


def _fill(smashed: Tensor, copies: Mapping[int, bytes | memoryview]) -> None:
    """Write copies to their places in [B, T, D]."""
    if copies:
        joined = memoryview(bytearray(b"".join(copies.values())))
        shape = (len(copies), *smashed.shape[1:])
        smashed[list(copies)] = codec_named(_PLAIN).decode([joined], shape)


def _read_rows(frame: Frame, name: str, samples: int, shape: tuple[int, int]) -> Rows:
    """The rows of one part; none, where the frame has neither the part nor its places."""
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
    places = _read_numbers(frame, _ROWS[name], (spec.shape[0],)).tolist()
    if not all(low < high for low, high in pairwise([-1, *places, samples])):
        raise MalformedFrame(
            "places are those of samples of the batch, and rise",
            field=_ROWS[name],
            limit=samples - 1,
            value=places[:_SHOWN],
        )
    return Rows(places, read_floats(frame, name))


def _read_numbers(frame: Frame, name: str, shape: tuple[int, ...]) -> Tensor:
    spec = frame.spec(name)
    require_codec(spec, "int64")
    if spec.shape != shape:
        raise MalformedFrame(
            "whole numbers of this shape are needed",
            field=name,
            limit=list(shape),
            value=list(spec.shape),
        )
    return frame.tensor(name)


def _check_versions(revision: DeltaBatch) -> None:
    """A row is sent once and then has a new version, or not at all and keeps its own."""
    sent = {*revision.whole.places, *revision.changes.places}
    parts = len(revision.whole.places) + len(revision.changes.places)
    if len(sent) < parts:
        raise MalformedFrame(
            "a row is whole or a change", field="change_rows", limit=len(sent), value=parts
        )
    for place, (before, after) in enumerate(zip(revision.before, revision.after, strict=True)):
        if (before == after) is (place in sent):
            raise MalformedFrame(
                "a row has a new version if it is sent, and else the one that it had",
                field="versions",
                limit=place,
                value=[before, after],
            )
