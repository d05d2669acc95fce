"""Named tensors in safetensors files: written durably, read lazily."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from split_model.errors import TensorFileError
from split_model.files import write_durably

# A single entry holds all metadata: safetensors writes several entries in random order, and a
# file's digest must depend on its content alone.
_METADATA = "sfprompt"


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read on access.

    Raises:
        TensorFileError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            opened: Any = safe_open(str(path), framework="pt")
        except (OSError, SafetensorError) as error:
            raise TensorFileError(path, f"not a readable safetensors file ({error})") from error
        self._file = opened
        self._names: tuple[str, ...] = tuple(opened.keys())
        self.metadata = self._read_metadata(dict(opened.metadata() or {}))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _read_metadata(self, raw: dict[str, str]) -> dict[str, str]:
        if _METADATA not in raw:
            return raw
        try:
            values = json.loads(raw[_METADATA])
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


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file durably. Equal tensors and metadata give equal bytes."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    entry = {_METADATA: json.dumps(dict(metadata or {}), sort_keys=True)}
    write_durably(path, lambda temporary: save_file(plain, temporary, metadata=entry))
