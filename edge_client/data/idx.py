"""The idx files of MNIST and its kin, plain or gzipped, checked against their header."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from edge_client.data.errors import DataFormatError

_UNSIGNED_BYTE = 0x08
_MOST_BYTES = 4 * 1024**3


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Read a file of unsigned bytes with this many dimensions: uint8, shaped as its header says.

    The header is believed only up to 4 GiB, and the file has to hold exactly what it announces.
    Raises DataFormatError.
    """
    try:
        with _open(path) as stream:
            return _read(stream, path, dimensions)
    except (OSError, EOFError, zlib.error) as error:
        raise DataFormatError(
            "idx file", limit="a readable file", value=str(path), hint=str(error)
        ) from error


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")


def _read(stream: BinaryIO, path: Path, dimensions: int) -> Tensor:
    header_bytes = 4 + 4 * dimensions
    header = stream.read(header_bytes)
    magic = bytes([0, 0, _UNSIGNED_BYTE, dimensions])
    if len(header) != header_bytes or header[:4] != magic:
        raise DataFormatError(
            f"header of {path}", limit=f"to begin with {magic.hex()}", value=header[:4].hex()
        )
    shape = struct.unpack(f">{dimensions}I", header[4:])
    size = math.prod(shape)
    if size > _MOST_BYTES:
        raise DataFormatError(f"size of {path}", limit=f"at most {_MOST_BYTES}", value=size)
    if path.suffix != ".gz" and path.stat().st_size != header_bytes + size:
        raise DataFormatError(
            f"size of {path}", limit=header_bytes + size, value=path.stat().st_size
        )
    values = np.empty(size, np.uint8)
    view, filled = values.data, 0
    while filled < size:
        count = cast(int, stream.readinto(view[filled:]))  # type: ignore[attr-defined]
        if not count:
            raise DataFormatError(f"values in {path}", limit=size, value=filled)
        filled += count
    if stream.read(1):
        raise DataFormatError(f"values in {path}", limit=size, value=f"more than {size}")
    return torch.from_numpy(values.reshape(shape))
