"""Tensors on disk: whole files or none, each named by the hash of its content."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from protocol.messages import BlobRef


@dataclass(frozen=True)
class RunFiles:
    """The files of one run.

    ``head.safetensors``, ``states/SHA256.safetensors`` (global states) and
    ``updates/SHA256.safetensors`` (until their round is aggregated).
    """

    root: Path

    @property
    def head(self) -> Path:
        return self.root / "head.safetensors"

    def state(self, sha256: str) -> Path:
        return self.root / "states" / f"{sha256}.safetensors"

    def update(self, sha256: str) -> Path:
        return self.root / "updates" / f"{sha256}.safetensors"

    def write_state(self, tensors: dict[str, Tensor]) -> BlobRef:
        """Store a global state; the same tensors always give the same reference."""
        return write_tensors(self.root / "states", tensors)

    def write_update(self, tensors: dict[str, Tensor]) -> BlobRef:
        return write_tensors(self.root / "updates", tensors)

    def keep_updates(self, wanted: Iterable[str]) -> None:
        """Remove the files of all other updates, and what a crash has left half written."""
        names = {f"{sha256}.safetensors" for sha256 in wanted}
        folder = self.root / "updates"
        if folder.is_dir():
            for path in folder.iterdir():
                if path.name not in names:
                    path.unlink(missing_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


def write_tensors(folder: Path, tensors: dict[str, Tensor]) -> BlobRef:
    """Write a safetensors file named by its hash, durable when this returns."""
    plain = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    data = save(plain)
    sha256 = hashlib.sha256(data).hexdigest()
    write_durably(folder / f"{sha256}.safetensors", data)
    return BlobRef(sha256=sha256, nbytes=len(data))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        names: list[str] = list(file.keys())
        return {name: torch.as_tensor(file.get_tensor(name)) for name in names}


def write_durably(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a whole file or none: temporary file, fsync, rename, fsync of the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    if os.name == "nt":  # has no such call
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
