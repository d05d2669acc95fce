import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from protocol.codecs import encoded_bytes, get_codec
from protocol.errors import MalformedFrame

BOTH = ["int4", "int4-asym"]

LARGEST = 2.0**125

NUMBERS = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=1, max_dims=2, max_side=200),
    elements=st.floats(-LARGEST, LARGEST, width=32),
    fill=st.floats(-2, 2, width=32),
)


def round_trip(name, tensor, generator=None):
    codec = get_codec(name)
    return codec.decode(codec.encode(tensor, generator), tensor.shape)


def bound(name, tensor):
    """The documented bound for every element, in float64, [..., D]."""
    array = tensor.double().numpy()
    bounds = np.empty_like(array)
    for start in range(0, array.shape[-1], 64):
        group = array[..., start : start + 64]
        low, high = group.min(-1, keepdims=True), group.max(-1, keepdims=True)
        largest = np.maximum(abs(low), abs(high))
        step = largest / 7
        if name == "int4-asym":
            step = (high - low + abs(low) / 128) / 15 * (1 + 1 / 128)
        bounds[..., start : start + 64] = step / 2 + largest * 2.0**-20 + 15 * 2.0**-126
    return torch.from_numpy(bounds)


def brain(*values):
    """Encode values as bfloat16; they must be exact."""
    return (np.array(values, "<f4").view("<u4") >> 16).astype("<u2").tobytes()


def test_hand_calculated_symmetric_example():
    # Two groups of one row: 64 elements with a = 7 (s = 1), then three with a = 3.5 (s = 0.5).
    row = [7.0, -7.0, 2.5, 1.5, *[0.0] * 60, 3.5, -1.75, 0.2]
    codes, scales = get_codec("int4").encode(torch.tensor([row]))
    assert bytes(scales) == brain(1.0, 0.5)
    # 67 codes in 34 bytes: byte j holds codes j and 34 + j; a zero is 8. Codes 64, 65 and 66 are
    # 15, 4 (-3.5 rounds to the even -4) and 8; they are the high halves of bytes 30, 31 and 32.
    low = [15, 1, 10, 10, *[8] * 30]
    high = [*[8] * 30, 15, 4, 8, 0]
    assert list(codes) == [a + 16 * b for a, b in zip(low, high, strict=True)]
    expected = [7.0, -7.0, 2.0, 2.0, *[0.0] * 60, 3.5, -2.0, 0.0]
    assert get_codec("int4").decode([codes, scales], [1, 67]).tolist() == [expected]


def test_hand_calculated_asymmetric_example():
    # Minimum 1, greatest 16: s = 1, codes 0 … 15.
    codes, scales, minima = get_codec("int4-asym").encode(torch.tensor([1.0, 16.0, 3.5, 2.4]))
    assert (bytes(scales), bytes(minima)) == (brain(1.0), brain(1.0))
    assert list(codes) == [0 + 16 * 2, 15 + 16 * 1]  # 2.5 rounds to the even 2
    decoded = get_codec("int4-asym").decode([codes, scales, minima], [4])
    assert decoded.tolist() == [1.0, 16.0, 3.0, 2.0]


def test_minimum_and_scale_are_rounded_to_cover_the_group():
    # 1 + 2^-8 lies between the bfloat16 numbers 1 and 1 + 2^-7; -1 - 2^-8 between -1 and -1 - 2^-7.
    _, scales, minima = get_codec("int4-asym").encode(
        torch.tensor([[1 + 2.0**-8, 1 + 2.0**-8 + 15], [-1 - 2.0**-8, 14 - 2.0**-8]])
    )
    assert bytes(minima) == brain(1.0, -1 - 2.0**-7)
    assert bytes(scales) == brain(
        1 + 2.0**-7, 1 + 2.0**-7
    )  # slightly more than 15, over 15: rounded up
    _, scales = get_codec("int4").encode(torch.tensor([7 + 7 * 2.0**-8]))
    assert bytes(scales) == brain(1.0)  # truncated


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(BOTH), NUMBERS)
def test_the_error_is_at_most_half_a_step(name, array):
    tensor = torch.from_numpy(array)
    error = (round_trip(name, tensor).double() - tensor.double()).abs()
    assert bool((error <= bound(name, tensor)).all())


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(
    "shape", [[3, 5, 384], [700, 384], [2, 100_001], [40_000, 1], [30_000, 3], [1500, 65]]
)
def test_the_bound_holds_for_large_tensors(name, shape):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(3)).exp() - 0.5
    error = (round_trip(name, tensor).double() - tensor.double()).abs()
    assert bool((error <= bound(name, tensor)).all())


def test_the_asymmetric_codec_is_better_for_uncentred_numbers():
    tensor = 10 + torch.rand(50, 128, generator=torch.Generator().manual_seed(4))
    error = {name: float((round_trip(name, tensor) - tensor).norm()) for name in BOTH}
    assert error["int4-asym"] < error["int4"] / 5


