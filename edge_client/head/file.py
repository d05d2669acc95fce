"""Read the server's tensor files into NumPy arrays, without torch."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from edge_client.head.layers import Floats
from protocol.codecs.int4 import Int4
from protocol.codecs.memory import to_buffer
from protocol.errors import SFPromptError
from split_model.errors import TensorFileError

_ENTRY = "sfprompt"  # holds all metadata

_SCALE, _SHAPE = ".scale", ".shape"  # suffixes of the names beside a quantised tensor's

_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<i2",  # its bits, which NumPy cannot compute with
    "I64": "<i8",
    "I32": "<i4",
    "I8": "i1",
    "U8": "u1",
}

_LENGTH = struct.Struct("<Q")

_INT4 = Int4()


class ArrayFile(Mapping[str, NDArray[Any]]):
    """The tensors of a safetensors file as they are stored, each mapped into memory on access.

    Attributes:
        metadata: entries that the server wrote.

    Raises:
        TensorFileError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(str(path), framework="numpy"):  # checks names, shapes and places
                pass
            with path.open("rb") as file:
                (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
                header: dict[str, Any] = json.loads(file.read(length))
        except (OSError, SafetensorError, ValueError, RecursionError) as error:
            raise TensorFileError(path, f"not a readable safetensors file ({error})") from error
        self._start = _LENGTH.size + length
        raw = header.pop("__metadata__", {})
        self._entries = header
        self.metadata = self._read_metadata(raw)

    def __getitem__(self, name: str) -> NDArray[Any]:
        entry = self._entries[name]
        if entry["dtype"] not in _DTYPES:
            raise TensorFileError(self.path, f"{name} has the unknown type {entry['dtype']}")
        shape = tuple(entry["shape"])
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        if 0 in shape:
            return np.empty(shape, dtype)
        offset = self._start + entry["data_offsets"][0]
        return np.memmap(self.path, dtype, mode="r", offset=offset, shape=shape)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _read_metadata(self, raw: dict[str, str]) -> dict[str, str]:
        try:
            values = json.loads(raw.get(_ENTRY, "{}"))
        except (ValueError, RecursionError) as error:
            raise TensorFileError(self.path, "its metadata is invalid") from error
        if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
            raise TensorFileError(self.path, "its metadata is invalid")
        return values

    def json(self, key: str) -> Any:
        """Parse a metadata entry as JSON.

        Raises:
            TensorFileError: it is missing or no JSON.
        """
        try:
            return json.loads(self.metadata[key])
        except (KeyError, ValueError, RecursionError) as error:
            raise TensorFileError(self.path, f"its metadata has no valid {key!r}") from error


class Weights(Mapping[str, Floats]):
    """The weights of a head file by timm's names; quantised ones become float32 on access."""

    def __init__(self, file: ArrayFile) -> None:
        self._file = file

    def __getitem__(self, name: str) -> Floats:
        stored = self._file[name]
        if name + _SHAPE in self._file:
            return self._from_int4(name, stored)
        if stored.dtype == np.int8:
            rows = stored.shape[0] if stored.ndim == 4 else math.prod(stored.shape[:-1])
            scale = np.asarray(self._file[name + _SCALE], np.float32).reshape(rows, 1)
            decoded = stored.reshape(rows, -1).astype(np.float32)
            decoded *= scale
            return decoded.reshape(stored.shape)
        return np.asarray(stored, np.float32)

    def _from_int4(self, name: str, codes: NDArray[Any]) -> Floats:
        shape = [int(size) for size in self._file[name + _SHAPE]]
        rows = [math.prod(shape[:1]), math.prod(shape[1:])]
        buffers = [
            to_buffer(np.ascontiguousarray(part)) for part in (codes, self._file[name + _SCALE])
        ]
        try:
            _INT4.check_sizes(rows, [buffer.nbytes for buffer in buffers])
            decoded: Floats = _INT4.decode_array(buffers, rows).reshape(shape)
        except SFPromptError as error:
            raise TensorFileError(self._file.path, f"{name}: {error}") from error
        return decoded

    def __contains__(self, name: object) -> bool:
        return name in self._file and not str(name).endswith((_SCALE, _SHAPE))

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._file if not name.endswith((_SCALE, _SHAPE)))

    def __len__(self) -> int:
        return sum(1 for _ in self)
