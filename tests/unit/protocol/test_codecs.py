import json
import math
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec_names import FLOAT_CODECS, INTEGER_CODECS, is_row_wise_inside
from protocol.codecs import CODECS, encoded_bytes, get_codec
from protocol.errors import InvalidField, MalformedFrame, UnknownCodec

QUANTISED = ["int8", "int4", "int4-asym"]

WHOLE_TENSOR = [
    "pq",
    "topk:0.5",
    "topk:1.0",
    "cosine:3",
    "cosine:4",
    "cosine:8",
    "svd:0.9",
    "klt:1",
]

PLAIN = [*CODECS, *QUANTISED, *WHOLE_TENSOR]

COMPRESSED = ["float32+zstd", "uint8+zstd", "int8+zstd", "int4-asym+zstd", "svd:0.9+zstd"]

LOSSY = [*QUANTISED, *WHOLE_TENSOR, "int8+zstd", "int4-asym+zstd", "svd:0.9+zstd"]

ALL = [*PLAIN, *COMPRESSED]

SHAPES = st.lists(st.integers(0, 4), max_size=5)

WIDE = st.lists(st.integers(1, 4), max_size=2).flatmap(
    lambda outer: st.integers(1, 200).map(lambda width: [*outer, width])
)


def random_tensor(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sizes_of(buffers):
    return [buffer.nbytes for buffer in buffers]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(CODECS)), SHAPES, st.integers(0, 2**32))
def test_a_raw_codec_is_exact(name, shape, seed):
    codec = get_codec(name)
    generator = torch.Generator().manual_seed(seed)
    tensor = (torch.rand(shape, generator=generator) * 200).to(getattr(torch, codec.name))
    buffers = codec.encode(tensor)
    codec.check_sizes(shape, sizes_of(buffers))
    decoded = codec.decode(buffers, shape)
    assert decoded.dtype == getattr(torch, codec.name)
    assert decoded.shape == tuple(shape)
    assert torch.equal(decoded, tensor)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(LOSSY), SHAPES | WIDE, st.integers(0, 2**32), st.booleans())
def test_a_lossy_codec_decodes_to_float32_with_a_bounded_error(name, shape, seed, generators):
    tensor = random_tensor(shape, seed)
    buffers = get_codec(name).encode(tensor, torch.Generator() if generators else None)
    get_codec(name).check_sizes(shape, sizes_of(buffers))
    assert encoded_bytes(name, shape) in (sum(sizes_of(buffers)), None)
    decoded = get_codec(name).decode(buffers, shape)
    assert decoded.dtype == torch.float32
    assert decoded.shape == tuple(shape)
    assert float((decoded - tensor).norm()) <= float(tensor.norm())


@pytest.mark.parametrize("name", ALL)
def test_a_codecs_attributes_match_its_name(name):
    codec = get_codec(name)
    assert codec.name == name
    assert codec.row_wise == (is_row_wise_inside(name) and not name.endswith("+zstd"))
    assert codec.floating == (name.partition("+")[0] not in INTEGER_CODECS)
    assert get_codec(name) is codec


def test_every_codec_is_listed():
    shown = {name.partition(":")[0] for name in (*FLOAT_CODECS, *INTEGER_CODECS)}
    assert {name.partition(":")[0] for name in ALL if "+" not in name} == shown


@pytest.mark.parametrize("name", ["pickle", "", "int8 ", "int8:4", "topk", "cosine:9+zstd"])
def test_an_unknown_codec_is_refused(name):
    with pytest.raises(UnknownCodec) as caught:
        get_codec(name)
    assert (caught.value.field, caught.value.value) == ("codec", name)
    assert caught.value.limit
    json.dumps(caught.value.to_wire())


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("sizes", [[], [3], [7, 1], [2**40], [0] * 4, [2**63, 2**63, 2**63]])
def test_wrong_sizes_are_refused(name, sizes):
    with pytest.raises(MalformedFrame) as caught:
        get_codec(name).check_sizes([2, 5], sizes)
    assert caught.value.field == "sizes"


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("shape", [[2**62], [2**31, 2**31, 3], [2**60, 2], [2**62, 0, 1]])
def test_enormous_shapes_are_refused_without_allocation(name, shape):
    tracemalloc.start()
    try:
        for sizes in ([1], [1, 1], [1, 1, 1]):
            with pytest.raises(MalformedFrame):
                get_codec(name).check_sizes(shape, sizes)
        assert tracemalloc.get_traced_memory()[1] < 2**16
    finally:
        tracemalloc.stop()


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(LOSSY), SHAPES | WIDE, st.data())
def test_random_bytes_decode_or_are_refused(name, shape, data):
    codec = get_codec(name)
    sizes = sizes_of(codec.encode(random_tensor(shape, 1)))
    buffers = [
        memoryview(data.draw(st.binary(min_size=size, max_size=size), f"buffer of {size}"))
        for size in sizes
    ]
    try:
        codec.check_sizes(shape, sizes)
        decoded = codec.decode(buffers, shape)
    except MalformedFrame as error:
        json.dumps(error.to_wire(), allow_nan=False)
    else:
        assert decoded.shape == tuple(shape)
        assert decoded.dtype == torch.float32


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("place", [0, 70, 129])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2.0**127])
def test_lossy_codecs_refuse_non_finite_and_huge_numbers(name, place, value):
    tensor = random_tensor([3, 130])
    tensor[1, place] = value
    with pytest.raises(InvalidField) as caught:
        get_codec(name).encode(tensor)
    assert caught.value.field == "codec"
    assert math.isnan(value) == math.isnan(caught.value.value)
    assert math.isnan(value) or caught.value.value == abs(value)
    json.dumps(caught.value.to_wire(), allow_nan=False)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7F800001, -1, -0x7FFFFF])
