import resource
import sys

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec_names import check_float_codec
from protocol.codecs import encoded_bytes, get_codec
from protocol.errors import MalformedFrame, UnknownCodec

PLAIN, FRAME = b"\x00", b"\x01"

SIZE = 100_000

CODEC = get_codec("uint8+zstd")


def header(size, magic=b"\x28\xb5\x2f\xfd"):
    """RFC 8878: one segment, the content's size in eight bytes, no checksum, no dictionary."""
    return magic + b"\xe0" + size.to_bytes(8, "little")


def run(length, byte=b"\x07", last=True):
    """A block that repeats one byte."""
    return (last | 1 << 1 | length << 3).to_bytes(3, "little") + byte


def decoded(buffer, size=SIZE):
    CODEC.check_sizes([size], [len(buffer)])
    return CODEC.decode([memoryview(buffer)], [size])


def test_a_hand_written_frame_is_decoded():
    assert decoded(header(SIZE) + run(SIZE) + FRAME).tolist() == [7] * SIZE


def test_incompressible_bytes_stay_plain():
    noise = torch.randint(0, 256, [SIZE], generator=torch.Generator().manual_seed(1)).byte()
    (buffer,) = CODEC.encode(noise)
    assert bytes(buffer) == noise.numpy().tobytes() + PLAIN
    assert torch.equal(decoded(buffer), noise)


def test_compressible_bytes_become_one_standard_frame():
    values = torch.arange(SIZE).div(1000).byte()
    (buffer,) = CODEC.encode(values)
    assert buffer.nbytes < SIZE / 50
    assert buffer[-1:] == FRAME
    assert zstandard.decompress(bytes(buffer[:-1])) == values.numpy().tobytes()
    assert torch.equal(decoded(buffer), values)


def test_each_buffer_is_compressed_separately():
    tensor = torch.randn(20, 384, generator=torch.Generator().manual_seed(1))
    tensor[:, 5] = 8.0  # one scale for all rows
    codec = get_codec("int8+zstd")
    values, scales = codec.encode(tensor)
    assert (values[-1:], scales[-1:]) == (FRAME if values.nbytes < 7681 else PLAIN, FRAME)
    inner = get_codec("int8")
    assert torch.equal(
        codec.decode([values, scales], [20, 384]), inner.decode(inner.encode(tensor), [20, 384])
    )


@pytest.mark.parametrize("flag", [2, 0xFF])
def test_an_unknown_flag_is_refused(flag):
    with pytest.raises(MalformedFrame) as caught:
        CODEC.decode([memoryview(bytes(5) + bytes([flag]))], [5])
    assert (caught.value.field, caught.value.value) == ("flag", flag)


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (b"", "empty"),
        (header(SIZE), "no block"),
        (header(SIZE) + run(SIZE - 1), "shorter than declared"),
        (header(SIZE) + run(SIZE) + b"\x00", "an extra byte"),
        (header(SIZE) + run(SIZE) + header(SIZE) + run(SIZE), "two frames"),
        (header(SIZE, b"\x28\xb5\x2f\xfe") + run(SIZE), "another magic"),
        (header(SIZE - 1) + run(SIZE - 1), "another size than the shape's"),
        (header(SIZE) + run(SIZE, last=False), "no last block"),
        (b"\x28\xb5\x2f\xfd\x00\x58" + run(SIZE), "no size"),
        (b"\x28\xb5\x2f\xfd\xe1\x05" + SIZE.to_bytes(8, "little") + run(SIZE), "a dictionary"),
        (b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd", "a skippable frame"),
    ],
)
def test_anything_but_one_frame_of_the_right_size_is_refused(frame, why):
    with pytest.raises(MalformedFrame):
        decoded(frame + FRAME)


def test_a_frame_without_compression_is_refused():
    with pytest.raises(MalformedFrame) as caught:
        decoded(header(17) + run(17) + FRAME, 17)
    assert caught.value.field == "compressed"


@pytest.mark.parametrize("declared_size", [SIZE, 2**40, 2**64 - 3])
def test_a_decompression_bomb_is_refused_without_allocation(declared_size):
    bomb = header(declared_size) + run(131_072, last=False) * 24_000 + FRAME  # 3 GB in 96 kB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MalformedFrame):
        decoded(bomb)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 1024  # KiB


@pytest.mark.parametrize("sizes", [[0], [SIZE + 2], [1, 1], []])
def test_sizes_are_bounded_by_the_inner_codec(sizes):
    with pytest.raises(MalformedFrame):
        CODEC.check_sizes([SIZE], sizes)
    CODEC.check_sizes([SIZE], [SIZE + 1])
    CODEC.check_sizes([0, 4], [1])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 60), st.sampled_from([b"", header(50), header(0)]))
def test_random_frames_decode_or_are_refused(data, place, start):
    good = bytearray(CODEC.encode(torch.arange(300).div(50).byte())[0])
    good[place : place + len(data)] = data
    for frame in (bytes(good), start + data + FRAME):
        try:
            decoded(frame, 300)
        except MalformedFrame:
            continue


def test_without_zstandard_the_name_is_refused_with_a_hint(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    get_codec.cache_clear()
    with pytest.raises(UnknownCodec) as caught:
        get_codec("int8+zstd")
    assert (caught.value.field, caught.value.value) == ("codec", "int8+zstd")
    assert "pip install zstandard" in caught.value.hint
    # These calls do not need the library.
    assert check_float_codec("int8+zstd") == "int8+zstd"
    assert encoded_bytes("int8+zstd", [4, 4]) is None
    assert get_codec("int8").name == "int8"
