"""The names of the codecs, known without torch: settings are read where none is loaded."""

from __future__ import annotations

from typing import Final

from protocol.errors import UnknownCodec

__all__ = ["FLOAT_CODECS", "WHOLE_CODECS", "check_float_codec"]

FLOAT_CODECS: Final = ("float32", "float16", "bfloat16")
WHOLE_CODECS: Final = ("int64", "uint8")


def check_float_codec(name: str) -> str:
    """The name again, if a codec of this name carries floating-point numbers.

    Raises:
        UnknownCodec: there is none.
    """
    if name not in FLOAT_CODECS:
        raise UnknownCodec(
            "no codec of this name carries floating-point numbers",
            field="codec",
            limit=list(FLOAT_CODECS),
            value=name,
        )
    return name
