"""NumPy arrays and torch tensors: the same bytes, the same numbers."""

import numpy as np
import pytest
import torch

from protocol.arrays import backend_of
from protocol.codecs import get_codec
from protocol.codecs.registry import as_decoded

SAME_BYTES = [
    "float32",
    "float16",
    "bfloat16",
    "int8",
    "int4",
    "int4-asym",
    "topk:0.1",
    "int4+zstd",
]

SHAPES = [[], [0], [7], [3, 130], [2, 5, 64], [700, 384]]


def numbers(shape, dtype):
    return (np.random.default_rng(1).standard_normal(shape) * 3).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("name", SAME_BYTES)
def test_both_libraries_give_the_same_bytes_and_numbers(name, dtype):
    codec = get_codec(name)
    for shape in SHAPES:
        array = np.asarray(numbers(shape, dtype))
        buffers = codec.encode(array)
        of_tensor = codec.encode(torch.from_numpy(array))
        assert [bytes(part) for part in buffers] == [bytes(part) for part in of_tensor]
        decoded = codec.decode(buffers, shape).float().numpy()
        assert np.array_equal(codec.decode_array(buffers, shape).astype(np.float32), decoded)


@pytest.mark.parametrize("seeded", [np.random.default_rng, torch.Generator().manual_seed])
@pytest.mark.parametrize("name", ["int8", "int4", "int4-asym"])
def test_random_rounding_depends_on_the_generator_not_on_the_arrays_library(name, seeded):
    array = numbers([30, 70], np.float32)
    first, second = (
        [bytes(part) for part in get_codec(name).encode(values, seeded(5))]
        for values in (array, torch.from_numpy(array))
    )
    assert first == second
    assert first != [bytes(part) for part in get_codec(name).encode(array, seeded(6))]


@pytest.mark.parametrize("name", ["klt:0.5", "svd:0.9", "pq", "cosine:4"])
def test_codecs_that_multiply_matrices_agree_closely(name):
    draws = np.random.default_rng(2)
    array = draws.standard_normal((6, 9, 5)) @ draws.standard_normal((5, 64))
    array = array.astype(np.float32)
    error = np.linalg.norm(as_decoded(array, name) - array)
    of_tensor = as_decoded(torch.from_numpy(array), name)
    assert float(np.linalg.norm(of_tensor.numpy() - array)) == pytest.approx(error, rel=0.01)
    buffers = get_codec(name).encode(array)
    decoded = get_codec(name).decode(buffers, array.shape).numpy()
    np.testing.assert_allclose(
        get_codec(name).decode_array(buffers, array.shape), decoded, rtol=1e-5, atol=1e-5
    )


def test_what_is_no_array_is_refused():
    with pytest.raises(TypeError, match="list"):
        backend_of([1.0])
