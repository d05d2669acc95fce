import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec_names import FLOAT_CODECS, WHOLE_CODECS
from protocol.codecs import CODECS, RawCodec, codec_named
from protocol.errors import InvalidField, MalformedFrame, UnknownCodec

EXACT = sorted(name for name, codec in CODECS.items() if isinstance(codec, RawCodec))
SHAPES = st.lists(st.integers(0, 4), max_size=5)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(EXACT), SHAPES, st.integers(0, 2**32))
def test_a_tensor_comes_back_bit_by_bit(name, shape, seed):
    codec = codec_named(name)
    generator = torch.Generator().manual_seed(seed)
    tensor = (torch.rand(shape, generator=generator) * 200).to(codec.dtype)
    buffers = codec.encode(tensor)
    codec.check_sizes(shape, [buffer.nbytes for buffer in buffers])
    back = codec.decode(buffers, shape)
    assert back.dtype == codec.dtype
    assert back.shape == tuple(shape)
    assert torch.equal(back, tensor)


def test_each_codec_stands_under_its_own_name():
    assert {name: codec.name for name, codec in CODECS.items()} == {name: name for name in CODECS}
    assert {name for name, codec in CODECS.items() if codec.floating} == set(FLOAT_CODECS)
    assert {name for name, codec in CODECS.items() if not codec.floating} == set(WHOLE_CODECS)


def test_an_unknown_codec_is_named():
    with pytest.raises(UnknownCodec) as caught:
        codec_named("pickle")
    assert caught.value.value == "pickle"
    assert caught.value.limit == sorted(CODECS)


@pytest.mark.parametrize("name", sorted(CODECS))
@pytest.mark.parametrize("sizes", [[], [3], [7, 1], [2**40]])
def test_sizes_that_the_shape_does_not_need_are_refused(name, sizes):
    with pytest.raises(MalformedFrame):
        codec_named(name).check_sizes([2, 5], sizes)


def test_encoding_copies_nothing_that_is_in_place():
    tensor = torch.zeros(3, 4)
    (buffer,) = codec_named("float32").encode(tensor)
    tensor[0, 0] = 1.0
    assert bytes(buffer[:4]) == b"\x00\x00\x80\x3f"  # 1.0 in binary32


def test_a_strided_tensor_and_one_with_a_gradient_are_encoded():
    tensor = torch.arange(6.0).reshape(2, 3).t().requires_grad_()
    back = codec_named("float32").decode(codec_named("float32").encode(tensor), [3, 2])
    assert torch.equal(back, tensor.detach())


def test_a_writable_buffer_is_not_copied_and_a_readonly_one_is():
    memory = bytearray(8)
    shared = codec_named("float32").decode([memoryview(memory)], [2])
    memory[:4] = b"\x00\x00\x80\x3f"
    assert shared.tolist() == [1.0, 0.0]
    own = codec_named("float32").decode([memoryview(bytes(memory))], [2])
    own[0] = 5.0
    assert bytes(memory[:4]) == b"\x00\x00\x80\x3f"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_float16_refuses_what_would_become_infinity(dtype):
    # 65536 in bfloat16 equals the rounded limit 65504: a comparison in that dtype misses it.
    with pytest.raises(InvalidField) as caught:
        codec_named("float16").encode(torch.tensor([1, -65536]).to(dtype))
    assert caught.value.limit == 65504.0
    assert caught.value.value == 65536.0


def test_float16_refuses_infinity_and_names_it_beside_nan():
    with pytest.raises(InvalidField) as caught:
        codec_named("float16").encode(torch.tensor([math.nan, math.inf]))
    assert caught.value.value == math.inf


def test_float16_takes_its_whole_range():
    tensor = torch.tensor([65504.0, -65504.0, 65519.0])  # the last rounds down to 65504
    back = codec_named("float16").decode(codec_named("float16").encode(tensor), [3])
    assert back.tolist() == [65504.0, -65504.0, 65504.0]


def test_bfloat16_rounds_to_the_nearest_even():
    # binary32 3f808000 lies half way between 3f80 (1.0) and 3f81: the even one is 3f80;
    # 3f818000 half way between 3f81 and 3f82: the even one is 3f82.
    tensor = torch.tensor([0x3F808000, 0x3F818000], dtype=torch.int32).view(torch.float32)
    (buffer,) = codec_named("bfloat16").encode(tensor)
    assert bytes(buffer) == b"\x80\x3f\x82\x3f"
