"""Attacks by frames, and what stops them. See also protocol/vectors/invalid-*.bin.

| attack | stopped by |
|---|---|
| a bit changed on its way | the checksum |
| random bytes; a frame with bytes changed, removed or added | decoding raises only typed errors |
| a declared length of gigabytes | compared with the received bytes before memory is allocated |
| nested list headers that each reserve memory | the limit on a list's declared length |
| a shape with a zero that hides an overflow | the product, with zeros counted as one |
| code in an extension type, a pickle in a buffer | no extension types; buffers are numbers only |
"""

import json
import struct
import tracemalloc
from pathlib import Path

import msgpack
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

import protocol
from protocol.errors import DamagedFrame, MalformedFrame, SFPromptError, TooLarge
from protocol.frames import decode_frame, encode_frame, join_frame

VECTORS = Path(protocol.__file__).with_name("vectors")

SEEDS = [path.read_bytes() for path in sorted(VECTORS.glob("*.bin"))]

VALID = bytes(
    join_frame(
        encode_frame(
            "update",
            {"round": 1, "attempt": 0, "samples": 9, "train_loss": 0.5},
            {"prompts": (torch.ones(2, 3), "float32"), "tail.b": (torch.ones(0), "bfloat16")},
        )
    )
)


def is_frame(data):
    """Decode everything; returns False if that raises a typed error."""
    try:
        frame = decode_frame(data)
        frame.tensors()
    except SFPromptError as error:
        json.dumps(error.to_wire(), allow_nan=False, ensure_ascii=False).encode()
        return False
    return True


def frame_with(header, values=b""):
    """A frame with this header, correct lengths and checksum."""
    body = header + bytes(-(28 + len(header)) % 64) + values
    prefix = struct.pack("<4sHHIQ", b"SFPF", 2, 0, len(header), 28 + len(body))
    return prefix + struct.pack("<Q", xxh3_64_intdigest(prefix + body)) + body


def resealed(data):
    """The frame with a checksum that fits its changed bytes, as an attacker would send it."""
    data = bytearray(data)
    if len(data) >= 28:
        data[20:28] = struct.pack("<Q", xxh3_64_intdigest(data[:20] + data[28:]))
    return data


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data):
    """Tried: random bytes, with and without the magic number. Stopped by: the frame's fixed start
    is checked first."""
    assert not is_frame(data)
    assert not is_frame(b"SFPF" + data)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.binary(max_size=64))
@example(b"\xc7\x00\xff", b"")
@example(b"\x83\xa4kind\xa0\xa4meta\x80\xa7tensors\x91\xc0", b"")
def test_random_headers_raise_only_typed_errors(header, values):
    """Tried: random bytes as a header, with a checksum that fits. Stopped by: a closed set of
    types; only typed errors."""
    is_frame(frame_with(header, values))


MSGPACK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.sampled_from(["float32", "float16", "int64", "smashed"])
    | st.just(msgpack.Timestamp(1))
    | st.just(msgpack.ExtType(5, b"x")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)

SPECS = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.sampled_from(["a", "b", ""]) | MSGPACK,
            "codec": st.sampled_from(["float32", "bfloat16", "int64"]) | MSGPACK,
            "shape": st.lists(st.integers(0, 3) | st.integers(0, 2**64 - 1), max_size=6) | MSGPACK,
            "sizes": st.lists(st.integers(0, 64) | st.integers(0, 2**64 - 1), max_size=2) | MSGPACK,
        }
    ),
    max_size=3,
)

HEADERS = st.fixed_dictionaries(
    {"kind": st.text(max_size=5) | MSGPACK, "meta": MSGPACK, "tensors": SPECS | MSGPACK}
)


@settings(max_examples=150, deadline=None)
@given(HEADERS, st.integers(0, 4))
def test_random_msgpack_headers_raise_only_typed_errors(header, blocks):
    """Tried: headers that are valid msgpack with the wrong content. Stopped by: each field's type
    and range is checked."""
    is_frame(frame_with(msgpack.packb(header), bytes(64 * blocks)))


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(SEEDS), st.data())
def test_changed_frames_raise_only_typed_errors(seed, data):
    """Tried: valid frames with bytes set, cut, inserted or dropped, also with a new checksum.
    Stopped by: typed errors only."""
    changed = bytearray(seed)
    for _ in range(data.draw(st.integers(1, 4))):
        if not changed:
            break
        place = data.draw(st.integers(0, len(changed) - 1))
        how = data.draw(st.sampled_from(["set", "cut", "insert", "drop"]))
        if how == "set":
            changed[place] = data.draw(st.integers(0, 255))
        elif how == "cut":
            del changed[place:]
        elif how == "insert":
            changed[place:place] = data.draw(st.binary(min_size=1, max_size=8))
        else:
            del changed[place]
    is_frame(changed)
    is_frame(resealed(changed))


