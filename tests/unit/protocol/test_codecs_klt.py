import math
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codecs import encoded_bytes, get_codec
from protocol.errors import MalformedFrame
from tests.protocol_vectors import rans as reference
from tests.protocol_vectors.by_hand import brains

STEPS = ["0.25", "1", "2"]


def smashed(samples, positions=10, width=96, rank=24, seed=0, spread=1.0):
    """Tokens with a mean of each position and components of falling variance."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    deviations = torch.logspace(0, -2, rank)
    components = torch.randn(samples, positions, rank, generator=generator) * deviations
    means = torch.randn(positions, width, generator=generator) * 0.3 * spread
    noise = 0.003 * torch.randn(samples, positions, width, generator=generator)
    return components @ directions[:rank] + means + 0.5 + noise


def round_trip(name, tensor):
    codec = get_codec(name)
    return codec.decode(codec.encode(tensor), tensor.shape)


def nbytes_of(name, tensor):
    return sum(buffer.nbytes for buffer in get_codec(name).encode(tensor))


def sigma(tensor):
    """Standard deviation about the means of the positions."""
    deviations = tensor.double() - tensor.double().mean(0)
    return math.sqrt(float(deviations.square().mean()) * len(tensor) / (len(tensor) - 1))


def read(buffers, shape):
    """Decode the buffers with the coder of single codes: scaled matrix, codes with their means."""
    samples, positions, width = shape
    steps = np.frombuffer(bytes(buffers[0]), "<u2").astype("<u4") << 16
    steps = steps.view("<f4").astype(np.float64)
    tables = [bytes(buffers[1][at : at + 4]) for at in range(0, buffers[1].nbytes, 4)]
    words, columns = bytes(buffers[2]), len(steps)
    predicted = positions if samples >= 4 and positions > 1 else 0
    matrix, rest = reference.decode(words, width, tables[:columns])
    rows, rest = reference.decode(rest, predicted + samples * positions, tables[columns:])
    assert not rest
    codes = np.array(rows[predicted:], np.int64).reshape(samples, positions, -1)
    if predicted:
        fraction = 4 if samples >= 32 else 1
        codes = codes + np.array(rows[:predicted], np.int64) / fraction
    return np.array(matrix) * steps, codes


@pytest.mark.parametrize("samples", [2, 5, 40])
def test_a_coder_of_single_codes_reads_the_same_values(samples):
    tensor = smashed(samples, positions=3, width=16, rank=4)
    buffers = get_codec("klt:1").encode(tensor)
    assert len(buffers) == 3
    matrix, codes = read(buffers, tensor.shape)
    expected = codes @ matrix[:, 1:].T + matrix[:, 0]
    decoded = get_codec("klt:1").decode(buffers, tensor.shape)
    assert np.allclose(decoded.numpy(), expected, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(STEPS),
    st.integers(1, 12) | st.integers(30, 40),
    st.integers(1, 5),
    st.integers(0, 10**6),
)
def test_the_error_of_a_component_is_at_most_half_a_step(step, samples, positions, seed):
    tensor = smashed(samples, positions, width=12, rank=3, seed=seed)
    buffers = get_codec(f"klt:{step}").encode(tensor)
    if len(buffers) == 1:
        return
    matrix, codes = read(buffers, tensor.shape)
    offsets = (tensor.double().numpy() - matrix[:, 0]).reshape(-1, 12)
    coordinates, *_ = np.linalg.lstsq(matrix[:, 1:], offsets.T, rcond=None)
    error = np.abs(coordinates.T.reshape(codes.shape) - codes)
    assert error.max(initial=0) <= 0.5 + 1e-3


@pytest.mark.parametrize("samples", [8, 60, 400])
@pytest.mark.parametrize("step", STEPS)
def test_the_error_is_that_of_rounding_to_the_step(samples, step):
    tensor = smashed(samples)
    error = float((round_trip(f"klt:{step}", tensor) - tensor).square().mean().sqrt())
    assert error <= 0.5 * float(step) * sigma(tensor)  # 0.29 if all components were rounded


def test_a_smaller_step_gives_a_smaller_error():
    tensor = smashed(100)
    errors = [
        float((round_trip(f"klt:{step}", tensor) - tensor).norm())
        for step in ("4", "2", "1", "0.5", "0.1", "0.02")
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05 * errors[2]


@pytest.mark.parametrize("samples", [15, 150, 600])
def test_correlated_tokens_need_fewer_bytes_than_int4_at_a_smaller_error(samples):
    tensor = smashed(samples)
    errors = {name: (round_trip(name, tensor) - tensor).norm() for name in ("int4", "klt:0.3")}
    assert errors["klt:0.3"] < errors["int4"]
    assert nbytes_of("klt:0.3", tensor) < 0.7 * nbytes_of("int4+zstd", tensor)


def test_more_samples_need_fewer_bytes_each():
    each = [nbytes_of("klt:1", smashed(samples)) / samples for samples in (1, 10, 100, 1000)]
    assert each == sorted(each, reverse=True)


def test_means_of_the_positions_cost_little():
    flat, spread = smashed(300, spread=0.0), smashed(300, spread=3.0)
    extra = nbytes_of("klt:1", spread) - nbytes_of("klt:1", flat)
    assert extra < 0.15 * nbytes_of("klt:1", flat)


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 40, 64), (300, 64), (6, 5, 4, 64), (64, 1, 64)])
def test_every_shape_is_decoded(shape):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    decoded = round_trip("klt:0.5", tensor)
    assert decoded.shape == shape
    assert float((decoded - tensor).norm()) <= 0.3 * float(tensor.norm())


@pytest.mark.parametrize("shape", [(), (300,), (2, 2), (0, 5), (3, 0)])
def test_a_tensor_that_it_does_not_make_smaller_is_sent_unchanged(shape):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    buffers = get_codec("klt:0.5").encode(tensor)
    assert [buffer.nbytes for buffer in buffers] == [4 * tensor.numel()]
    assert torch.equal(get_codec("klt:0.5").decode(buffers, shape), tensor)


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-30, 1e30])
def test_equal_tokens_need_the_mean_only(value):
    tensor = torch.full((50, 10, 96), value)
    buffers = get_codec("klt:1").encode(tensor)
    assert sum(buffer.nbytes for buffer in buffers) < 600
    decoded = get_codec("klt:1").decode(buffers, tensor.shape)
    assert torch.allclose(decoded, tensor, rtol=1e-4, atol=0)


def test_equal_samples_are_coded_once():
    tensor = smashed(1).expand(64, -1, -1)
    assert nbytes_of("klt:0.25", tensor) < 2 * nbytes_of("klt:0.25", tensor[:1])
    decoded = round_trip("klt:0.25", tensor)
    assert float((decoded - tensor).norm()) < 0.1 * float(tensor.norm())


@pytest.mark.parametrize("factor", [2.0**-90, 2.0**100])
def test_a_power_of_two_scales_the_result(factor):
    tensor = smashed(20)
    assert torch.equal(round_trip("klt:1", tensor * factor), round_trip("klt:1", tensor) * factor)


def test_one_huge_token_does_not_hide_the_others():
    tensor = smashed(100)
    tensor[3, 2] *= 1000
    decoded = round_trip("klt:0.001", tensor)
    assert float((decoded - tensor)[:3].norm()) < 0.2 * float(tensor[:3].norm())


def test_its_bytes_depend_on_the_values():
    assert encoded_bytes("klt:1", [64, 10, 96]) is None


SHAPE = (4, 2, 8)  # of the examples below: 256 bytes as float32


def foreign(steps=(1.0, 1.0), means=(0, 0), codes=(0,) * 8, reach=(1, 1, 2), extra=b""):
    """Buffers of rank 1: the mean token and the direction are 1 in every element."""
    tables = [reference.table(one, 100, 100) for one in reach]
    words = reference.encode([[1, 1]] * 8, tables[:2])
    words += reference.encode([[code] for code in (*means, *codes)], tables[2:])
    return [memoryview(part) for part in (brains(*steps), b"".join(tables), words + extra)]


def decode_foreign(**changes):
    codec, buffers = get_codec("klt:1"), foreign(**changes)
    codec.check_sizes(SHAPE, [buffer.nbytes for buffer in buffers])
    return codec.decode(buffers, SHAPE)


def test_hand_calculated_foreign_example():
    decoded = decode_foreign(steps=(0.5, 2.0), means=(2, -1), codes=(0, 0, 1, 0, -2, 1, 0, 0))
    # 0.5 + 2 (mean of the position + code), the same in all 8 elements
    expected = [[4.5, -1.5], [6.5, -1.5], [0.5, 0.5], [4.5, -1.5]]
    assert torch.equal(decoded, torch.tensor(expected)[:, :, None].expand(SHAPE))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"steps": (math.nan, 1.0)}, "steps"),
        ({"steps": (1.0, math.inf)}, "steps"),
        ({"steps": (-1.0, 1.0)}, "steps"),
        ({"steps": (1.0, 2.0**125)}, "steps"),
        ({"reach": (1, 1, 16_384)}, "tables"),
        ({"extra": b"\0\0"}, "words"),
    ],
)
def test_impossible_content_is_refused(changes, field):
    with pytest.raises(MalformedFrame) as caught:
        decode_foreign(**changes)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "sizes",
    [
        [2, 4, 256],  # no smaller than float32
        [0, 0, 12],
        [3, 12, 20],
        [4, 8, 20],
        [4, 12, 21],
        [20, 76, 20],  # rank 9 of 8 tokens
        [4, 12, -2],
        [255],
        [4, 12],
    ],
)
def test_wrong_sizes_are_refused(sizes):
    with pytest.raises(MalformedFrame) as caught:
        get_codec("klt:1").check_sizes(SHAPE, sizes)
    assert caught.value.field == "sizes"


def test_large_shapes_are_refused_before_memory_is_allocated():
    shape = (2**20, 257, 384)
    buffers = [memoryview(brains(1.0, 1.0)), memoryview(struct.pack("<HBB", 1, 0, 0) * 3)]
    buffers.append(memoryview(bytes(40)))
    get_codec("klt:1").check_sizes(shape, [4, 12, 40])
    tracemalloc.start()
    try:
        with pytest.raises(MalformedFrame):
            get_codec("klt:1").decode(buffers, shape)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()
