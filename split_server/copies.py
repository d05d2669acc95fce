"""Forwards that bring changes: smashed data made of them and of the copies that the server has.

Both ends hold the same copy of a sample's smashed data, in float32. A request names, for each of its
samples, the version of the copy that it is against and the version of the copy that it leaves. A
version is made once and stands for one content, so a request that comes twice finds its own work
done, and whatever does not fit is asked for whole. See AQ-SGD (arXiv 2206.01299) and SplitCom
(arXiv 2602.10564).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from protocol.codec_names import is_row_wise
from protocol.codecs import codec_named
from protocol.errors import InvalidField, MalformedFrame, NonFinite, WrongShape
from protocol.frames import Frame
from split_model import SplitSettings, anatomy
from split_server.intake import check_batch, read_floats
from split_server.kept_samples import read_ids
from split_server.samples import Owner, RowForm, SampleStore

_ROWS: Final[Mapping[str, str]] = {"whole": "whole_rows", "changes": "change_rows"}
_TENSORS: Final = {"ids", "versions", *_ROWS, *_ROWS.values()}
_PLAIN = "float32"  # of the copies


@dataclass(frozen=True)
class Rows:
    """Some rows of a batch: their places in it, rising, and what came for them."""

    places: list[int]
    tensor: Tensor  # [len(places), T, D], float32


@dataclass(frozen=True)
class Update:
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


def read_update(frame: Frame, settings: SplitSettings, most: int) -> Update:
    """An update of at most ``most`` samples.

    Raises:
        MalformedFrame: a tensor is missing, unknown or at odds with another.
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
        raise MalformedFrame("a sample is named twice", field="ids", limit=1, value=2)
    versions = _read_numbers(frame, "versions", (len(ids), 2))
    shape = (anatomy(settings).tokens + settings.prompt_count, anatomy(settings).width)
    whole, changes = (_read_rows(frame, name, len(ids), shape) for name in _ROWS)
    update = Update(ids, versions[:, 0].tolist(), versions[:, 1].tolist(), whole, changes)
    _check_versions(update)
    return update


def rebuild(store: SampleStore, owner: Owner, update: Update) -> Tensor | list[int]:
    """Smashed data [B, T, D] in float32; or the places of samples whose copies are missing.

    The store then has the new copies, or is as it was.

    Raises:
        NonFinite: a change leads out of float32's range.
        TooLarge: one sample alone is over what the server keeps.
    """
    copies = store.find(owner, update.ids)
    missing: list[int] = []
    kept: dict[int, memoryview] = {}
    unchanged: list[int] = []  # their copies are not what the update leaves
    for place in sorted(set(range(len(update.ids))) - set(update.whole.places)):
        copy = copies[place]
        if copy is None or copy.version not in (update.before[place], update.after[place]):
            missing.append(place)
            continue
        kept[place] = memoryview(copy.data)
        if copy.version != update.after[place]:
            unchanged.append(place)
    if missing:
        return missing
    rows = (update.changes if update.changes.places else update.whole).tensor
    shape = ...
