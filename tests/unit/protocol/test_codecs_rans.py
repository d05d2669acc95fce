import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from protocol.codecs import rans
from protocol.errors import MalformedFrame
from tests.protocol_vectors import rans as reference

MATRICES = arrays.arrays(
    np.int32,
    arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12),
    elements=st.integers(-5, 5) | st.integers(-rans.MAX_REACH // 16, rans.MAX_REACH // 16),
)


def laplace(rows, scales, seed=0):
    generator = np.random.default_rng(seed)
    return np.rint(generator.laplace(size=(rows, len(scales))) * scales).astype(np.int32)


def entropy_bytes(codes):
    bits = 0.0
    for column in codes.T:
        _, counts = np.unique(column, return_counts=True)
        bits -= float((counts * np.log2(counts / counts.sum())).sum())
    return bits / 8


def split(tables):
    return [tables[at : at + rans.TABLE_BYTES] for at in range(0, len(tables), rans.TABLE_BYTES)]


@settings(max_examples=100, deadline=None)
@given(MATRICES)
def test_codes_are_decoded_exactly(codes):
    tables = rans.fit_tables(codes)
    words = rans.encode_columns(codes, tables)
    decoded, used = rans.decode_columns(np.append(words, np.uint16(7)), len(codes), tables)
    assert used == len(words)
    assert np.array_equal(decoded, codes)


@settings(max_examples=50, deadline=None)
@given(MATRICES, st.integers(0, 255), st.integers(0, 255))
def test_any_table_that_reaches_the_codes_encodes_them(codes, zeros, decay):
    tables = b"".join(
        reference.table(int(reach), zeros, decay) for reach in np.abs(codes).max(axis=0)
    )
    words = rans.encode_columns(codes, tables)
    decoded, _ = rans.decode_columns(words, len(codes), tables)
    assert np.array_equal(decoded, codes)


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (7, 3), (700, 9), (5, 2000)], ids=["one", "few", "lanes", "wide"]
)
def test_a_coder_of_single_codes_writes_and_reads_the_same_words(rows, columns):
    codes = laplace(rows, np.geomspace(12, 0.05, columns), seed=rows)
    tables = rans.fit_tables(codes)
    words = rans.encode_columns(codes, tables)
    assert reference.encode(codes.tolist(), split(tables)) == words.tobytes()
    decoded, rest = reference.decode(words.tobytes() + b"ab", rows, split(tables))
    assert (decoded, rest) == (codes.tolist(), b"ab")


@pytest.mark.parametrize("scales", [(20, 0.2), (2, 0.1), (200, 20), (0.3, 0.3)])
def test_the_rate_is_near_the_entropy(scales):
    codes = laplace(4000, np.geomspace(*scales, 60))
    tables = rans.fit_tables(codes)
    nbytes = len(tables) + rans.encode_columns(codes, tables).nbytes
    assert nbytes < 1.05 * entropy_bytes(codes)


def test_columns_of_zeros_need_a_table_only():
    codes = np.zeros((300, 40), np.int32)
    codes[:, 7] = laplace(300, [3.0])[:, 0]
    tables = rans.fit_tables(codes)
    alone = rans.encode_columns(codes[:, 7:8], tables[28:32])
    lanes = reference.count_lanes(300, 40) - reference.count_lanes(300, 1)
    assert rans.encode_columns(codes, tables).nbytes <= alone.nbytes + 6 * lanes + 8


@pytest.mark.parametrize(("rows", "columns"), [(0, 3), (3, 0), (0, 0)])
def test_an_empty_matrix_is_decoded(rows, columns):
    codes = np.zeros((rows, columns), np.int32)
    tables = rans.fit_tables(codes)
    words = rans.encode_columns(codes, tables)
    decoded, used = rans.decode_columns(words, rows, tables)
    assert (decoded.shape, used) == ((rows, columns), len(words))


def test_codes_beyond_the_limits_have_no_table():
    assert rans.fit_tables(np.array([[rans.MAX_REACH, -rans.MAX_REACH]], np.int32))
    assert rans.fit_tables(np.array([[rans.MAX_REACH + 1]], np.int32)) is None
    assert rans.fit_tables(np.full((1, 9), -rans.MAX_REACH, np.int32)) is None


@pytest.mark.parametrize("reach", [[16_384], [65_535], [16_383] * 9])
def test_a_reach_beyond_the_limits_is_refused(reach):
    tables = b"".join(reference.table(one, 0, 1) for one in reach)
    with pytest.raises(MalformedFrame) as caught:
        rans.decode_columns(np.zeros(100, np.uint16), 4, tables)
    assert (caught.value.field, caught.value.value) == ("tables", [max(reach), sum(reach)])


@pytest.mark.parametrize("change", ["cut", "states", "low state", "empty"])
def test_words_that_no_encoder_writes_are_refused(change):
    codes = laplace(500, np.geomspace(9, 0.1, 20))
    tables = rans.fit_tables(codes)
    words = rans.encode_columns(codes, tables)
    states = 3 * reference.count_lanes(500, 20)
    damaged = words.copy()
    damaged[2] = 0  # the high word of the first lane
    changed = {"cut": words[:-1], "states": words[: states - 1], "low state": damaged, "empty": []}
    with pytest.raises(MalformedFrame) as caught:
        rans.decode_columns(np.asarray(changed[change], np.uint16), 500, tables)
    assert caught.value.field == "words"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 15))
def test_a_changed_bit_is_refused_or_gives_codes_within_reach(place, bit):
    codes = laplace(60, np.geomspace(9, 0.1, 10))
    tables = rans.fit_tables(codes)
    words = rans.encode_columns(codes, tables)
    words[place % len(words)] ^= np.uint16(1 << bit)
    try:
        decoded, used = rans.decode_columns(words, 60, tables)
    except MalformedFrame:
        return
    assert used <= len(words)
    assert (np.abs(decoded) <= rans.reaches(tables)).all()


def test_hand_calculated_words():
    # reach 1, zeros 128 of 256, decay irrelevant: of 65,533 spare slots zero has 32,767 and each
    # side 16,383, so that −1 has the slots 0 … 16,383 and 0 the slots 16,384 … 49,151.
    one_table = struct.pack("<HBB", 1, 128, 0)
    assert reference.slots(one_table) == [(-1, 0, 16384), (0, 16384, 32768), (1, 49152, 16384)]
    words = rans.encode_columns(np.array([[0], [-1]], np.int32), one_table)
    # The last code first: 2³² ÷ 2¹⁴ · 2¹⁶ = 2³⁴; then 2³⁴ ÷ 2¹⁵ · 2¹⁶ + 16,384 = 2³⁵ + 2¹⁴.
    assert words.tolist() == [16384, 0, 8]
    assert math.log2((8 << 32) / 2**32) == 3  # one bit for 0 and two for −1
