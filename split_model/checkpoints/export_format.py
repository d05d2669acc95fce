"""The formats of an exported model, and the names of their files. Imports no torch."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from protocol.errors import InvalidField


class ExportFormat(StrEnum):
    """The formats of an exported model."""

    SAFETENSORS = "safetensors"  # for `edge-client predict` and `sfprompt.load_exported`
    TIMM = "timm"
    ONNX = "onnx"
    PT2 = "pt2"


_BY_SUFFIX = {
    ".safetensors": ExportFormat.SAFETENSORS,
    ".onnx": ExportFormat.ONNX,
    ".pt2": ExportFormat.PT2,
    "": ExportFormat.TIMM,
}


def choose_format(out: Path, chosen: ExportFormat | None) -> ExportFormat:
    """Return the format that a path's suffix names, and check that it is the chosen one.

    Raises:
        InvalidField: the suffix names no format, or another than the chosen one.
    """
    found = _BY_SUFFIX.get(out.suffix)
    if found is None or chosen not in (None, found):
        names = {kind: f"NAME{suffix}" for suffix, kind in _BY_SUFFIX.items()}
        raise InvalidField(
            f"the file's name does not end as {chosen or 'a format'} requires",
            field="out",
            limit=names[chosen] if chosen else list(names.values()),
            value=str(out),
            hint="a name without a suffix is a folder in timm's format",
        )
    return found