def test_each_truncation_is_refused():
    """Tried: a frame cut off at each of its bytes. Stopped by: length and checksum."""
    assert is_frame(VALID)
    assert not any(is_frame(VALID[:length]) for length in range(len(VALID)))
    assert not any(is_frame(resealed(VALID[:length])) for length in range(len(VALID)))


def test_a_changed_byte_of_prefix_or_padding_is_refused():
    """Tried: bytes hidden in the padding, or other reserved ones, with a checksum that fits.
    Stopped by: padding and reserved bytes must be zero."""
    header_bytes = int.from_bytes(VALID[8:12], "little")
    values = -(-(28 + header_bytes) // 64) * 64
    padding = [*range(28 + header_bytes, values), *range(values + 24, len(VALID))]
    for place in [*range(20), *padding]:
        changed = bytearray(VALID)
        changed[place] ^= 1
        assert not is_frame(resealed(changed)), place


def test_each_flipped_bit_is_a_damaged_frame_that_may_be_sent_again():
    """Tried: every single bit of a frame, changed on its way. Stopped by: the checksum, which is
    compared before anything else, so that the error never blames the sender."""
    for bit in range(8 * len(VALID)):
        changed = bytearray(VALID)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedFrame):
            decode_frame(changed)


def error_and_peak_memory(data):
    tracemalloc.start()
    try:
        with pytest.raises(SFPromptError) as caught:
            decode_frame(data)
        return caught.value, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_declared_buffer_is_refused_before_memory_is_allocated():
    """Tried: a header of a few bytes that announces 256 MiB. Stopped by: the announced size is
    compared with the frame's, before memory is taken."""
    spec = {"name": "x", "codec": "float32", "shape": [2**26], "sizes": [2**28]}
    error, peak = error_and_peak_memory(
        frame_with(msgpack.packb({"kind": "f", "meta": {}, "tensors": [spec]}))
    )
    assert isinstance(error, MalformedFrame)
    assert error.value > 2**28
    assert peak < 2**20


@pytest.mark.parametrize("list_of", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff"])
def test_a_declared_list_or_map_is_refused_before_memory_is_allocated(list_of):
    """Tried: a list or map of four thousand million items in five bytes. Stopped by: the number of
    items is bounded before memory is taken."""
    error, peak = error_and_peak_memory(
        frame_with(b"\x83\xa4kind\xa1f\xa4meta" + list_of + bytes(1000))
    )
    assert isinstance(error, TooLarge)
    assert peak < 2**20


def test_nested_lists_do_not_reserve_memory_each():
    """Tried: 80,000 lists in each other, each of 4,096 announced items. Stopped by: the depth is
    bounded."""
    # 80 000 list headers of 4096 items each, as deep as the header allows.
    header = b"\x83\xa4kind\xa1f\xa4meta" + b"\xdc\x10\x00" * 80_000
    error, peak = error_and_peak_memory(frame_with(header))
    assert isinstance(error, TooLarge)
    assert peak < 40 * 2**20


def test_a_declared_total_length_is_refused_before_memory_is_allocated():
    """Tried: a frame that announces 2^63 bytes. Stopped by: the announced length must be that of
    the body."""
    data = bytearray(VALID)
    data[12:20] = (2**63).to_bytes(8, "little")
    error, peak = error_and_peak_memory(bytes(resealed(data)))
    assert isinstance(error, MalformedFrame)
    assert (error.field, error.value) == ("length", 2**63)
    assert peak < 2**20


@pytest.mark.parametrize("codec", ["float32", "float16", "bfloat16", "int64"])
@pytest.mark.parametrize("shape", [[0, 2**63], [0, 2**62, 4], [2**32, 0, 2**32], [2**64 - 1, 0]])
def test_a_zero_in_a_shape_does_not_hide_an_overflow(codec, shape):
    """Tried: a shape with a zero, whose other sides overflow. Stopped by: each side is bounded, not
    their product alone."""
    spec = {"name": "x", "codec": codec, "shape": shape, "sizes": [0]}
    with pytest.raises(TooLarge) as caught:
        decode_frame(frame_with(msgpack.packb({"kind": "f", "meta": {}, "tensors": [spec]})))
    assert caught.value.field == "x.shape"


def test_an_error_does_not_repeat_a_large_header():
    """Tried: a large header that an error would echo, to multiply traffic. Stopped by: texts of
    errors are cut."""
    spec = {"name": "x" * 200, "codec": "y" * 200, "shape": [1], "sizes": [4]}
    with pytest.raises(SFPromptError) as caught:
        decode_frame(frame_with(msgpack.packb({"kind": "f", "meta": {}, "tensors": [spec] * 500})))
    assert len(json.dumps(caught.value.to_wire())) < 2000
