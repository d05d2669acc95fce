import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from protocol.codecs import encoded_bytes, get_codec
from protocol.errors import MalformedFrame

BITS = range(2, 9)

NUMBERS = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=0, max_dims=3, max_side=9),
    elements=st.floats(-(2.0**125), 2.0**125, width=32),
)


def round_trip(bits, tensor, generator=None):
    codec = get_codec(f"cosine:{bits}")
    return codec.decode(codec.encode(tensor, generator), tensor.shape)


def bound(bits, tensor):
    """The documented bound for every element, from angles computed in float64."""
    values = tensor.double()
    norm, largest = float(values.norm()), float(values.abs().max())
    if not norm:
        return 0.0
    angle = math.pi / 2 - math.acos(min(1.0, largest / norm))
    max_code = 2 ** (bits - 1) - 1
    assert norm * angle / (2 * max_code) <= math.pi / (4 * max_code) * largest * (1 + 1e-7)
    return norm * angle / (2 * max_code) + norm * 2.0**-20 + 2.0**-140


def test_hand_calculated_example():
    # |(3, 4)| = 5 and sin β = 4/5. S = 3 gives m = 3. The angle of 3 is arcsin(3/5) = 2.08 steps of
    # arcsin(4/5) / 3. The codes are 2 and 3, sent as 5 and 6.
    codes, header = get_codec("cosine:3").encode(torch.tensor([3.0, 4.0]))
    assert list(codes) == [5, 6]
    norm, angle = struct.unpack("<2d", header)
    assert norm == pytest.approx(5, rel=1e-7)
    assert angle == pytest.approx(math.asin(4 / 5), rel=1e-7)
    decoded = get_codec("cosine:3").decode([codes, header], [2])
    assert decoded.tolist() == pytest.approx([5 * math.sin(2 / 3 * math.asin(4 / 5)), 4], rel=1e-6)


@pytest.mark.parametrize(
    ("bits", "packed"),
    [(2, [0b00_01_10_00, 0b10]), (4, [0xE0, 0x07, 0x0E]), (6, [0, 62, 31, 0, 62])],
)
def test_codes_are_packed_from_the_lowest_bits(bits, packed):
    # The largest magnitudes are ±m, zero is 0: sent as 0, m and 2 m.
    codes, _ = get_codec(f"cosine:{bits}").encode(torch.tensor([-1.0, 1.0, 0.0, -1.0, 1.0]))
    assert list(codes) == packed


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(BITS), NUMBERS)
def test_the_error_is_at_most_half_a_step(bits, array):
    tensor = torch.from_numpy(array)
    error = (round_trip(bits, tensor).double() - tensor.double()).abs()
    assert float(error.max()) <= bound(bits, tensor)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [1, 7, 100_001, 300_000])
def test_the_bound_holds_for_large_tensors(bits, size):
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(3)) ** 3 * 1e-9
    error = (round_trip(bits, tensor).double() - tensor.double()).abs()
    assert float(error.max()) <= bound(bits, tensor)


@pytest.mark.parametrize("bits", BITS)
def test_zeros_among_other_numbers_decode_to_zero(bits):
    tensor = torch.randn(50, generator=torch.Generator().manual_seed(3))
    tensor[::2] = 0
    decoded = round_trip(bits, tensor)
    assert not bool(decoded[::2].any())
    assert bool(decoded.any())


def test_the_largest_magnitude_is_exact():
    tensor = torch.tensor([0.5, -3.0, 3.0, 0.1])
    assert round_trip(2, tensor)[1:3].tolist() == pytest.approx([-3.0, 3.0], rel=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_random_rounding_is_unbiased_within_two_steps(bits):
    numbers = torch.tensor([1.0, 0.7, -0.3, 0.05, 0.0, -0.9])
    tensor = numbers.expand(4000, 6)
    decoded = round_trip(bits, tensor, torch.Generator().manual_seed(5)).double()
    max_error = 2 * bound(bits, tensor)
    assert float((decoded - tensor).abs().max()) <= max_error
    # A draw's variance is at most step² / 4: five standard deviations of the mean of 4000.
    assert float((decoded.mean(0) - numbers).abs().max()) <= 5 * max_error / 2 / math.sqrt(4000)
    assert len(set(decoded[:, 1].tolist())) == 2


def test_encoded_sizes_match_the_documentation():
    assert encoded_bytes("cosine:2", [10, 10]) == 25 + 16
    assert encoded_bytes("cosine:4", [3, 3]) == 5 + 16
    assert [encoded_bytes(f"cosine:{bits}", [9]) for bits in (3, 5, 6, 7, 8)] == [9 + 16] * 5
    assert encoded_bytes("cosine:2", []) == 1 + 16
    assert encoded_bytes("cosine:2", [0, 3]) == 16


def test_the_gradient_of_a_linear_map_stays_within_the_bound():
    # dL/dW = gradientᵀ · activations; here the gradients are encoded.
    generator = torch.Generator().manual_seed(2)
    activations = torch.randn(256, 64, generator=generator).double()
    gradient = torch.randn(256, 10, generator=generator).double()
    exact = gradient.T @ activations
    error = round_trip(8, gradient).double().T @ activations - exact
    max_error = bound(8, gradient) * activations.abs().sum(0)
    assert bool((error.abs() <= max_error).all())
    assert float(error.norm() / exact.norm()) < 0.02


@pytest.mark.parametrize(
    ("norm", "angle"),
    [
        (math.nan, 1.0),
        (1.0, math.nan),
        (math.inf, 0.0),
        (math.inf, 1.0),
        (-1.0, 1.0),
        (1.0, -1.0),
        (1.0, 1.6),
        (2.0**128, 1.0),
    ],
)
def test_an_impossible_norm_or_bound_is_refused(norm, angle):
    header = memoryview(struct.pack("<2d", norm, angle))
    with pytest.raises(MalformedFrame) as caught:
        get_codec("cosine:8").decode([memoryview(b"\x7f"), header], [1])
    assert caught.value.field == "norm"


@pytest.mark.parametrize(
    ("bits", "codes"), [(2, b"\x03"), (2, b"\xc0"), (3, b"\x00\x07\x00\x00"), (8, b"\xff" * 4)]
)
def test_the_unused_code_is_refused(bits, codes):
    header = memoryview(struct.pack("<2d", 1.0, 0.5))
    with pytest.raises(MalformedFrame) as caught:
        get_codec(f"cosine:{bits}").decode([memoryview(codes), header], [4])
    assert caught.value.field == "codes"


@pytest.mark.parametrize(("bits", "last"), [(2, 0x04), (2, 0x80), (4, 0x10)])
def test_unused_bits_must_be_zero(bits, last):
    header = memoryview(struct.pack("<2d", 1.0, 0.5))
    elements = 8 // bits + 1
    get_codec(f"cosine:{bits}").decode([memoryview(b"\x00\x00"), header], [elements])
    with pytest.raises(MalformedFrame):
        get_codec(f"cosine:{bits}").decode([memoryview(bytes([0, last])), header], [elements])
