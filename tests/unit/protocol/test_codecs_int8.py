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


def through(tensor, generator=None):
    return INT8.decode(INT8.encode(tensor, generator), tensor.shape)


def bound(tensor):
    """The documented bound for every element, in float64, [..., 1]."""
    largest = np.abs(tensor.double().numpy()).max(-1, keepdims=True)
    return torch.from_numpy(largest / 254 * (1 + 2.0**-20) + 127 * 2.0**-126)


def test_an_example_worked_by_hand():
    # Row 0: a = 127, s = 1; 2.5 lies between 2 and 3 and goes to the even one, as does 1.5.
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
def test_no_element_is_further_off_than_half_a_step(array):
    tensor = torch.from_numpy(array)
    error = (through(tensor).double() - tensor.double()).abs()
    assert bool((error <= bound(tensor)).all())


@pytest.mark.parametrize("shape", [[3, 5, 384], [700, 384], [2, 100_001], [40_000, 1], [70_000, 3]])
def test_large_tensors_of_every_form_keep_the_bound(shape):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(3)).exp()
    error = (through(tensor).double() - tensor.double()).abs()
    assert bool((error <= bound(tensor)).all())


def test_an_outlier_costs_its_own_row_alone():
    tensor = torch.ones(3, 8)
    tensor[1, 4] = 1e6
    back = through(tensor)
    assert torch.equal(back[[0, 2]], torch.ones(2, 8))
    assert back[1, 0] == 0.0


def test_the_ratio_is_what_the_text_says():
    assert encoded_bytes("int8", [64, 64, 384]) == 64 * 64 * (384 + 4)
    assert encoded_bytes("int8", []) == 5
    assert encoded_bytes("int8", [0, 5]) == 0
    assert pytest.approx(3.96, abs=0.005) == 384 * 4 / (384 + 4)


def test_rounding_at_random_is_right_on_average_and_never_off_by_a_step():
    tensor = torch.tensor([[127.0, 0.25, -3.75, 60.5], [0.0, 1e-3, -1e-3, 2e-4]])
    generator = torch.Generator().manual_seed(5)
    draws = through(tensor.expand(4000, 2, 4), generator).double()  # every row on its own
    step = torch.tensor([[1.0], [1e-3 / 127]]).double()
    assert bool(((draws - tensor).abs() <= step * (1 + 1e-5)).all())
    # A draw's variance is at most step² / 4: five standard deviations of the mean of 4000.
    assert bool(((draws.mean(0) - tensor).abs() <= 5 * step / 2 / math.sqrt(4000)).all())
    assert len({float(draw) for draw in draws[:, 0, 1]}) == 2


def test_one_seed_gives_one_result():
    tensor = torch.randn(4, 300, generator=torch.Generator().manual_seed(1))
    one, same = (through(tensor, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one, same)
    assert not torch.equal(one, through(tensor, torch.Generator().manual_seed(8)))


def test_the_gradient_of_a_linear_map_stays_within_the_bound():
    # dL/dW = gradientᵀ · activations: the error is gradientᵀ · (their error).
    generator = torch.Generator().manual_seed(2)
    activations = torch.randn(256, 384, generator=generator).double()
    gradient = torch.randn(256, 10, generator=generator).double()
    exact = gradient.T @ activations
    error = gradient.T @ through(activations).double() - exact
    assert bool((error.abs() <= gradient.abs().T @ bound(activations)).all())
    assert float(error.norm() / exact.norm()) < 0.01


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, -1.0, 2.0**119 * 1.01])
def test_a_scale_that_no_finite_row_has_is_refused(scale):
    scales = memoryview(np.array([1.0, scale], "<f4").tobytes())
    with pytest.raises(MalformedFrame) as caught:
        INT8.decode([memoryview(bytes(6)), scales], [2, 3])
    assert caught.value.field == "scales"


def test_the_code_that_is_never_sent_is_a_finite_number_too():
    scales = memoryview(np.array([2.0**119], "<f4").tobytes())
    assert INT8.decode([memoryview(b"\x80"), scales], [1]).tolist() == [-(2.0**126)]
