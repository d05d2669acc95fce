"""Durable writes: whole or not at all, with the permissions asked for, each folder made durable."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch

from split_model.backbone.tensor_file import TensorFile, write_tensors
from split_model.files import write_durably


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[os.stat_result]:
    """The status of each file or folder passed to fsync, in order."""
    results: list[os.stat_result] = []
    real = os.fsync

    def record(descriptor: int) -> None:
        results.append(os.fstat(descriptor))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    return results


def test_the_file_and_each_new_folder_are_made_durable(
    tmp_path: Path, synced: list[os.stat_result]
) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_durably(path, b"content")
    assert path.read_bytes() == b"content"
    inodes = {status.st_ino for status in synced}
    assert inodes == {place.stat().st_ino for place in (tmp_path, *path.parents[:2], path)}
    assert synced[-1].st_ino == path.parent.stat().st_ino, "the rename, last"


def test_tensors_are_written_durably_too(tmp_path: Path, synced: list[os.stat_result]) -> None:
    path = tmp_path / "tensors"
    write_tensors(path, {"x": torch.arange(3)})
    assert torch.equal(TensorFile(path)["x"], torch.arange(3))
    assert [status.st_ino for status in synced] == [path.stat().st_ino, tmp_path.stat().st_ino]


def test_a_function_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_durably(path, b"old")

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_durably(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_secret_is_never_readable_by_others(tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
        temporary.write_bytes(b"secret")

    write_durably(tmp_path / "file", write, mode=0o600)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600
