import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.cluster import KMeans

from protocol.codecs import encoded_bytes, get_codec
from protocol.errors import MalformedFrame

PQ = get_codec("pq")


def round_trip(tensor):
    return PQ.decode(PQ.encode(tensor), tensor.shape)


def vectors_of(tensor):
    """Vectors of four along the last dimension, a row's last one padded with zeros: [N, 4]."""
    array = tensor.double().numpy().reshape(-1, tensor.shape[-1])
    return np.pad(array, [(0, 0), (0, -array.shape[1] % 4)]).reshape(-1, 4)


def bound(tensor):
    """The documented bound of the error's norm."""
    vectors = vectors_of(tensor)
    return np.sqrt(((vectors - vectors.mean(0)) ** 2).sum()) * (1 + 2.0**-20)


def error_of(tensor):
    return float((round_trip(tensor).double() - tensor.double()).norm())


def test_hand_calculated_example():
    # Two distinct vectors, each twice; the second is padded: (1, 2, 3, 4), (5, 0, 0, 0).
    codes, codebook = PQ.encode(torch.tensor([[1.0, 2, 3, 4, 5], [1.0, 2, 3, 4, 5]]))
    entries = np.frombuffer(codebook, "<f4").reshape(4, 4)  # one for each vector
    assert codes[0] == codes[2] != codes[1] == codes[3]
    assert entries[codes[0]].tolist() == [1, 2, 3, 4]
    assert entries[codes[1]].tolist() == [5, 0, 0, 0]
    assert PQ.decode([codes, codebook], [2, 5]).tolist() == [[1, 2, 3, 4, 5]] * 2


def test_a_foreign_codebook_is_decoded():
    codebook = np.arange(12, dtype="<f4").tobytes()
    decoded = PQ.decode([memoryview(b"\x02\x00\x01"), memoryview(codebook)], [3, 3])
    assert decoded.tolist() == [[8, 9, 10], [0, 1, 2], [4, 5, 6]]


@settings(max_examples=60, deadline=None)
@given(
    arrays.arrays(
        np.float32,
        arrays.array_shapes(min_dims=1, max_dims=3, max_side=12),
        elements=st.floats(-(2.0**125), 2.0**125, width=32),
    )
)
def test_the_error_stays_within_the_spread_of_the_vectors(array):
    tensor = torch.from_numpy(array)
    rounding = 2.0**-20 * float(tensor.double().norm()) + 2.0**-140
    assert error_of(tensor) <= bound(tensor) + rounding


@pytest.mark.parametrize("offset", [0.0, 1000.0, -3.0])
def test_the_bound_holds_with_subsampled_vectors(offset):
    generator = torch.Generator().manual_seed(3)
    tensor = torch.randn(300, 387, generator=generator) * torch.rand(300, 1, generator=generator)
    tensor[17] *= 500  # rare and large
    assert error_of(tensor + offset) <= bound(tensor + offset)


@pytest.mark.parametrize("different", [1, 2, 255, 256])
def test_at_most_256_distinct_vectors_are_exact(different):
    generator = torch.Generator().manual_seed(1)
    book = torch.randn(different, 4, generator=generator)
    tensor = book[torch.randint(different, [4000], generator=generator)].reshape(40, 400)
    assert torch.equal(round_trip(tensor), tensor)


def test_clustering_is_as_good_as_scikit_learn():
    tensor = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    vectors = tensor.reshape(-1, 4).numpy()
    reference = KMeans(256, n_init=1, max_iter=8, random_state=0).fit(vectors)
    assert error_of(tensor) <= 1.05 * np.sqrt(reference.inertia_)


def test_the_error_for_gaussian_numbers_matches_the_documentation():
    tensor = torch.randn(16, 64, 384, generator=torch.Generator().manual_seed(2))
    assert error_of(tensor) / float(tensor.norm()) == pytest.approx(0.32, abs=0.02)


def test_the_subsample_covers_periodic_positions():
    # One position of every row is far from all others; 96 divides the number of vectors.
    tensor = torch.randn(400, 384, generator=torch.Generator().manual_seed(2))
    tensor[:, 20:24] = 50 + torch.arange(4.0)
    assert float((round_trip(tensor) - tensor)[:, 20:24].abs().max()) < 0.01


def test_encoding_is_deterministic():
    tensor = torch.randn(200, 384, generator=torch.Generator().manual_seed(2))
    first, second = ([bytes(buffer) for buffer in PQ.encode(tensor.clone())] for _ in range(2))
    assert first == second


def test_encoded_sizes_match_the_documentation():
    assert encoded_bytes("pq", [64, 64, 384]) == 64 * 64 * 96 + 256 * 16
    assert encoded_bytes("pq", [3, 5]) == 3 * 2 + 6 * 16
    assert encoded_bytes("pq", []) == 1 + 16
    assert encoded_bytes("pq", [7, 0]) == 0


def test_the_gradient_of_a_linear_map_stays_within_the_bound():
    # dL/dW = gradientᵀ · activations: the error is at most |gradient| · |error of activations|.
    generator = torch.Generator().manual_seed(2)
    activations = torch.randn(256, 384, generator=generator).double()
    gradient = torch.randn(256, 10, generator=generator).double()
    exact = gradient.T @ activations
    error = gradient.T @ round_trip(activations).double() - exact
    assert float(error.norm()) <= float(torch.linalg.matrix_norm(gradient, 2)) * bound(activations)
    assert float(error.norm() / exact.norm()) < 0.4


def test_a_code_beyond_the_codebook_is_refused():
    codebook = memoryview(bytes(2 * 16))
    PQ.decode([memoryview(b"\x00\x01"), codebook], [2, 4])
    with pytest.raises(MalformedFrame) as caught:
        PQ.decode([memoryview(b"\x00\x02"), codebook], [2, 4])
    assert (caught.value.field, caught.value.limit, caught.value.value) == ("codes", 1, 2)


@pytest.mark.parametrize("entry", [np.nan, np.inf, -np.inf, 2.0**127])
def test_a_codebook_number_out_of_range_is_refused(entry):
    codebook = np.array([0, 1, entry, 2], "<f4").tobytes()
    with pytest.raises(MalformedFrame) as caught:
        PQ.decode([memoryview(b"\x00"), memoryview(codebook)], [4])
    assert caught.value.field == "codebook"
