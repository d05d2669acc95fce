import json
import math
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.codec_names import (
    FLOAT_CODECS,
    INTEGER_CODECS,
    CodecParts,
    check_float_codec,
    is_row_wise_inside,
    parse_codec,
)
from protocol.codecs import encoded_bytes, get_codec
from protocol.errors import UnknownCodec

SHARES = ["0.05", "0.000001", "0.999999", "0.5", "1", "1.0", "1.000000"]

STEPS = ["1", "0.5", "0.001", "0.010", "1.0", "9.999", "9", "2.25"]

VALID = [
    *(name for name in FLOAT_CODECS if ":" not in name),
    *(f"{base}:{share}" for base in ("topk", "svd") for share in SHARES),
    *(f"cosine:{bits}" for bits in range(2, 9)),
    *(f"klt:{step}" for step in STEPS),
]

WRONG_STEPS = ["", "0", "0.0", "0.000", "10", "-1", ".5", "1.", "0.0001", "01", "1e-1", "nan", " 1"]

WRONG_SHARES = ["", "0", "0.0", "0.000000", "1.1", "1.01", "2", "-0.5", ".5", "0.", "1.", "1e-3"]

WRONG_SHARES += [
    "0.0000001",
    "00.5",
    "01",
    "nan",
    "inf",
    "0,5",
    " 0.5",
    "0.5 ",
    "F",
    "\u0660.\u0665",
    "0.5\n",
]

WRONG_BITS = ["", "0", "1", "9", "16", "4.0", "-4", "+4", "04", "S", "\uff14", "4\n"]

UNKNOWN = ["pickle", "int", "INT8", "int8 ", " int8", "+zstd", "zstd", "int8+", "int8+zstd:1"]

UNKNOWN += ["", ":", "int8+zstd+zstd", "int8+gzip", "topk+zstd:0.5", "pq8", "float32\n", "\0"]


@pytest.mark.parametrize("name", [*VALID, *(f"{name}+zstd" for name in VALID)])
def test_valid_names_are_accepted(name):
    assert check_float_codec(name) == name
    codec = get_codec(name)
    assert codec.name == name
    assert codec.floating
    assert codec.row_wise == (is_row_wise_inside(name) and not name.endswith("+zstd"))


@pytest.mark.parametrize("name", INTEGER_CODECS)
def test_integer_codecs_encode_no_floats(name):
    for variant in (name, f"{name}+zstd"):
        assert not get_codec(variant).floating
        with pytest.raises(UnknownCodec) as caught:
            check_float_codec(variant)
        assert caught.value.value == variant
    assert is_row_wise_inside(name)
    assert is_row_wise_inside(f"{name}+zstd")


@pytest.mark.parametrize("name", VALID)
def test_row_wise_ignores_the_compression(name):
    base = name.partition(":")[0]
    expected = base in ("float32", "float16", "bfloat16", "int8", "int4", "int4-asym")
    assert is_row_wise_inside(name) == is_row_wise_inside(f"{name}+zstd") == expected


def test_names_are_parsed():
    assert parse_codec("int8") == CodecParts("int8", None, False)
    assert parse_codec("int4-asym+zstd") == CodecParts("int4-asym", None, True)
    assert parse_codec("topk:0.05+zstd") == CodecParts("topk", "0.05", True)
    assert parse_codec("cosine:4") == CodecParts("cosine", "4", False)


@pytest.mark.parametrize(
    "name",
    [
        *UNKNOWN,
        *(f"{base}:{share}" for base in ("topk", "svd") for share in WRONG_SHARES),
        *(f"cosine:{bits}" for bits in WRONG_BITS),
        *(f"klt:{step}" for step in WRONG_STEPS),
        *(f"{name}:" for name in ("int8", "float32", "pq")),
        *(f"{name}:4" for name in ("int8", "float32", "pq", "int64")),
        *("topk", "cosine", "svd", "topk:0.5:0.5"),
    ],
)
@pytest.mark.parametrize("parse", [check_float_codec, parse_codec, is_row_wise_inside, get_codec])
def test_a_wrong_name_is_refused_with_field_limit_and_value(name, parse):
    with pytest.raises(UnknownCodec) as caught:
        parse(name)
    assert (caught.value.field, caught.value.value) == ("codec", name)
    assert caught.value.limit
    json.dumps(caught.value.to_wire())


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("topk:1.5", "above 0 and at most 1, with at most 6 decimals"),
        ("svd:0", "above 0 and at most 1, with at most 6 decimals"),
        ("cosine:9", "an integer from 2 to 8"),
        ("klt:10", "above 0 and below 10, with at most 3 decimals"),
    ],
)
def test_an_error_about_a_parameter_gives_the_allowed_values(name, limit):
    with pytest.raises(UnknownCodec, match=limit) as caught:
        check_float_codec(name)
    assert caught.value.limit == limit


@given(st.text(max_size=20))
def test_any_text_is_a_valid_name_or_refused(text):
    for name in (text, f"topk:{text}", f"cosine:{text}", f"klt:{text}", f"{text}+zstd"):
        try:
            check_float_codec(name)
        except UnknownCodec:
            continue
        assert get_codec(name).name == name


@given(st.integers(1, 10**6), st.integers(0, 10**9))
def test_a_share_is_an_exact_decimal_number(millionths, elements):
    name = f"topk:{millionths // 10**6}.{millionths % 10**6:06}"
    expected = math.ceil(Fraction(millionths, 10**6) * elements)
    assert encoded_bytes(name, [elements]) == 6 * expected


def test_a_share_is_not_rounded_like_a_float():
    # 0.07 × 100 is 7.000000000000001 in binary64, and its ceiling would be 8.
    assert encoded_bytes("topk:0.07", [10, 10]) == 6 * 7


def test_names_are_parsed_without_torch():
    code = (
        "import sys; from protocol.codec_names import is_row_wise_inside, check_float_codec; "
        "assert is_row_wise_inside('int8+zstd') and not is_row_wise_inside('pq'); "
        "check_float_codec('svd:0.9+zstd'); "
        "assert not {'torch', 'numpy', 'zstandard'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
