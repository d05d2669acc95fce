import math
from datetime import UTC, datetime

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codecs import CODECS
from protocol.errors import InvalidField, MalformedFrame, TooLarge, UnknownCodec
from protocol.frames import (
    ALIGNMENT,
    decode_frame,
    encode_frame,
    frame_length,
    join_frame,
    require_kind,
)
from protocol.limits import FrameLimits

TEXT = st.text(max_size=20)

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
)

META = st.dictionaries(
    TEXT,
    st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)

TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=10),
    st.tuples(st.sampled_from(sorted(CODECS)), st.lists(st.integers(0, 4), max_size=5)),
    max_size=4,
)

WIDE = FrameLimits(max_depth=20)


def filled(codec, shape):
    count = math.prod(shape)
    return torch.arange(count, dtype=torch.float32).to(getattr(torch, codec)).reshape(shape)


@settings(max_examples=150, deadline=None)
@given(TEXT, META, TENSORS)
def test_a_frame_survives_a_round_trip(kind, meta, described):
    tensors = {name: (filled(*codec), codec[0]) for name, codec in described.items()}
    pieces = encode_frame(kind, meta, tensors, WIDE)
    data = join_frame(pieces)
    assert len(data) == frame_length(pieces)
    assert len(data) % ALIGNMENT == 0
    frame = decode_frame(data, WIDE)
    assert (frame.kind, frame.meta) == (kind, meta)
    assert list(frame.specs) == list(tensors)
    for name, restored in frame.tensors().items():
        assert restored.dtype == tensors[name][0].dtype
        assert restored.shape == tensors[name][0].shape
        assert torch.equal(restored, tensors[name][0])


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 0, 3), (1, 1, 1, 1, 1)])
@pytest.mark.parametrize("codec", sorted(CODECS))
def test_scalars_and_empty_tensors_survive_a_round_trip(codec, shape):
    tensor = filled(codec, shape)
    frame = decode_frame(join_frame(encode_frame("forward", {}, {"x": (tensor, codec)})))
    assert frame.tensor("x").shape == shape
    assert torch.equal(frame.tensor("x"), tensor)


def test_decoded_tensors_share_the_frames_memory():
    one, two = torch.randn(3, 5), torch.randn(40).bfloat16()
    data = join_frame(encode_frame("f", {}, {"one": (one, "float32"), "two": (two, "bfloat16")}))
    start = torch.frombuffer(data, dtype=torch.uint8).data_ptr()
    frame = decode_frame(data)
    offsets = [frame.tensor(name).data_ptr() - start for name in ("one", "two")]
    assert all(0 < offset < len(data) and offset % ALIGNMENT == 0 for offset in offsets)
    assert frame.tensor("one").data_ptr() == frame.tensor("one").data_ptr()
    assert torch.equal(frame.tensor("two"), two)


def test_decoding_does_not_change_read_only_bytes():
    data = bytes(join_frame(encode_frame("f", {}, {"x": (torch.ones(2), "float32")})))
    before = bytes(data)
    decode_frame(data).tensor("x").zero_()
    assert data == before


def test_a_frame_is_decoded_at_an_odd_offset():
    data = join_frame(encode_frame("f", {}, {"x": (torch.arange(9), "int64")}))
    memory = bytearray(b"?" * 3 + data)
    assert torch.equal(decode_frame(memoryview(memory)[3:]).tensor("x"), torch.arange(9))


def test_encoding_does_not_copy_a_tensor():
    tensor = torch.zeros(1000)
    header, buffer, *_ = encode_frame("f", {}, {"x": (tensor, "float32")})
    assert header.nbytes % ALIGNMENT == 0
    tensor.fill_(1.0)
    assert bytes(buffer[:4]) == b"\x00\x00\x80\x3f"


