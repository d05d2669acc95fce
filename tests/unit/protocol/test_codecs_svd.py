import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from protocol.codecs import encoded_bytes, get_codec
from protocol.errors import MalformedFrame

NUMBERS = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=0, max_dims=3, max_side=16),
    elements=st.floats(-(2.0**125), 2.0**125, width=32),
)


def round_trip(name, tensor):
    codec = get_codec(name)
    return codec.decode(codec.encode(tensor), tensor.shape)


def sizes_of(name, tensor):
    return [buffer.nbytes for buffer in get_codec(name).encode(tensor)]


def of_rank(rank, *shape, noise=0.0):
    generator = torch.Generator().manual_seed(rank)
    left = torch.randn(shape[0], rank, generator=generator)
    right = torch.randn(rank, math.prod(shape[1:]), generator=generator)
    matrix = left @ right
    return (matrix + noise * torch.randn(matrix.shape, generator=generator)).reshape(shape)


def halves(*values):
    return memoryview(np.array(values, "<f2").tobytes())


def test_hand_calculated_foreign_example():
    # (1, 0.5)ᵀ · 4 · (0.5, -0.25, 1)
    buffers = [
        halves(1, 0.5),
        memoryview(np.array([4], "<f4").tobytes()),
        halves(0.5, -0.25, 1.0),
    ]
    codec = get_codec("svd:0.5")
    codec.check_sizes([2, 3], [4, 4, 6])
    assert codec.decode(buffers, [2, 3]).tolist() == [[2.0, -1.0, 4.0], [1.0, -0.5, 2.0]]


def test_the_rank_is_the_least_with_the_energy():
    # Singular values 3, 2, 1 of a diagonal in a larger matrix: energies 9, 4, 1 of 14.
    tensor = torch.zeros(30, 5, 8)
    tensor[3, 0, 0], tensor[7, 1, 2], tensor[9, 4, 4] = 3.0, -2.0, 1.0
    by_rank = {1: "svd:0.642", 2: "svd:0.643", 3: "svd:0.93"}  # 9/14 = 0.6428…, 13/14 = 0.9285…
    for rank, name in by_rank.items():
        assert sizes_of(name, tensor) == [2 * 30 * rank, 4 * rank, 2 * 40 * rank]
    decoded = round_trip("svd:0.643", tensor)
    tensor[9, 4, 4] = 0.0
    assert torch.allclose(decoded, tensor, atol=1e-6)


@settings(max_examples=80, deadline=None)
@given(NUMBERS, st.sampled_from(["0.3", "0.9", "0.999999", "1"]))
def test_the_error_is_at_most_the_missing_energy(array, share):
    tensor = torch.from_numpy(array)
    error = float((round_trip(f"svd:{share}", tensor).double() - tensor.double()).norm())
    limit = math.sqrt(1 - float(share)) + 2.0**-9
    assert error <= limit * float(tensor.double().norm()) + 2.0**-120


@pytest.mark.parametrize("shape", [(64, 8, 96), (300, 200), (20, 3000)])
@pytest.mark.parametrize("share", ["0.5", "0.95", "1"])
def test_the_bound_holds_with_the_least_rank(shape, share):
    tensor = of_rank(6, *shape, noise=0.5)
    exact = tensor.double().reshape(shape[0], -1).numpy()
    left, values, right = np.linalg.svd(exact, full_matrices=False)
    energies = np.cumsum(values**2) / (values**2).sum()
    rank = int(np.searchsorted(energies, float(share) - 1e-9)) + 1
    sizes = sizes_of(f"svd:{share}", tensor)
    if len(sizes) == 3:
        assert sizes[1] == 4 * rank
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    decoded = round_trip(f"svd:{share}", tensor).double().reshape(shape[0], -1).numpy()
    norm = np.linalg.norm(values)
    assert np.linalg.norm(decoded - exact) <= (math.sqrt(1 - float(share)) + 2.0**-9) * norm
    assert len(sizes) == 1 or np.linalg.norm(decoded - best) <= 2.0**-9 * norm


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(()),
        torch.ones(500),
        torch.ones(0, 5),
        torch.ones(2, 1),  # rank 1 takes no fewer bytes
        torch.eye(40),  # all directions matter
        torch.full([50, 50], 2.0**110),  # singular values out of range
    ],
    ids=["scalar", "one-dimension", "empty", "small", "identity", "huge"],
)
def test_a_tensor_without_a_smaller_form_stays_plain(tensor):
    assert sizes_of("svd:0.99", tensor) == [4 * tensor.numel()]
    assert torch.equal(round_trip("svd:0.99", tensor), tensor)


