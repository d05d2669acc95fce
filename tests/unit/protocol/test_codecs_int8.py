import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from protocol.codecs import encoded_bytes, get_codec
from protocol.errors import MalformedFrame

INT8 = get_codec("int8")

LARGEST = 127 * 2.0**119


def round_trip(tensor, generator=None):
    return INT8.decode(INT8.encode(tensor, generator), tensor.shape)


def bound(tensor):
    """The documented bound for every element, in float64, [..., 1]."""
    largest = np.abs(tensor.double().numpy()).max(-1, keepdims=True)
    return torch.from_numpy(largest / 254 * (1 + 2.0**-20) + 127 * 2.0**-126)


def test_hand_calculated_example():
    # Row 0: a = 127, s = 1; 2.5 and 1.5 both round to the even 2.
    # Row 1: all zero. Row 2: a = 254, s = 2.
    tensor = torch.tensor([[127.0, 2.5, -1.5, -0.4], [0.0] * 4, [-254.0, 3.1, 1.0, 100.0]])
    values, scales = INT8.encode(tensor)
    assert np.frombuffer(values, "i1").tolist() == [127, 2, -2, 0, 0, 0, 0, 0, -127, 2, 0, 50]
    assert np.frombuffer(scales, "<f4").tolist() == [1.0, 0.0, 2.0]
    expected = [[127.0, 2.0, -2.0, 0.0], [0.0] * 4, [-254.0, 4.0, 0.0, 100.0]]
    assert INT8.decode([values, scales], [3, 4]).tolist() == expected


@settings(max_examples=200, deadline=None)
@given(
    arrays.arrays(
        np.float32,
        arrays.array_shapes(min_dims=1, max_dims=3, max_side=9),
        elements=st.floats(-LARGEST, LARGEST, width=32),
    )
)
def test_the_error_is_at_most_half_a_step(array):
    tensor = torch.from_numpy(array)
    error = (round_trip(tensor).double() - tensor.double()).abs()
    assert bool((error <= bound(tensor)).all())


@pytest.mark.parametrize("shape", [[3, 5, 384], [700, 384], [2, 100_001], [40_000, 1], [70_000, 3]])
def test_the_bound_holds_for_large_tensors(shape):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(3)).exp()
    error = (round_trip(tensor).double() - tensor.double()).abs()
    assert bool((error <= bound(tensor)).all())


def test_an_outlier_affects_only_its_row():
    tensor = torch.ones(3, 8)
    tensor[1, 4] = 1e6
    decoded = round_trip(tensor)
    assert torch.equal(decoded[[0, 2]], torch.ones(2, 8))
    assert decoded[1, 0] == 0.0


def test_encoded_sizes_match_the_documentation():
    assert encoded_bytes("int8", [64, 64, 384]) == 64 * 64 * (384 + 4)
    assert encoded_bytes("int8", []) == 5
    assert encoded_bytes("int8", [0, 5]) == 0
    assert pytest.approx(3.96, abs=0.005) == 384 * 4 / (384 + 4)


def test_random_rounding_is_unbiased_within_one_step():
    tensor = torch.tensor([[127.0, 0.25, -3.75, 60.5], [0.0, 1e-3, -1e-3, 2e-4]])
    generator = torch.Generator().manual_seed(5)
    # Every row is rounded separately.
    draws = round_trip(tensor.expand(4000, 2, 4), generator).double()
    step = torch.tensor([[1.0], [1e-3 / 127]]).double()
    assert bool(((draws - tensor).abs() <= step * (1 + 1e-5)).all())
    # A draw's variance is at most step² / 4: five standard deviations of the mean of 4000.
    assert bool(((draws.mean(0) - tensor).abs() <= 5 * step / 2 / math.sqrt(4000)).all())
    assert len({float(draw) for draw in draws[:, 0, 1]}) == 2


def test_random_rounding_is_reproducible():
    tensor = torch.randn(4, 300, generator=torch.Generator().manual_seed(1))
    first, same = (round_trip(tensor, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, same)
    assert not torch.equal(first, round_trip(tensor, torch.Generator().manual_seed(8)))


def test_the_gradient_of_a_linear_map_stays_within_the_bound():
    # dL/dW = gradientᵀ · activations: the error is gradientᵀ · (their error).
    generator = torch.Generator().manual_seed(2)
    activations = torch.randn(256, 384, generator=generator).double()
    gradient = torch.randn(256, 10, generator=generator).double()
    exact = gradient.T @ activations
    error = gradient.T @ round_trip(activations).double() - exact
    assert bool((error.abs() <= gradient.abs().T @ bound(activations)).all())
    assert float(error.norm() / exact.norm()) < 0.01


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, -1.0, 2.0**119 * 1.01])
def test_an_impossible_scale_is_refused(scale):
    scales = memoryview(np.array([1.0, scale], "<f4").tobytes())
    with pytest.raises(MalformedFrame) as caught:
        INT8.decode([memoryview(bytes(6)), scales], [2, 3])
    assert caught.value.field == "scales"


def test_the_code_minus_128_decodes_to_a_finite_number():
    scales = memoryview(np.array([2.0**119], "<f4").tobytes())
    assert INT8.decode([memoryview(b"\x80"), scales], [1]).tolist() == [-(2.0**126)]
