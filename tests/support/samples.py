"""Ids and samples of three owners, for tests of the server's sample cache."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from split_server.storage.sample_store import Owner, RowForm, SampleStore

A, B, C = Owner("r1", "p1"), Owner("r1", "p2"), Owner("r2", "p1")

PLAIN = RowForm("float32", (1, 2), (8,))

TWO_BUFFERS = RowForm("int8", (2, 3), (6, 8))

TEN = RowForm("uint8", (10,), (10,))

PLENTY = 10**6

Kept = tuple[RowForm, list[memoryview]]


def name(number: int) -> bytes:
    return number.to_bytes(16, "little")


def sample_ids(*numbers: int) -> Tensor:
    """Return ids of samples, uint8 [B, 16]."""
    return torch.stack([torch.full((16,), number, dtype=torch.uint8) for number in numbers])


def content(owner: Owner, number: int, form: RowForm) -> list[bytes]:
    """Return a sample's content, unique for its owner and number."""
    seed = repr((owner, number, form)).encode()
    return [
        hashlib.shake_128(seed + bytes([place])).digest(size)
        for place, size in enumerate(form.sizes)
    ]


def put(store: SampleStore, owner: Owner, numbers: Sequence[int], form: RowForm = TEN) -> None:
    rows = [content(owner, number, form) for number in numbers]
    buffers = [memoryview(b"".join(parts)) for parts in zip(*rows, strict=True)]
    store.put(owner, form, [name(number) for number in numbers], buffers)


def take(store: SampleStore, owner: Owner, numbers: Sequence[int]) -> Kept | list[int]:
    return store.take(owner, [name(number) for number in numbers])


def lacking(store: SampleStore, owner: Owner, numbers: Sequence[int]) -> list[int]:
    return store.list_missing(owner, [name(number) for number in numbers])


def stored_numbers(store: SampleStore, owner: Owner, among: Sequence[int] = range(40)) -> list[int]:
    gone = set(lacking(store, owner, among))
    return [number for place, number in enumerate(among) if place not in gone]


def assert_whole(
    result: Kept | list[int], owner: Owner, numbers: Sequence[int], form: RowForm = TEN
) -> None:
    assert isinstance(result, tuple), f"places {result} are missing"
    assert result[0] == form
    rows = [content(owner, number, form) for number in numbers]
    expected = [b"".join(parts) for parts in zip(*rows, strict=True)]
    assert [bytes(buffer) for buffer in result[1]] == expected


def files(folder: Path) -> list[int]:
    """Return the sizes of a folder's files."""
    return [path.stat().st_size for path in folder.iterdir()]