def test_a_matrix_of_zeros_has_no_bytes():
    assert sizes_of("svd:0.9", torch.zeros(4, 5)) == [0, 0, 0]
    assert torch.equal(round_trip("svd:0.9", torch.zeros(4, 5)), torch.zeros(4, 5))


def test_encoded_sizes_match_the_documentation():
    tensor = of_rank(4, 100, 20, 20)
    nbytes = sum(sizes_of("svd:0.999999", tensor))
    assert nbytes == 4 * (2 * 100 + 2 * 400 + 4)
    assert 4 * tensor.numel() / nbytes > 39
    assert encoded_bytes("svd:0.9", [100, 400]) is None


@pytest.mark.parametrize(
    "sizes",
    [
        [4 * 600 - 4],
        [40, 4],
        [40, 4, 60, 0],
        [40, 4, 62],  # not of one rank
        [42, 4, 60],
        [40, 5, 60],
        [40 * 21, 4 * 21, 60 * 21],  # above the smaller dimension
        [40 * 23, 4 * 23, 60 * 23],  # no smaller than the tensor
        [0, 0, 1],
        [-40, -4, -60],
    ],
)
def test_sizes_without_a_common_rank_are_refused(sizes):
    codec = get_codec("svd:0.9")
    codec.check_sizes([20, 30], [40, 4, 60])
    codec.check_sizes([20, 30], [40 * 20, 4 * 20, 60 * 20])
    with pytest.raises(MalformedFrame) as caught:
        codec.check_sizes([20, 30], sizes)
    assert caught.value.field == "sizes"


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 9), st.data())
def test_random_factors_decode_or_are_refused(rows, columns, rank, data):
    codec = get_codec("svd:0.9")
    sizes = [2 * rows * rank, 4 * rank, 2 * columns * rank]
    try:
        codec.check_sizes([rows, columns], sizes)
        buffers = [memoryview(data.draw(st.binary(min_size=size, max_size=size))) for size in sizes]
        decoded = codec.decode(buffers, [rows, columns])
    except MalformedFrame:
        return
    assert decoded.shape == (rows, columns)
    assert bool(decoded.isfinite().all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, 2.0**101])
def test_a_singular_value_out_of_range_is_refused(bad):
    values = memoryview(np.array([bad], "<f4").tobytes())
    with pytest.raises(MalformedFrame) as caught:
        get_codec("svd:0.9").decode([halves(1, 0), values, halves(0, 1, 0)], [2, 3])
    assert caught.value.field == "values"


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1.001, -2.0])
def test_an_element_of_a_singular_vector_out_of_range_is_refused(bad):
    values = memoryview(np.array([1], "<f4").tobytes())
    for left, right in ((halves(bad, 0), halves(0, 1, 0)), (halves(0, 1), halves(0, bad, 0))):
        with pytest.raises(MalformedFrame) as caught:
            get_codec("svd:0.9").decode([left, values, right], [2, 3])
        assert caught.value.field == "vectors"


def test_the_gradient_of_a_linear_map_stays_within_the_bound():
    # dL/dW = gradientᵀ · activations: the error is at most |gradient| · |error of activations|.
    generator = torch.Generator().manual_seed(2)
    activations = of_rank(8, 256, 384, noise=0.1).double()
    gradient = torch.randn(256, 10, generator=generator).double()
    exact = gradient.T @ activations
    error = gradient.T @ round_trip("svd:0.99", activations).double() - exact
    limit = (math.sqrt(0.01) + 2.0**-9) * float(activations.norm())
    assert float(error.norm()) <= float(torch.linalg.matrix_norm(gradient, 2)) * limit
    assert float(error.norm() / exact.norm()) < 0.15
