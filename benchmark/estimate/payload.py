"""How many bytes tensors take on the wire."""

from __future__ import annotations

from collections.abc import Iterable

from protocol.codec_names import parse_codec
from protocol.codecs import encoded_bytes
from protocol.errors import InvalidField

FLOAT_BYTES = 4  # of a float32
Shape = tuple[int, ...]


def tensor_bytes(codec: str, shape: Shape) -> int:
    """The payload of one tensor; with a codec that compresses without loss, at most.

    Raises:
        UnknownCodec: there is no such codec.
        InvalidField: with this codec the size depends on the values.
    """
    found = encoded_bytes(_uncompressed(codec), shape)
    if found is None:
        raise InvalidField(
            "the size of this codec's payload depends on the values", field="codec", value=codec
        )
    return found


def tensors_bytes(codec: str, shapes: Iterable[Shape]) -> int:
    """The payload of several tensors, each encoded by itself. Raises as `tensor_bytes`."""
    return sum(tensor_bytes(codec, shape) for shape in shapes)


def samples_bytes(codec: str, samples: int, batch_size: int, shape: Shape) -> int:
    """The payload of so many samples of this shape, sent in batches. Raises as `tensor_bytes`."""
    full, rest = divmod(samples, batch_size)
    total = full * tensor_bytes(codec, (batch_size, *shape)) if full else 0
    return total + (tensor_bytes(codec, (rest, *shape)) if rest else 0)


def _uncompressed(codec: str) -> str:
    """What lossless compression saves depends on the values: it is counted as saving nothing."""
    parts = parse_codec(codec)
    return parts.base if parts.parameter is None else f"{parts.base}:{parts.parameter}"
