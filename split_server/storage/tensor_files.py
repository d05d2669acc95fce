"""Tensors in files that say what was written: a damaged file is found when it is read.

A file named by the SHA-256 of its content is checked against its name. Any other file carries, in
its metadata, the SHA-256 of its tensors.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from protocol.errors import DamagedFile
from protocol.messages import BlobRef
from split_model.backbone.tensor_file import TensorFile
from split_model.checkpoints.state import state_bytes
from split_model.files import sha256_of, write_durably

log = logging.getLogger(__name__)

_CHECKSUM = "sha256"  # in the metadata, of the file without metadata

_HASH_NAME = re.compile(r"[0-9a-f]{64}")


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> BlobRef:
    """Write a safetensors file named by its content's hash; it is durable on return."""
    data = state_bytes(tensors)
    sha256 = hashlib.sha256(data).hexdigest()
    write_durably(folder / f"{sha256}.safetensors", data)
    return BlobRef(sha256=sha256, nbytes=len(data))


def write_named_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file of any name, with its checksum; it is durable on return."""
    plain = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    write_durably(path, save(plain, metadata={_CHECKSUM: _digest(plain)}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, and check that they are what was written.

    Raises:
        DamagedFile: they are not.
        OSError: the file cannot be read.
    """
    is_hashed = _HASH_NAME.fullmatch(path.stem) is not None
    if is_hashed and sha256_of(path) != path.stem:
        raise damaged(path)
    try:
        with safe_open(path, framework="pt") as file:
            names: list[str] = list(file.keys())
            checksum = (file.metadata() or {}).get(_CHECKSUM)
            tensors = {name: torch.as_tensor(file.get_tensor(name)) for name in names}
    except SafetensorError as error:
        raise damaged(path) from error
    if not is_hashed and checksum != _digest(tensors):
        raise damaged(path)
    return tensors


def open_tensors(path: Path) -> Mapping[str, Tensor]:
    """Return the tensors of a file named by its hash, each read when it is asked for.

    Raises:
        DamagedFile: the file is not what was written.
        OSError: it cannot be read.
    """
    if sha256_of(path) != path.stem:
        raise damaged(path)
    return TensorFile(path)


def check_file(path: Path, sha256: str) -> None:
    """Check a file's content against its hash, at most once a minute while it does not change.

    Raises:
        DamagedFile: they differ.
        OSError: the file cannot be read.
    """
    stat = path.stat()
    minute = int(time.monotonic() // 60)
    if _hash_of(path, stat.st_mtime_ns, stat.st_size, minute) != sha256:
        raise damaged(path)


def damaged(path: Path) -> DamagedFile:
    """Create the error for a damaged file; the log has its whole path."""
    log.error("%s is not what was written: its disk may be failing", path)
    return DamagedFile(
        "a file of the server is not what was written",
        field="file",
        value=f"{path.parent.name}/{path.name}",
        hint="restore it from a backup, or start the run again",
    )


@lru_cache(maxsize=64)
def _hash_of(path: Path, _modified: int, _size: int, _minute: int) -> str:
    return sha256_of(path)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(state_bytes(tensors)).hexdigest()