def test_a_nan_with_any_payload_is_refused(name, bits):
    tensor = torch.zeros(2, 70)
    tensor.view(torch.int32)[0, 3] = bits
    assert bool(tensor[0, 3].isnan())
    with pytest.raises(InvalidField):
        get_codec(name).encode(tensor)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("factor", [2.0**120, 2.0**-100, 2.0**-126, 2.0**-149])
def test_huge_and_tiny_numbers_are_encoded(name, factor):
    tensor = torch.linspace(-31, 31, 63).mul(factor).reshape(3, 21)
    decoded = get_codec(name).decode(get_codec(name).encode(tensor), [3, 21])
    assert bool(decoded.isfinite().all())
    flushed = 2.0**-115  # a scale below float32's normal numbers becomes 0
    assert float((decoded.double() - tensor).norm()) <= float(tensor.double().norm()) / 2 + flushed


@pytest.mark.parametrize("name", [name for name in LOSSY if name[:2] not in ("pq", "sv", "kl")])
def test_zeros_decode_to_zeros(name):
    tensor = torch.zeros(4, 70)
    tensor[1] = torch.linspace(-1, 1, 70)  # the other rows are zeros
    decoded = get_codec(name).decode(get_codec(name).encode(tensor), [4, 70])
    assert not bool(decoded[[0, 2, 3]].any())


@pytest.mark.parametrize("name", ALL)
def test_dtype_stride_and_gradient_do_not_change_the_encoding(name):
    codec = get_codec(name)
    plain = torch.arange(-60.0, 60.0).reshape(2, 3, 20).abs()
    expected = [bytes(buffer) for buffer in codec.encode(plain)]
    strided = plain.transpose(0, 2).contiguous().transpose(0, 2)
    assert not strided.is_contiguous()
    others = [strided, plain.bfloat16(), plain.double(), plain.clone().requires_grad_()]
    flat = plain.reshape(6, 20)
    turned = flat.t().contiguous().t()
    assert not turned.is_contiguous()
    assert [bytes(buffer) for buffer in codec.encode(turned)] == [
        bytes(buffer) for buffer in codec.encode(flat)
    ]
    for tensor in others:
        assert [bytes(buffer) for buffer in codec.encode(tensor)] == expected


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "int64"])
@pytest.mark.parametrize("shape", [(5, 1), (1,), (1, 1, 1)])
def test_dimensions_of_one_element_with_any_stride_are_encoded(
    codec: str, shape: tuple[int, ...]
) -> None:
    """torch treats a dimension of one element as contiguous at any stride."""
    values = torch.arange(math.prod(shape)).to(getattr(torch, codec))
    strides = (1, *[7] * (len(shape) - 1)) if len(shape) > 1 else (7,)
    tensor = torch.as_strided(values, shape, strides)
    buffers = get_codec(codec).encode(tensor)
    assert torch.equal(get_codec(codec).decode(buffers, shape), tensor)


