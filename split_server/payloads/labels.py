"""Parse the labels of a device that shares them."""

from __future__ import annotations

import torch
from torch import Tensor

from protocol.errors import InvalidField, MalformedFrame, WrongShape
from protocol.frames import Frame
from protocol.messages import SamplesMeta, parse_message
from split_server.payloads.requests import SplitRequest
from split_server.payloads.samples import decode_sample_ids, require_codec
from split_server.shared_labels.labels import LabelledSamples, SharedLabels

_KINDS = ("train", "test")


def parse_labels(request: SplitRequest) -> SharedLabels:
    """Parse the ids and labels of a participant's samples.

    Raises:
        InvalidField: the run shares no labels, or a label is no class.
        RunClosed, MalformedFrame, WrongShape
    """
    parse_message(SamplesMeta, dict(request.frame.meta))
    request.permission.require_running()
    if not request.plan.shares_labels:
        raise InvalidField(
            "labels stay on the devices of this run",
            field="training.labels",
            limit="shared",
            value=request.plan.training.labels,
        )
    names = set(request.frame.specs)
    kinds = [kind for kind in _KINDS if f"{kind}_ids" in names]
    expected = {f"{kind}_{part}" for kind in kinds for part in ("ids", "labels")}
    if not kinds or names != expected:
        raise MalformedFrame(
            "a frame of labels has ids and labels of training samples, of test samples, or of both",
            field="tensors",
            limit=sorted(f"{kind}_{part}" for kind in _KINDS for part in ("ids", "labels")),
            value=sorted(names),
        )
    classes = request.plan.model.num_classes
    parts = {kind: _parse(request.frame, kind, classes) for kind in kinds}
    none = LabelledSamples([], torch.zeros(0, dtype=torch.int64))
    return SharedLabels(parts.get("train", none), parts.get("test", none))


def _parse(frame: Frame, kind: str, classes: int) -> LabelledSamples:
    ids, name = decode_sample_ids(frame, f"{kind}_ids"), f"{kind}_labels"
    spec = frame.spec(name)
    require_codec(spec, "int64")
    if tuple(spec.shape) != (len(ids),):
        raise WrongShape(
            "each sample has one label", field=name, limit=[len(ids)], value=list(spec.shape)
        )
    labels: Tensor = frame.tensor(name).clone()
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise InvalidField(
            "a label is the number of a class, from 0",
            field=name,
            limit=classes - 1,
            value=int(wrong[0]),
        )
    return LabelledSamples(ids, labels)
