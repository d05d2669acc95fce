"""Errors report the refused value and the allowed limit."""

from __future__ import annotations

import math
import struct
from typing import Any

import msgpack
import pytest
import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from protocol.codecs import get_codec
from protocol.errors import MalformedFrame, SFPromptError, TooLarge
from protocol.frames import decode_frame
from protocol.limits import FrameLimits


def bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(bytearray(tensor.contiguous().view(torch.uint8).numpy().tobytes()))


def f32(*numbers: float) -> memoryview:
    return bytes_of(torch.tensor(numbers))


def half(*numbers: float) -> memoryview:
    return bytes_of(torch.tensor(numbers, dtype=torch.float16))


def upper(*numbers: float) -> memoryview:
    return bytes_of(torch.tensor(numbers, dtype=torch.bfloat16))


def codes(*numbers: int) -> memoryview:
    return memoryview(bytearray(numbers))


CONTENT: list[tuple[str, tuple[int, ...], list[memoryview], str, float, object]] = [
    ("int8", (2, 2), [codes(1, 2, 3, 4), f32(0.5, -2.0)], "scales", 2.0**119, [-2.0, 0.5]),
    ("int4", (1, 2), [codes(0x99), upper(-1.0)], "scales", 2.0**123, [-1.0, -1.0]),
    (
        "int4-asym",
        (1, 2),
        [codes(0x21), upper(1.0), upper(2.0**126)],
        "scales",
        2.0**123,
        [1.0, 1.0, 2.0**126, 2.0**126],
    ),
    ("pq", (1, 4), [codes(0), f32(0, 0, 1, 2.0**127)], "codebook", 2.0**126, [0.0, 2.0**127]),
    (
        "topk:1",
        (2,),
        [bytes_of(torch.tensor([1, 0], dtype=torch.int32)), upper(1.0, 2.0)],
        "indices",
        1,
        [1, 0],
    ),
    (
        "topk:0.5",
        (2,),
        [bytes_of(torch.tensor([1], dtype=torch.int32)), upper(-(2.0**127))],
        "values",
        2.0**126,
        [-(2.0**127)] * 2,
    ),
    ("cosine:8", (1,), [codes(255), struct.pack("<2d", 1.0, 1.0)], "codes", 254, 255),
    ("cosine:8", (1,), [codes(9), struct.pack("<2d", 1.0, 4.0)], "norm", 2.0**126, [1.0, 4.0]),
    (
        "svd:1",
        (2, 4),
        [half(0.5, 2.0), f32(1.0), half(0, 0, -1, 1)],
        "vectors",
        1,
        [0.5, 2.0, -1.0, 1.0],
    ),
    ("svd:1", (2, 4), [half(1, 1), f32(-3.0), half(0, 0, 0, 1)], "values", 2.0**100, [-3.0, -3.0]),
]


@pytest.mark.parametrize(("name", "shape", "buffers", "field", "limit", "value"), CONTENT)
def test_an_error_reports_impossible_content(
    name: str,
    shape: tuple[int, ...],
    buffers: list[memoryview],
    field: str,
    limit: float,
    value: object,
) -> None:
    with pytest.raises(MalformedFrame) as caught:
        get_codec(name).decode([memoryview(buffer) for buffer in buffers], shape)
    error = caught.value
    assert (error.field, error.limit, error.value) == (field, limit, value)


def test_an_error_reports_nan_as_text() -> None:
    with pytest.raises(MalformedFrame) as caught:
        get_codec("int8").decode([codes(1), f32(math.nan)], (1, 1))
    assert caught.value.to_wire()["error"]["value"] == ["nan", "nan"]


SPEC = {"name": "x", "codec": "uint8", "shape": [1], "sizes": [1]}

TENSORS: list[tuple[object, str, object, object]] = [
    ({"name": "x"}, "tensors", ["codec", "name", "shape", "sizes"], ["name"]),
    ([], "tensors", ["codec", "name", "shape", "sizes"], "list"),
    ({**SPEC, "name": 3}, "tensors", ["str", "str"], ["int", "str"]),
    ({**SPEC, "name": ""}, "tensors", ["str", "str"], ["", "str"]),
    ({**SPEC, "shape": "1"}, "x.shape", "list", "str"),
    ({**SPEC, "shape": [-2]}, "x.shape", 0, -2),
    ({**SPEC, "sizes": [1.5]}, "x.sizes", 0, 1.5),
    ({**SPEC, "sizes": [None]}, "x.sizes", 0, "NoneType"),
]


def refused(header: dict[str, Any], limits: FrameLimits) -> SFPromptError:
    packed = msgpack.packb(header)
    pad = -(28 + len(packed)) % 64
    prefix = struct.pack("<4sHHIQ", b"SFPF", 2, 0, len(packed), 28 + len(packed) + pad)
    body = packed + bytes(pad)
    frame = prefix + struct.pack("<Q", xxh3_64_intdigest(prefix + body)) + body
    with pytest.raises(SFPromptError) as caught:
        decode_frame(frame, limits)
    return caught.value


@pytest.mark.parametrize(("tensor", "field", "limit", "value"), TENSORS)
def test_an_error_reports_a_wrong_tensor_description(
    tensor: object, field: str, limit: object, value: object
) -> None:
    error = refused({"kind": "k", "meta": {}, "tensors": [tensor]}, FrameLimits())
    assert type(error) is MalformedFrame
    assert (error.field, error.limit, error.value) == (field, limit, value)


def test_an_error_reports_long_and_deep_lists() -> None:
    meta: dict[str, Any] = {"a": {"b": {"c": 1}}}
    error = refused({"kind": "k", "meta": meta, "tensors": []}, FrameLimits(max_depth=2))
    assert (type(error), error.field, error.limit, error.value) == (TooLarge, "meta.a.b", 2, 3)
    few = FrameLimits(max_items=4, max_tensors=4)
    error = refused({"kind": "k", "meta": {"a": [0] * 9}, "tensors": []}, few)
    assert (type(error), error.field, error.limit) == (TooLarge, "header", 4)
    assert "9" in str(error.value)