def test_gradients_below_the_range_of_float16_are_encoded():
    tensor = 1e-12 * torch.randn(8, 384, generator=torch.Generator().manual_seed(4))
    assert float((round_trip("int4", tensor) - tensor).norm() / tensor.norm()) < 0.15


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("value", [3.0, -3.0, 1e-3, -1.0039, 2.0**125, -(2.0**-120)])
def test_a_constant_group_is_nearly_exact(name, value):
    decoded = round_trip(name, torch.full([2, 70], value))
    assert bool((abs(decoded / value - 1) <= 2.0**-7).all())


def test_encoded_sizes_match_the_documentation():
    assert encoded_bytes("int4", [64, 64, 384]) == 64 * 64 * (192 + 6 * 2)
    assert encoded_bytes("int4-asym", [64, 64, 384]) == 64 * 64 * (192 + 6 * 4)
    assert encoded_bytes("int4", [3, 67]) == 3 * (34 + 2 * 2)
    assert encoded_bytes("int4", []) == 1 + 2
    assert encoded_bytes("int4-asym", [5, 0]) == 0
    assert pytest.approx(7.53, abs=0.005) == 4 * 384 / (192 + 12)
    assert pytest.approx(7.11, abs=0.005) == 4 * 384 / (192 + 24)


@pytest.mark.parametrize("name", BOTH)
def test_random_rounding_is_unbiased_within_one_step(name):
    tensor = torch.tensor([[7.0, 0.25, -3.75, -7.0, 5.5], [1.0, 1.3, 1.6, 2.0, 1.9]])
    generator = torch.Generator().manual_seed(5)
    # Every row is rounded separately.
    draws = round_trip(name, tensor.expand(4000, 2, 5), generator).double()
    # Each element is rounded down or up to a multiple of the sent scale.
    scales = get_codec(name).encode(tensor)[1]
    step = torch.frombuffer(bytearray(scales), dtype=torch.bfloat16).double().unsqueeze(1)
    # int4 truncates its scale: the largest magnitude is up to 2^-7 beyond the last code.
    beyond = tensor.abs().amax(1, keepdim=True) * 2.0**-7 if name == "int4" else 1e-6
    assert bool(((draws - tensor).abs() <= step * (1 + 1e-5) + beyond).all())
    inner = (draws.mean(0) - tensor).abs()[:, 1:3]
    assert bool((inner <= 5 * step / 2 / math.sqrt(4000)).all())
    assert len({float(draw) for draw in draws[:, 0, 1]}) == 2


@pytest.mark.parametrize("name", BOTH)
def test_the_gradient_of_a_linear_map_stays_within_the_bound(name):
    # dL/dW = gradientᵀ · activations: the error is gradientᵀ · (their error).
    generator = torch.Generator().manual_seed(2)
    activations = torch.randn(256, 384, generator=generator).double()
    gradient = torch.randn(256, 10, generator=generator).double()
    exact = gradient.T @ activations
    error = gradient.T @ round_trip(name, activations).double() - exact
    assert bool((error.abs() <= gradient.abs().T @ bound(name, activations)).all())
    assert float(error.norm() / exact.norm()) < 0.15


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, 2.0**124])
def test_an_impossible_scale_is_refused(bad):
    good, wrong = (memoryview(brain(value)) for value in (1.0, bad))
    codes = memoryview(bytes(2))
    with pytest.raises(MalformedFrame):
        get_codec("int4").decode([codes, wrong], [4])
    with pytest.raises(MalformedFrame):
        get_codec("int4-asym").decode([codes, wrong, good], [4])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2.0**126, -(2.0**126)])
def test_an_impossible_minimum_is_refused(bad):
    with pytest.raises(MalformedFrame):
        get_codec("int4-asym").decode(
            [memoryview(bytes(2)), memoryview(brain(1.0)), memoryview(brain(bad))], [4]
        )


@pytest.mark.parametrize("name", BOTH)
def test_all_codes_decode_to_finite_numbers(name):
    codes = memoryview(bytes(range(256)))
    numbers = {"int4": [2.0**123], "int4-asym": [2.0**123, 2.0**125]}[name]
    buffers = [codes, *(memoryview(brain(*[number] * 8)) for number in numbers)]
    assert bool(get_codec(name).decode(buffers, [512]).isfinite().all())


@pytest.mark.parametrize("name", BOTH)
def test_the_unused_half_of_the_last_byte_must_be_zero(name):
    codec = get_codec(name)
    buffers = codec.encode(torch.rand(2, 3, generator=torch.Generator().manual_seed(1)))
    assert bytes(buffers[0])[1] < 16
    assert bytes(buffers[0])[3] < 16
    changed = bytearray(buffers[0])
    changed[3] |= 0x10
    with pytest.raises(MalformedFrame) as caught:
        codec.decode([memoryview(changed), *buffers[1:]], [2, 3])
    assert caught.value.field == "codes"
