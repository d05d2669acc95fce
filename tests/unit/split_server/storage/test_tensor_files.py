"""A damaged file is found when it is read."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from protocol.errors import DamagedFile
from split_server.storage.tensor_files import (
    check_file,
    read_tensors,
    write_named_tensors,
    write_tensors,
)

TENSORS: dict[str, Tensor] = {
    "a": torch.arange(12.0).reshape(3, 4),
    "b": torch.arange(5, dtype=torch.float64),
    "count": torch.tensor(7),
}


def hashed(folder: Path) -> Path:
    return folder / f"{write_tensors(folder, TENSORS).sha256}.safetensors"


def named(folder: Path) -> Path:
    write_named_tensors(folder / "3.safetensors", TENSORS)
    return folder / "3.safetensors"


WRITERS = pytest.mark.parametrize("write", [hashed, named])


@WRITERS
def test_tensors_survive_a_round_trip_and_equal_tensors_give_equal_files(
    tmp_path: Path, write: object
) -> None:
    path, again = write(tmp_path / "1"), write(tmp_path / "2")  # type: ignore[operator]
    assert path.read_bytes() == again.read_bytes()
    found = read_tensors(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@WRITERS
def test_a_changed_bit_anywhere_is_a_damaged_file(tmp_path: Path, write: object) -> None:
    path = write(tmp_path)  # type: ignore[operator]
    whole = path.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(whole)), 400):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(DamagedFile, match=path.name):
            read_tensors(path)


@WRITERS
@pytest.mark.parametrize("length", [0, 7, 100])
def test_a_file_that_is_cut_off_is_damaged(tmp_path: Path, write: object, length: int) -> None:
    path = write(tmp_path)  # type: ignore[operator]
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DamagedFile):
        read_tensors(path)


def test_a_file_without_its_checksum_is_damaged(tmp_path: Path) -> None:
    path = hashed(tmp_path).rename(tmp_path / "4.safetensors")
    with pytest.raises(DamagedFile):
        read_tensors(path)


def test_a_missing_file_is_not_a_damaged_one(tmp_path: Path) -> None:
    for name in ("5.safetensors", f"{'0' * 64}.safetensors"):
        with pytest.raises(FileNotFoundError):
            read_tensors(tmp_path / name)


def test_any_file_can_be_checked_against_its_hash(tmp_path: Path) -> None:
    path = hashed(tmp_path)
    check_file(path, path.stem)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DamagedFile):
        check_file(path, path.stem)