def test_a_missing_tensor_and_a_wrong_kind_are_refused():
    frame = decode_frame(join_frame(encode_frame("forward", {}, {"x": (torch.ones(1), "float32")})))
    with pytest.raises(MalformedFrame) as caught:
        frame.tensor("y")
    assert (caught.value.field, caught.value.value) == ("y", ["x"])
    with pytest.raises(InvalidField) as refused:
        require_kind(frame, "backward")
    assert (refused.value.field, refused.value.limit) == ("kind", "backward")
    assert refused.value.value == "forward"
    require_kind(frame, "forward")


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        b"",
        b"x",
        2**64,
        {1},
        pytest.param(object(), id="an object"),
        {1: 2},
        datetime(2026, 1, 1, tzinfo=UTC),
    ],
    ids=repr,
)
def test_a_forbidden_value_in_meta_is_not_sent(value):
    with pytest.raises(MalformedFrame):
        encode_frame("f", {"x": value}, {})


def test_the_sender_refuses_unencodable_content():
    with pytest.raises(UnknownCodec):
        encode_frame("f", {}, {"x": (torch.ones(1), "pickle")})
    with pytest.raises(InvalidField):
        encode_frame("f", {}, {"x": (torch.ones(1) * 1e6, "float16")})
    with pytest.raises(MalformedFrame):
        encode_frame("\ud800", {}, {})


def frame_of(tensors=1, dims=1, kind="f", meta=None):
    wide = FrameLimits(max_tensors=9999, max_text=9999, max_items=9999, max_depth=99)
    named = {f"t{n}": (torch.ones([1] * dims), "float32") for n in range(tensors)}
    return join_frame(encode_frame(kind, meta or {}, named, wide))


LIMITS = {
    # limit: (a frame at the limit, a frame above it, the limit)
    "max_frame_bytes": (frame_of(1), frame_of(2), len(frame_of(1))),
    "max_header_bytes": (frame_of(1), frame_of(2), 80),
    "max_tensors": (frame_of(3), frame_of(4), 3),
    "max_dims": (frame_of(dims=2), frame_of(dims=3), 2),
    "max_text": (frame_of(kind="forwards"), frame_of(kind="forwardly"), 8),
    "max_items": (frame_of(meta={"l": [0] * 5}), frame_of(meta={"l": [0] * 6}), 5),
    "max_depth": (frame_of(meta={"l": [[]]}), frame_of(meta={"l": [[[]]]}), 3),
}


@pytest.mark.parametrize("name", LIMITS)
def test_each_limit_applies_and_can_be_set(name):
    at, above, bound = LIMITS[name]
    decode_frame(at, FrameLimits(**{name: bound}))
    with pytest.raises(TooLarge) as caught:
        decode_frame(above, FrameLimits(**{name: bound}))
    assert caught.value.limit == bound
    decode_frame(above)
    # A limit one size larger allows the second frame.
    wider = {"max_frame_bytes": len(above), "max_header_bytes": 200}.get(name, bound + 1)
    decode_frame(above, FrameLimits(**{name: wider}))


def test_the_number_of_elements_is_limited():
    data = join_frame(encode_frame("f", {}, {"x": (torch.ones(2, 3), "float32")}))
    decode_frame(data, FrameLimits(max_elements=6))
    with pytest.raises(TooLarge) as caught:
        decode_frame(data, FrameLimits(max_elements=5))
    assert (caught.value.field, caught.value.limit) == ("x.shape", 5)
    assert caught.value.value == [2, 3]


def test_a_long_list_is_refused_although_max_tensors_allows_its_length():
    data = frame_of(meta={"l": [0] * 600})
    with pytest.raises(TooLarge) as caught:
        decode_frame(data, FrameLimits(max_items=100))
    assert (caught.value.field, caught.value.limit) in (("header", 512), ("meta.l", 100))


@pytest.mark.parametrize("name", FrameLimits.__dataclass_fields__)
def test_no_limit_can_be_switched_off(name):
    with pytest.raises(InvalidField) as caught:
        FrameLimits(**{name: 0})
    assert caught.value.field == name


def test_the_sender_checks_the_header_limits():
    with pytest.raises(TooLarge):
        encode_frame("f" * 257, {}, {})
    with pytest.raises(TooLarge):
        encode_frame("f", {"x": ["a" * 200] * 2000}, {})
    encode_frame("f" * 257, {}, {}, FrameLimits(max_text=257))