@pytest.mark.parametrize("name", LOSSY)
def test_encoding_does_not_change_the_tensor(name):
    tensor = random_tensor([3, 130])
    before = tensor.clone()
    get_codec(name).encode(tensor, torch.Generator())
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("name", [name for name in ALL if get_codec(name).row_wise])
@pytest.mark.parametrize("shape", [[4, 3, 65], [4, 1], [4, 128], [4, 2, 1, 7], [4, 0]])
def test_rows_can_be_split_and_joined_without_decoding(name, shape):
    codec = get_codec(name)
    dtype = getattr(torch, name) if name in CODECS else torch.float32
    tensor = (random_tensor(shape) * 50).abs().to(dtype)
    buffers = codec.encode(tensor)
    whole = codec.decode(buffers, shape)

    def part(buffer, row):
        size = buffer.nbytes // shape[0]
        return bytes(buffer[row * size : (row + 1) * size])

    assert all(buffer.nbytes % shape[0] == 0 for buffer in buffers)
    joined = [memoryview(part(buffer, 2) + part(buffer, 0)) for buffer in buffers]
    codec.check_sizes([2, *shape[1:]], sizes_of(joined))
    assert torch.equal(codec.decode(joined, [2, *shape[1:]]), whole[[2, 0]])
    for row in range(shape[0]):
        alone = codec.encode(tensor[row : row + 1])
        assert [bytes(buffer) for buffer in alone] == [part(buffer, row) for buffer in buffers]


def test_encoding_shares_a_contiguous_tensors_memory():
    tensor = torch.zeros(3, 4)
    (buffer,) = get_codec("float32").encode(tensor)
    tensor[0, 0] = 1.0
    assert bytes(buffer[:4]) == b"\x00\x00\x80\x3f"  # 1.0 in binary32


def test_a_strided_tensor_with_a_gradient_is_encoded():
    tensor = torch.arange(6.0).reshape(2, 3).t().requires_grad_()
    decoded = get_codec("float32").decode(get_codec("float32").encode(tensor), [3, 2])
    assert torch.equal(decoded, tensor.detach())


def test_only_a_read_only_buffer_is_copied():
    memory = bytearray(8)
    shared = get_codec("float32").decode([memoryview(memory)], [2])
    memory[:4] = b"\x00\x00\x80\x3f"
    assert shared.tolist() == [1.0, 0.0]
    copy = get_codec("float32").decode([memoryview(bytes(memory))], [2])
    copy[0] = 5.0
    assert bytes(memory[:4]) == b"\x00\x00\x80\x3f"


HALVES = {"float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 2.0**-134)}  # relative, absolute


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(HALVES)), st.integers(0, 2**32), st.integers(-30, 15))
def test_half_precision_stays_within_its_bound(name, seed, power):
    relative, absolute = HALVES[name]
    tensor = (random_tensor([300], seed) * 2.0**power).clamp_(-65_000, 65_000)
    (buffer,) = get_codec(name).encode(tensor)
    assert buffer.nbytes == tensor.nbytes / 2
    error = (get_codec(name).decode([buffer], [300]).double() - tensor.double()).abs()
    assert bool((error <= (relative * tensor.double().abs()).clamp(min=absolute)).all())


@pytest.mark.parametrize("name", sorted(HALVES))
def test_the_gradient_of_a_linear_map_in_half_precision_stays_within_the_bound(name):
    # dL/dW = gradientᵀ · activations: the error is gradientᵀ · (their error).
    activations, gradient = random_tensor([256, 384]), random_tensor([256, 10], 1).double()
    codec = get_codec(name)
    decoded = codec.decode(codec.encode(activations), activations.shape).double()
    exact = gradient.T @ activations.double()
    error = gradient.T @ decoded - exact
    bound = HALVES[name][0] * gradient.abs().T @ activations.double().abs()
    assert bool((error.abs() <= bound + 1e-6).all())
    assert float(error.norm() / exact.norm()) < 2 * HALVES[name][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_float16_refuses_values_beyond_its_range(dtype):
    # 65536 in bfloat16 equals the rounded limit 65504: a comparison in that dtype misses it.
    with pytest.raises(InvalidField) as caught:
        get_codec("float16").encode(torch.tensor([1, -65536]).to(dtype))
    assert caught.value.limit == 65504.0
    assert caught.value.value == 65536.0


def test_float16_reports_infinity_among_nan():
    with pytest.raises(InvalidField) as caught:
        get_codec("float16").encode(torch.tensor([math.nan, math.inf]))
    assert caught.value.value == math.inf


def test_float16_encodes_its_whole_range():
    tensor = torch.tensor([65504.0, -65504.0, 65519.0])  # the last rounds down to 65504
    decoded = get_codec("float16").decode(get_codec("float16").encode(tensor), [3])
    assert decoded.tolist() == [65504.0, -65504.0, 65504.0]


def test_bfloat16_rounds_to_the_nearest_even():
    # binary32 3f808000 lies half way between 3f80 (1.0) and 3f81: the even one is 3f80;
    # 3f818000 half way between 3f81 and 3f82: the even one is 3f82.
    tensor = torch.tensor([0x3F808000, 0x3F818000], dtype=torch.int32).view(torch.float32)
    (buffer,) = get_codec("bfloat16").encode(tensor)
    assert bytes(buffer) == b"\x80\x3f\x82\x3f"
