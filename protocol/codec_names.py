"""Names of codecs. This module does not import torch, since plans are validated without it.

A name is ``base[:parameter][+zstd]``, such as ``int8``, ``topk:0.05`` or ``int8+zstd``. The whole
name is sent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from protocol.errors import UnknownCodec

__all__ = [
    "FLOAT_CODECS",
    "INTEGER_CODECS",
    "LOSSLESS_SUFFIX",
    "CodecParts",
    "check_float_codec",
    "is_row_wise_inside",
    "parse_codec",
]

FLOAT_CODECS: Final = (
    "float32",
    "float16",
    "bfloat16",
    "int8",
    "int4",
    "int4-asym",
    "pq",
    "topk:F",
    "cosine:S",
    "svd:E",
    "klt:Q",
)  # the letter after the colon stands for the parameter

INTEGER_CODECS: Final = ("int64", "uint8")

LOSSLESS_SUFFIX: Final = "+zstd"

_ROW_WISE: Final = {"float32", "float16", "bfloat16", "int8", "int4", "int4-asym", *INTEGER_CODECS}


@dataclass(frozen=True)
class _Parameter:
    """The rule for the parameter after the colon."""

    pattern: re.Pattern[str]
    allowed: str  # description of the allowed values


_SHARE: Final = _Parameter(
    re.compile(r"0\.(?!0+$)[0-9]{1,6}|1|1\.0{1,6}"),
    "above 0 and at most 1, with at most 6 decimals",
)

_BITS: Final = _Parameter(re.compile(r"[2-8]"), "an integer from 2 to 8")

_STEP: Final = _Parameter(
    re.compile(r"(?!0(\.0+)?$)[0-9](\.[0-9]{1,3})?"),
    "above 0 and below 10, with at most 3 decimals",
)

_PARAMETERS: Final = {"topk": _SHARE, "cosine": _BITS, "svd": _SHARE, "klt": _STEP}

_BASES: Final = {name.partition(":")[0]: name for name in (*FLOAT_CODECS, *INTEGER_CODECS)}


@dataclass(frozen=True)
class CodecParts:
    """The parts of a codec's name.

    Attributes:
        base: the name without parameter and suffix.
        parameter: the parameter as written; None: the base has none.
        compressed: whether the name ends in ``+zstd``, lossless compression of the buffers.
    """

    base: str
    parameter: str | None = None
    compressed: bool = False


def parse_codec(name: str) -> CodecParts:
    """Parse a codec's name.

    Raises:
        UnknownCodec: the name or its parameter is not allowed.
    """
    plain = name.removesuffix(LOSSLESS_SUFFIX)
    base, colon, parameter = plain.partition(":")
    if base not in _BASES:
        raise UnknownCodec(
            "no codec has this name", field="codec", limit=list(_BASES.values()), value=name
        )
    rule = _PARAMETERS.get(base)
    if rule is None and colon:
        raise UnknownCodec("this codec takes no parameter", field="codec", limit=base, value=name)
    if rule is not None and not rule.pattern.fullmatch(parameter):
        raise UnknownCodec(
            f"the parameter of {_BASES[base]} must be {rule.allowed}",
            field="codec",
            limit=rule.allowed,
            value=name,
        )
    return CodecParts(base, parameter if colon else None, name != plain)


def check_float_codec(name: str) -> str:
    """Return the name if its codec encodes floating-point numbers.

    Raises:
        UnknownCodec: no such codec, or its parameter is not allowed.
    """
    base = name.removesuffix(LOSSLESS_SUFFIX).partition(":")[0]
    if base in INTEGER_CODECS or base not in _BASES:
        raise UnknownCodec(
            "no codec for floating-point numbers has this name",
            field="codec",
            limit=list(FLOAT_CODECS),
            value=name,
        )
    parse_codec(name)
    return name


def is_row_wise_inside(name: str) -> bool:
    """Whether the codec without ``+zstd`` encodes each row of the first dimension separately.

    Raises:
        UnknownCodec: the name or its parameter is not allowed.
    """
    return parse_codec(name).base in _ROW_WISE
