"""Frames that speak of kept samples: their ids, their rows, and the tensors made of them again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from protocol.codec_names import FLOAT_CODECS, is_row_wise_inside
from protocol.codecs import Compressed, get_codec
from protocol.errors import InvalidField, MalformedFrame
from protocol.frames import Frame, TensorSpec
from protocol.limits import FrameLimits
from protocol.messages import SAMPLE_ID_BYTES
from protocol.plan import ModelPlan
from split_server.payloads.tensors import read_smashed, require_finite
from split_server.storage.sample_store import RowForm

# A codec with a parameter looks at a whole tensor.
_ROW_WISE = tuple(codec for codec in FLOAT_CODECS if ":" not in codec and is_row_wise_inside(codec))


def require_codec(spec: TensorSpec, codec: str) -> None:
    """Refuse what is not numbers of this kind, as they lie in the frame.

    Raises:
        MalformedFrame: another codec.
    """
    if spec.codec != codec:
        raise MalformedFrame(
            "this tensor takes one codec alone",
            field=f"{spec.name}.codec",
            limit=codec,
            value=spec.codec,
        )


def require_row_wise(spec: TensorSpec) -> None:
    """Refuse a codec whose rows cannot be taken apart, less a compression of all together.

    Raises:
        InvalidField: it is such a codec.
    """
    if not is_row_wise_inside(spec.codec):
        raise InvalidField(
            "rows are sent in a codec that can be taken apart",
            field=spec.name,
            limit=list(_ROW_WISE),
            value=spec.codec,
        )


def read_ids(frame: Frame) -> list[bytes]:
    """The sample ids of a frame, [B, 16] bytes.

    Raises:
        MalformedFrame: the frame lacks them, or they have another form.
    """
    spec = frame.spec("ids")
    require_codec(spec, "uint8")
    shape = list(spec.shape)
    if len(shape) != 2 or shape[0] < 1 or shape[1] != SAMPLE_ID_BYTES:
        raise MalformedFrame(
            "sample ids are bytes, [samples, 16]",
            field="ids",
            limit=["at least 1", SAMPLE_ID_BYTES],
            value=shape,
        )
    data = bytes(frame.buffers["ids"][0])
    return [data[at : at + SAMPLE_ID_BYTES] for at in range(0, len(data), SAMPLE_ID_BYTES)]


def read_rows(
    frame: Frame, settings: ModelPlan, limits: FrameLimits
) -> tuple[list[bytes], RowForm, Sequence[memoryview]]:
    """Ids, form and encoded rows of samples that are to be kept.

    They are decoded once, so that what is kept is known to be sound. Kept is what came, less a
    compression of all together.

    Raises:
        MalformedFrame: ids and samples differ in number, or one of them is not there.
        InvalidField: a codec that cannot be taken apart.
        WrongShape, NonFinite, TooLarge
    """
    ids, spec = read_ids(frame), frame.spec("smashed")
    require_row_wise(spec)
    if spec.shape[:1] != (len(ids),):
        raise MalformedFrame(
            "there is one id for each sample",
            field="ids",
            limit=list(spec.shape[:1]),
            value=len(ids),
        )
    smashed = read_smashed(frame, settings, limits)
    require_finite({"smashed": smashed})
    codec, buffers = get_codec(spec.codec), frame.buffers["smashed"]
    if isinstance(codec, Compressed):  # together on the wire, one by one here
        buffers = tuple(codec.decompress(buffers, spec.shape))
        codec = codec.inner
    rows = len(ids)
    sizes = tuple(buffer.nbytes // rows for buffer in buffers)
    return ids, RowForm(codec.name, spec.shape[1:], sizes), buffers


def read_kept(form: RowForm, buffers: Sequence[memoryview], device: torch.device) -> Tensor:
    """Smashed data [B, T, D] of samples that were kept."""
    rows = buffers[0].nbytes // form.sizes[0]
    return get_codec(form.codec).decode(buffers, (rows, *form.shape), device)
