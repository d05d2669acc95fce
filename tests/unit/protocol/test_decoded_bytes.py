"""What decoding takes is known from a header alone."""

from __future__ import annotations

import math

import pytest
import torch

from protocol.codecs import get_codec
from protocol.errors import Busy
from protocol.frames import decode_frame, encode_frame, join_frame

CODECS = [
    *("float32", "float16", "bfloat16", "int8", "int4", "int4-asym", "pq", "topk:0.01"),
    *("topk:1", "cosine:4", "svd:0.9", "klt:1", "int4+zstd", "klt:1+zstd", "float32+zstd"),
]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(8, 7, 192), (3, 5), (40,), (), (2, 0, 3)])
def test_every_codec_declares_at_least_the_decoded_tensor(
    codec: str, shape: tuple[int, ...]
) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    sizes = [buffer.nbytes for buffer in get_codec(codec).encode(tensor)]
    declared = get_codec(codec).decoded_bytes(shape, sizes)
    assert 4 * math.prod(shape) <= declared <= 40 * math.prod(shape) + 512 * 1024


@pytest.mark.parametrize(
    ("codec", "shape", "sizes"),
    [
        ("topk:0.000001", (69_905, 5, 192), [4 * 68, 2 * 68]),
        ("svd:1", (69_905, 5, 192), [0, 0, 0]),
        ("klt:1", (69_905, 5, 192), [2, 4, 6]),
    ],
)
def test_a_small_frame_declares_a_large_tensor(
    codec: str, shape: tuple[int, ...], sizes: list[int]
) -> None:
    assert get_codec(codec).decoded_bytes(shape, sizes) >= 4 * math.prod(shape)


def test_a_frames_meter_is_asked_before_a_tensor_is_decoded() -> None:
    asked: list[int] = []

    def refuse(nbytes: int) -> None:
        asked.append(nbytes)
        raise Busy("full")

    tensors = {"x": (torch.zeros(1000, 100), "svd:1"), "y": (torch.ones(1), "float32")}
    data = join_frame(encode_frame("f", {}, tensors))
    frame = decode_frame(data, meter=refuse)
    assert (len(data) < 1024, asked) == (True, [])
    with pytest.raises(Busy):
        frame.tensor("x")
    assert asked == [400_000]
