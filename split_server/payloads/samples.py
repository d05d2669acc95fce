"""Decode sample ids, and the encoded rows of smashed data that the server caches under them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from protocol.codec_names import FLOAT_CODECS, is_row_wise_inside
from protocol.codecs import Compressed, get_codec
from protocol.errors import InvalidField, MalformedFrame
from protocol.frames import Frame
from protocol.limits import FrameLimits
from protocol.messages import SAMPLE_ID_BYTES
from protocol.plan import ModelPlan
from protocol.tensor_specs import TensorSpec
from split_server.payloads.tensors import decode_smashed
from split_server.storage.sample_store import RowForm

# A codec with a parameter encodes a whole tensor.
_ROW_WISE = tuple(codec for codec in FLOAT_CODECS if ":" not in codec and is_row_wise_inside(codec))

_SEPARATE = "int8"  # the codec in which the cache stores samples that came encoded together


@dataclass(frozen=True)
class EncodedSamples:
    """Checked smashed data, still encoded.

    Attributes:
        ids: one for each sample, [B].
        form: codec, shape and buffer sizes of one sample.
        buffers: the codec's buffers for all samples together.
    """

    ids: list[bytes]
    form: RowForm
    buffers: Sequence[memoryview]


def require_codec(spec: TensorSpec, codec: str) -> None:
    """Refuse a tensor that is encoded with another codec.

    Raises:
        MalformedFrame: it is.
    """
    if spec.codec != codec:
        raise MalformedFrame(
            f"this tensor must be encoded with {codec}",
            field=f"{spec.name}.codec",
            limit=codec,
            value=spec.codec,
        )


def require_row_wise(spec: TensorSpec) -> None:
    """Refuse a codec whose rows cannot be separated after lossless decompression.

    Raises:
        InvalidField: the rows cannot be separated.
    """
    if not is_row_wise_inside(spec.codec):
        raise InvalidField(
            "these rows need a codec that encodes each of them by itself",
            field=spec.name,
            limit=list(_ROW_WISE),
            value=spec.codec,
        )


def decode_sample_ids(frame: Frame, name: str = "ids") -> list[bytes]:
    """Decode sample ids of a frame, [B] of 16 bytes.

    Args:
        frame: the frame.
        name: of the tensor.

    Raises:
        MalformedFrame: the frame lacks them, or codec or shape is wrong.
    """
    spec = frame.spec(name)
    require_codec(spec, "uint8")
    shape = list(spec.shape)
    if len(shape) != 2 or shape[0] < 1 or shape[1] != SAMPLE_ID_BYTES:
        raise MalformedFrame(
            "sample ids are bytes, [samples, 16]",
            field=name,
            limit=["at least 1", SAMPLE_ID_BYTES],
            value=shape,
        )
    data = bytes(frame.buffers[name][0])
    return [data[at : at + SAMPLE_ID_BYTES] for at in range(0, len(data), SAMPLE_ID_BYTES)]


def check_encoded_samples(frame: Frame, settings: ModelPlan, limits: FrameLimits) -> EncodedSamples:
    """Check the samples of a frame for the cache, which stores them encoded.

    They are decoded once, so that the cache contains only valid samples. They are stored as they
    came, less a lossless compression of all samples together; those of a codec whose rows cannot
    be separated, in int8.

    Raises:
        MalformedFrame: a tensor is missing, or ids and samples differ in number.
        InvalidField: the codec is not of floating-point numbers.
        WrongShape, NonFinite, TooLarge
    """
    ids, spec = decode_sample_ids(frame), frame.spec("smashed")
    if spec.shape[:1] != (len(ids),):
        raise MalformedFrame(
            "a request must carry exactly one id for each sample",
            field="ids",
            limit=list(spec.shape[:1]),
            value=len(ids),
        )
    decoded = decode_smashed(frame, settings, limits)
    codec, buffers = get_codec(spec.codec), frame.buffers["smashed"]
    if not is_row_wise_inside(spec.codec):
        codec = get_codec(_SEPARATE)
        buffers = tuple(codec.encode(decoded))
    elif isinstance(codec, Compressed):  # together on the wire, one by one in the cache
        buffers = tuple(codec.decompress(buffers, spec.shape))
        codec = codec.inner
    sizes = tuple(buffer.nbytes // len(ids) for buffer in buffers)
    return EncodedSamples(ids, RowForm(codec.name, spec.shape[1:], sizes), buffers)


def decode_cached(form: RowForm, buffers: Sequence[memoryview], device: torch.device) -> Tensor:
    """Decode smashed data [B, T, D] from the cache."""
    rows = buffers[0].nbytes // form.sizes[0]
    return get_codec(form.codec).decode(buffers, (rows, *form.shape), device)
