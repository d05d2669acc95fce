"""The names of the codecs, known without torch: settings are read where none is loaded.

A name is ``base[:parameter][+zstd]``: ``int8``, ``topk:0.05``, ``int8+zstd``. It goes over the
wire as it is, parameter and all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from protocol.errors import UnknownCodec

__all__ = [
    "FLOAT_CODECS",
    "LOSSLESS_SUFFIX",
    "WHOLE_CODECS",
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
)  # to show to people: a letter behind a colon stands for a parameter

WHOLE_CODECS: Final = ("int64", "uint8")

LOSSLESS_SUFFIX: Final = "+zstd"

_ROW_WISE: Final = {"float32", "float16", "bfloat16", "int8", "int4", "int4-asym", *WHOLE_CODECS}


@dataclass(frozen=True)
class _Parameter:
    """What may stand behind the colon of a name."""

    pattern: re.Pattern[str]
    allowed: str  # in words


_SHARE: Final = _Parameter(
    re.compile(r"0\.(?!0+$)[0-9]{1,6}|1|1\.0{1,6}"), "above 0, to 1, with at most 6 decimals"
)

_BITS: Final = _Parameter(re.compile(r"[2-8]"), "a whole number from 2 to 8")

_PARAMETERS: Final = {"topk": _SHARE, "cosine": _BITS, "svd": _SHARE}

_BASES: Final = {shown.partition(":")[0]: shown for shown in (*FLOAT_CODECS, *WHOLE_CODECS)}


@dataclass(frozen=True)
class CodecParts:
    """A codec's name, taken apart.

    Attributes:
        base: without parameter and suffix.
        parameter: as it was written; None for a base that takes none.
        compressed: the buffers are compressed once more, without loss.
    """

    base: str
    parameter: str | None = None
    compressed: bool = False


def parse_codec(name: str) -> CodecParts:
    """Take a codec's name apart.

    Raises:
        UnknownCodec: there is no such codec, or its parameter is not allowed.
    """
    plain = name.removesuffix(LOSSLESS_SUFFIX)
    base, colon, parameter = plain.partition(":")
    if base not in _BASES:
        raise UnknownCodec(
            "there is no codec of this name", field="codec", limit=list(_BASES.values()), value=name
        )
    rule = _PARAMETERS.get(base)
    if rule is None and colon:
        raise UnknownCodec("this codec takes no parameter", field="codec", limit=base, value=name)
    if rule is not None and not rule.pattern.fullmatch(parameter):
        raise UnknownCodec(
            f"the parameter of {_BASES[base]} is {rule.allowed}",
            field="codec",
            limit=rule.allowed,
            value=name,
        )
    return CodecParts(base, parameter if colon else None, name != plain)


def check_float_codec(name: str) -> str:
    """The name again, if a codec of this name carries floating-point numbers.

    Raises:
        UnknownCodec: there is none, or its parameter is not allowed.
    """
    base = name.removesuffix(LOSSLESS_SUFFIX).partition(":")[0]
    if base in WHOLE_CODECS or base not in _BASES:
        raise UnknownCodec(
            "there is no codec of this name for floating-point numbers",
            field="codec",
            limit=list(FLOAT_CODECS),
            value=name,
        )
    parse_codec(name)
    return name


def is_row_wise_inside(name: str) -> bool:
    """Whether what this codec encodes together can be taken apart by the first dimension.

    Of a codec that compresses without loss: before it does so.

    Raises:
        UnknownCodec: there is no such codec, or its parameter is not allowed.
    """
    return parse_codec(name).base in _ROW_WISE
