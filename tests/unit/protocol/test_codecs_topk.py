import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from protocol.codecs import ErrorFeedback, encoded_bytes, get_codec
from protocol.errors import InvalidField, MalformedFrame, WrongShape

NUMBERS = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=0, max_dims=3, max_side=9),
    elements=st.floats(-(2.0**125), 2.0**125, width=32),
)


def round_trip(name, tensor):
    codec = get_codec(name)
    return codec.decode(codec.encode(tensor), tensor.shape)


def brain(*values):
    """Encode values as bfloat16; they must be exact."""
    return (np.array(values, "<f4").view("<u4") >> 16).astype("<u2").tobytes()


def test_hand_calculated_example():
    # ⌈0.5 × 5⌉ = 3 of five: -4, then the first two of the three with magnitude 2.
    indices, values = get_codec("topk:0.5").encode(torch.tensor([2.0, 1.0, -2.0, -4.0, 2.0]))
    assert np.frombuffer(indices, "<u4").tolist() == [0, 2, 3]
    assert bytes(values) == brain(2.0, -2.0, -4.0)
    decoded = get_codec("topk:0.5").decode([indices, values], [5])
    assert decoded.tolist() == [2.0, 0.0, -2.0, -4.0, 0.0]


@settings(max_examples=100, deadline=None)
@given(NUMBERS, st.sampled_from(["topk:0.05", "topk:0.3", "topk:0.5", "topk:1"]))
def test_the_largest_magnitudes_are_selected_the_first_on_ties(array, name):
    flat = array.reshape(-1).astype(np.float64)
    share = float(name.partition(":")[2])
    selected = sorted(range(len(flat)), key=lambda index: (-abs(flat[index]), index))
    selected = sorted(selected[: math.ceil(share * len(flat) - 1e-9)])
    buffers = get_codec(name).encode(torch.from_numpy(array))
    assert np.frombuffer(buffers[0], "<u4").tolist() == selected
    decoded = get_codec(name).decode(buffers, array.shape).double().numpy().reshape(-1)
    assert (
        abs(decoded[selected] - flat[selected]) <= abs(flat[selected]) * 2.0**-8 + 2.0**-133
    ).all()
    assert np.count_nonzero(np.delete(decoded, selected)) == 0
    energy = (flat**2).sum()
    limit = (1 - len(selected) / len(flat) + 2.0**-16) * energy
    assert ((decoded - flat) ** 2).sum() <= limit * (1 + 1e-9) + len(flat) * 2.0**-260


def test_encoded_sizes_match_the_documentation():
    assert encoded_bytes("topk:0.05", [100, 200]) == 1000 * 6
    assert encoded_bytes("topk:0.000001", [5]) == 6
    assert encoded_bytes("topk:0.5", []) == 6
    assert encoded_bytes("topk:1", [0, 3]) == 0
    assert 80_000 / encoded_bytes("topk:0.05", [100, 200]) == pytest.approx(13.3, abs=0.05)


def test_the_gradient_of_a_linear_map_stays_within_the_bound():
    # dL/dW = gradientᵀ · activations; here the gradients are encoded.
    generator = torch.Generator().manual_seed(2)
    activations = torch.randn(256, 64, generator=generator).double()
    gradient = torch.randn(256, 10, generator=generator).double() ** 3
    exact = gradient.T @ activations
    error = round_trip("topk:0.3", gradient).double().T @ activations - exact
    max_error = float(torch.linalg.matrix_norm(activations, 2) * gradient.norm())
    assert float(error.norm()) <= math.sqrt(0.7 + 2.0**-16) * max_error
    assert float(error.norm() / exact.norm()) < 0.2  # few elements carry most of the norm


@pytest.mark.parametrize(
    "indices",
    [[1, 0, 2], [0, 0, 1], [0, 1, 6], [0, 1, 2**32 - 1], [2**31, 0, 1], [0, 2**31, 5]],
)
def test_indices_must_increase_within_the_tensor(indices):
    codec = get_codec("topk:0.5")
    values = memoryview(brain(1.0, 1.0, 1.0))
    codec.decode([memoryview(np.array([0, 1, 5], "<u4").tobytes()), values], [6])
    with pytest.raises(MalformedFrame) as caught:
        codec.decode([memoryview(np.array(indices, "<u4").tobytes()), values], [6])
    assert caught.value.field == "indices"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2.0**127])
def test_a_value_out_of_range_is_refused(value):
    with pytest.raises(MalformedFrame) as caught:
        get_codec("topk:1").decode([memoryview(bytes(4)), memoryview(brain(value))], [1])
    assert caught.value.field == "values"


def test_too_many_elements_for_an_index_are_refused():
    enormous = torch.zeros(1).expand(2**31 + 1)
    with pytest.raises(InvalidField) as caught:
        get_codec("topk:0.000001").encode(enormous)
    assert caught.value.limit == 2**31


@pytest.mark.parametrize("name", ["topk:0.1", "int4", "int8+zstd", "svd:0.5"])
def test_with_feedback_the_decoded_sum_differs_only_by_the_last_residual(name):
    generator = torch.Generator().manual_seed(4)
    codec, feedback = get_codec(name), ErrorFeedback()
    sent, arrived = torch.zeros(8, 40).double(), torch.zeros(8, 40).double()
    for _ in range(30):
        tensor = torch.randn(8, 40, generator=generator)
        arrived += codec.decode(feedback.encode("tail.weight", tensor, codec), [8, 40])
        sent += tensor
    residual = feedback.residual("tail.weight")
    assert float((sent - arrived - residual).abs().max()) < 1e-4
    assert float(residual.norm()) < 0.5 * float(sent.norm())


def test_feedback_separates_names():
    codec, feedback = get_codec("topk:0.5"), ErrorFeedback()
    first = feedback.encode("a", torch.tensor([3.0, 1.0]), codec)
    assert codec.decode(first, [2]).tolist() == [3.0, 0.0]
    assert feedback.residual("a").tolist() == [0.0, 1.0]
    assert feedback.residual("b") is None
    second = feedback.encode("a", torch.tensor([1.0, 0.5]), codec)
    assert codec.decode(second, [2]).tolist() == [0.0, 1.5]
    assert feedback.residual("a").tolist() == [1.0, 0.0]
    assert feedback.add_residual("b", torch.tensor([2.0])).tolist() == [2.0]
    feedback.clear()
    assert feedback.add_residual("a", torch.tensor([1.0, 0.5])).tolist() == [1.0, 0.5]


def test_a_refused_tensor_does_not_change_the_residual():
    codec, feedback = get_codec("topk:0.5"), ErrorFeedback()
    tensor = torch.tensor([3.0, 1.0], requires_grad=True)
    feedback.encode("a", tensor, codec)
    assert tensor.tolist() == [3.0, 1.0]
    assert not feedback.residual("a").requires_grad
    with pytest.raises(InvalidField):
        feedback.encode("a", torch.tensor([math.nan, 1.0]), codec)
    assert feedback.residual("a").tolist() == [0.0, 1.0]
    with pytest.raises(WrongShape) as caught:
        feedback.encode("a", torch.ones(3), codec)
    assert (caught.value.field, caught.value.limit, caught.value.value) == ("a", [2], [3])
