"""Smashed data rebuilt from cached rows and deltas: once per request, equal to the device's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edge_client.training.split_training import Sample
from protocol.errors import (
    InvalidField,
    MalformedFrame,
    NonFinite,
    SFPromptError,
    TooLarge,
    WrongShape,
)
from protocol.frames import Frame, decode_frame, encode_frame, join_frame
from protocol.limits import DEFAULT_LIMITS, FrameLimits
from split_server.storage.sample_store import Owner, SampleStore, StoreLimits
from tests.support.federation import SPLIT, TOKENS, WIDTH, smashed
from tuning_methods.sfprompt.device_deltas import DeltaBatch, DeltaCache
from tuning_methods.sfprompt.server_deltas import apply_deltas, decode_deltas, read_cached

A, B = Owner("r1", "p1"), Owner("r1", "p2")

ONE = TOKENS * WIDTH * 4  # bytes of a copy on the device

CACHED = 8 + ONE  # bytes on the server: the version, then the smashed data

PLENTY = 10**8

MOST = 8  # samples of a batch

MakeStore = Callable[..., SampleStore]

Tensors = dict[str, tuple[Tensor, str]]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeStore]:
    stores: list[SampleStore] = []

    def make_store(memory: int = PLENTY, disk: int = 0, participant: int = PLENTY) -> SampleStore:
        folder = tmp_path / f"samples-{len(stores)}"
        stores.append(SampleStore(folder, StoreLimits(memory, disk, participant)))
        return stores[-1]

    yield make_store
    for store in stores:
        store.close()


@pytest.fixture
def store(make: MakeStore) -> SampleStore:
    return make()


def ids(*names: int) -> Tensor:
    return torch.tensor([[name] * 16 for name in names], dtype=torch.uint8)


def forward(
    names: Sequence[int],
    versions: Sequence[tuple[int, int]],
    whole: dict[int, Tensor] | None = None,
    changes: dict[int, Tensor] | None = None,
    codec: str = "float32",
) -> Tensors:
    """The tensors of a request, rows by their indices."""
    tensors: Tensors = {
        "ids": (ids(*names), "uint8"),
        "versions": (torch.tensor(versions), "int64"),
    }
    for part, places, rows in (("whole", "whole_rows", whole), ("changes", "change_rows", changes)):
        if rows:
            tensors[part] = (torch.stack(list(rows.values())), codec)
            tensors[places] = (torch.tensor(list(rows)), "int64")
    return tensors


def frame(tensors: Tensors) -> Frame:
    meta = {"step": "s", "round": 1}
    return decode_frame(join_frame(encode_frame("forward", meta, tensors)))


def ask(store: SampleStore, tensors: Tensors, owner: Owner = A) -> Tensor | list[int]:
    return apply_deltas(store, owner, decode_deltas(frame(tensors), SPLIT, DEFAULT_LIMITS, MOST))


def answer(store: SampleStore, tensors: Tensors, owner: Owner = A) -> Tensor:
    result = ask(store, tensors, owner)
    assert isinstance(result, Tensor), f"places {result} are missing"
    return result


def content(store: SampleStore, *names: int, owner: Owner = A) -> list[tuple[int, bytes] | None]:
    stored = store.find(owner, [bytes([name] * 16) for name in names])
    cached = [sample and read_cached(sample) for sample in stored]
    return [pair and (pair[0], bytes(pair[1])) for pair in cached]


X, Y, Z = smashed(4, seed=0), smashed(4, seed=1), smashed(4, seed=2)


# Rebuilding


def test_whole_changed_and_skipped_rows_make_one_batch(store: SampleStore) -> None:
    first = answer(store, forward([1, 2], [(-1, 1), (-1, 1)], whole={0: X[0], 1: X[1]}))
    assert torch.equal(first, X[:2])
    mixed = forward([2, 3, 1], [(1, 1), (-1, 2), (1, 2)], whole={1: X[2]}, changes={2: Y[0]})
    assert torch.equal(answer(store, mixed), torch.stack([X[1], X[2], X[0] + Y[0]]))
    rest = answer(store, forward([1, 2, 3], [(2, 2), (1, 1), (2, 2)]))
    assert torch.equal(rest, torch.stack([X[0] + Y[0], X[1], X[2]]))


@pytest.mark.parametrize("codec", ["float16", "bfloat16", "int8", "int4", "int4-asym", "int4+zstd"])
def test_cached_rows_equal_the_decoded_ones(store: SampleStore, codec: str) -> None:
    whole = forward([1], [(-1, 1)], whole={0: X[0]}, codec=codec)
    changed = forward([1], [(1, 2)], changes={0: Y[0]}, codec=codec)
    first, second = frame(whole).tensor("whole").float(), frame(changed).tensor("changes").float()
    assert torch.equal(answer(store, whole), first)
    assert torch.equal(answer(store, changed), first + second)
    assert first.dtype == answer(store, forward([1], [(2, 2)])).dtype == torch.float32


def test_a_repeat_gets_the_same_result_and_is_applied_once(store: SampleStore) -> None:
    answer(store, forward([1, 2, 3], [(-1, 1)] * 3, whole=dict(enumerate(X[:3]))))
    request = forward([1, 2, 3], [(1, 1), (1, 2), (1, 2)], whole={1: Y[1]}, changes={2: Y[2]})
    first = answer(store, request)
    after = content(store, 1, 2, 3)
    assert torch.equal(answer(store, request), first)
    assert content(store, 1, 2, 3) == after
    assert torch.equal(first, torch.stack([X[0], Y[1], X[2] + Y[2]]))


def test_samples_of_another_version_are_reported_and_nothing_changes(store: SampleStore) -> None:
    answer(store, forward([1, 2], [(-1, 5), (-1, 5)], whole={0: X[0], 1: X[1]}))
    before = content(store, 1, 2, 3, 4)
    request = forward(
        [4, 1, 2, 3, 9],
        [(-1, 7), (4, 4), (5, 7), (5, 7), (6, 7)],  # new, other version, right, not here, not here
        whole={0: Y[0]},
        changes={2: Y[1], 3: Y[2], 4: Y[3]},
    )
    assert ask(store, request) == [1, 3, 4]
    assert content(store, 1, 2, 3, 4) == before


def test_a_late_repeat_of_an_older_request_changes_nothing(store: SampleStore) -> None:
    answer(store, forward([1], [(-1, 1)], whole={0: X[0]}))
    old = forward([1], [(1, 2)], changes={0: Y[0]})
    answer(store, old)
    answer(store, forward([1], [(2, 3)], changes={0: Z[0]}))
    before = content(store, 1)
    assert ask(store, old) == [0]
    assert content(store, 1) == before


def test_participants_cannot_use_each_others_samples(store: SampleStore) -> None:
    answer(store, forward([1], [(-1, 1)], whole={0: X[0]}))
    assert ask(store, forward([1], [(1, 1)]), owner=B) == [0]
    answer(store, forward([1], [(-1, 1)], whole={0: Y[0]}), owner=B)
    assert torch.equal(answer(store, forward([1], [(1, 1)])), X[:1])


def test_the_result_does_not_share_memory_with_the_cache(store: SampleStore) -> None:
    answer(store, forward([1], [(-1, 1)], whole={0: X[0]})).zero_()
    answer(store, forward([1], [(1, 1)])).zero_()
    assert torch.equal(answer(store, forward([1], [(1, 1)])), X[:1])


def test_an_overflow_is_refused_and_nothing_changes(store: SampleStore) -> None:
    large = torch.full((TOKENS, WIDTH), 3e38)
    answer(store, forward([1], [(-1, 1)], whole={0: large}))
    before = content(store, 1)
    with pytest.raises(NonFinite):
        ask(store, forward([1], [(1, 2)], changes={0: large}))
    assert content(store, 1) == before


# Refusals


def changed(**tensors: tuple[Tensor, str] | None) -> Tensors:
    """A valid request of a whole and a changed row, with some tensors replaced."""
    sound = forward([1, 2], [(-1, 1), (0, 1)], whole={0: X[0]}, changes={1: X[1]})
    full = {**sound, **tensors}
    return {name: tensor for name, tensor in full.items() if tensor is not None}


def whole_numbers(*numbers: object) -> tuple[Tensor, str]:
    return torch.tensor(numbers, dtype=torch.int64), "int64"


REFUSALS: list[tuple[Tensors, type[SFPromptError], str]] = [
    (changed(smashed=(X[:1], "float32")), MalformedFrame, "tensors"),
    (changed(ids=None), MalformedFrame, "ids"),
    (changed(ids=(ids(1, 1), "uint8")), MalformedFrame, "ids"),
    (changed(ids=(ids(1, 2)[:, :8].contiguous(), "uint8")), MalformedFrame, "ids"),
    (changed(ids=(ids(*range(MOST + 1)), "uint8")), InvalidField, "ids"),
    (changed(versions=None), MalformedFrame, "versions"),
    (changed(versions=whole_numbers(1, 2)), MalformedFrame, "versions"),
    (changed(versions=whole_numbers([1, 2])), MalformedFrame, "versions"),
    (changed(versions=(torch.zeros(2, 2), "float32")), MalformedFrame, "versions.codec"),
    (changed(ids=(ids(1, 2), "uint8+zstd")), MalformedFrame, "ids.codec"),
    (changed(versions=whole_numbers([-1, 1], [1, 1])), MalformedFrame, "versions"),
    (changed(versions=whole_numbers([1, 1], [0, 1])), MalformedFrame, "versions"),
    (changed(whole=None, whole_rows=None), MalformedFrame, "versions"),
    (changed(whole=None), MalformedFrame, "whole"),
    (changed(whole_rows=None), MalformedFrame, "whole_rows"),
    (changed(whole=(X[0], "float32")), WrongShape, "whole"),
    (changed(whole=(X[:1, 1:], "float32")), WrongShape, "whole"),
    (changed(whole=(X[:0], "float32")), WrongShape, "whole"),
    (changed(whole=(X[:1], "topk:0.1")), InvalidField, "whole"),
    (changed(changes=(X[:1], "pq+zstd")), InvalidField, "changes"),
    (changed(changes=(X[:1].long(), "int64")), InvalidField, "changes"),
    (changed(whole_rows=whole_numbers(0, 1)), MalformedFrame, "whole_rows"),
    (changed(whole_rows=whole_numbers(2)), MalformedFrame, "whole_rows"),
    (changed(whole_rows=whole_numbers(-1)), MalformedFrame, "whole_rows"),
    (changed(whole_rows=whole_numbers(1)), MalformedFrame, "change_rows"),
    (changed(whole_rows=(torch.zeros(1), "float32")), MalformedFrame, "whole_rows.codec"),
    (
        changed(
            changes=(X[:2], "float32"),
            change_rows=whole_numbers(1, 0),
            whole=None,
            whole_rows=None,
        ),
        MalformedFrame,
        "change_rows",
    ),
    (changed(whole=(X[:1] * torch.nan, "float32")), NonFinite, "whole"),
    (changed(changes=(X[:1] / 0, "bfloat16")), NonFinite, "changes"),
]


@pytest.mark.parametrize(("tensors", "error", "field"), REFUSALS)
def test_a_contradictory_request_is_refused(
    tensors: Tensors, error: type[SFPromptError], field: str
) -> None:
    with pytest.raises(SFPromptError) as caught:
        decode_deltas(frame(tensors), SPLIT, DEFAULT_LIMITS, MOST)
    assert type(caught.value) is error
    assert caught.value.field == field
    assert caught.value.limit is None or caught.value.limit != caught.value.value


@pytest.mark.parametrize("part", ["whole", "changes", "neither"])
def test_a_batch_that_is_too_large_in_memory_is_refused_before_it_is_decoded(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, zeros = list(range(1, 7)), dict.fromkeys(range(6), torch.zeros(TOKENS, WIDTH))
    versions = [(1, 1 if part == "neither" else 2)] * 6
    sent = {} if part == "neither" else {part: zeros}
    small = frame(forward(names, versions, **sent, codec="float32+zstd"))

    def decoded(*_: object) -> None:
        raise AssertionError("a tensor was decoded")

    limits = FrameLimits(max_frame_bytes=6 * ONE)
    assert len(decode_deltas(small, SPLIT, limits, MOST).ids) == 6
    monkeypatch.setattr("tuning_methods.sfprompt.server_deltas.decode_floats", decoded)
    with pytest.raises(TooLarge) as caught:
        decode_deltas(small, SPLIT, FrameLimits(max_frame_bytes=6 * ONE - 1), MOST)
    assert (caught.value.field, caught.value.value) == ("ids", 6 * ONE)


def test_the_valid_request_is_accepted() -> None:
    batch = decode_deltas(frame(changed()), SPLIT, DEFAULT_LIMITS, MOST)
    assert (batch.before, batch.after) == ([-1, 0], [1, 1])
    assert (batch.whole.indices, batch.changes.indices) == ([0], [1])


# The store


def test_samples_are_dropped_with_their_owner(store: SampleStore) -> None:
    for owner in (A, B):
        answer(store, forward([1], [(-1, 1)], whole={0: X[0]}), owner)
    assert store.memory_bytes == 2 * CACHED
    store.drop(A.run, A.participant)
    assert ask(store, forward([1], [(1, 1)])) == [0]
    assert torch.equal(answer(store, forward([1], [(1, 1)]), B), X[:1])
    store.drop(B.run)
    assert store.memory_bytes == 0


def test_a_batch_larger_than_the_cache_is_answered(make: MakeStore) -> None:
    store = make(participant=2 * CACHED)
    batch = forward([1, 2, 3], [(-1, 1)] * 3, whole=dict(enumerate(X[:3])))
    assert torch.equal(answer(store, batch), X[:3])
    assert ask(store, forward([1, 2, 3], [(1, 1)] * 3)) == [0]


# Both ends

EVENTS = ["nothing", "response lost", "sent twice", "copies lost", "one copy lost", "forgotten"]


class Pair:
    """A device and a server, and a connection that the test disturbs."""

    def __init__(
        self, folder: Path, codecs: tuple[str, str], skip_below: float, copies: int
    ) -> None:
        self.device = DeltaCache(*codecs, skip_below, copies * ONE)
        self.store = SampleStore(folder, StoreLimits(3 * CACHED, 3 * CACHED, 5 * CACHED))

    def visit(self, positions: list[int], batch: Tensor, event: str) -> None:
        named: list[Sample] = [(position, None) for position in positions]
        if event == "copies lost":
            self.store.drop(A.run)
        if event == "one copy lost":
            self._lose(named[0], batch)
        if event == "forgotten":
            self.device.forget(named[:1])
        if event == "response lost":  # and given up: the round was over
            self._send(self.device.encode(named, batch))
            return
        for _ in range(3):
            delta = self.device.encode(named, batch)
            result = self._send(delta)
            if event == "sent twice" and isinstance(result, Tensor):
                again = self._send(delta)
                assert isinstance(again, list) or torch.equal(again, result)
            if isinstance(result, Tensor):
                self.device.confirm(delta)
                assert torch.equal(result, delta.decoded)
                return
            self.device.forget(named[place] for place in result)
        raise AssertionError("three requests were not enough")

    def _send(self, batch: DeltaBatch) -> Tensor | list[int]:
        return ask(self.store, dict(batch.tensors))

    def _lose(self, sample: Sample, batch: Tensor) -> None:
        """Overwrite a cached sample."""
        (name,) = self.device.encode([sample], batch[:1]).tensors["ids"][0]
        zeros = frame(forward([1], [(-1, 2**40)], whole={0: torch.zeros_like(batch[0])}))
        other = decode_deltas(zeros, SPLIT, DEFAULT_LIMITS, MOST)
        apply_deltas(self.store, A, replace(other, ids=[bytes(name.tolist())]))


@settings(max_examples=40, deadline=None)
@given(
    codecs=st.sampled_from(
        [("float32", "float32"), ("int8", "int4+zstd"), ("float16", "int4-asym")]
    ),
    skip_below=st.sampled_from([0.0, 0.05]),
    copies=st.integers(1, 6),
    visits=st.lists(
        st.tuples(
            st.lists(st.integers(0, 6), min_size=1, max_size=3, unique=True),
            st.sampled_from(EVENTS),
        ),
        max_size=10,
    ),
)
def test_device_and_server_agree_bit_by_bit_after_any_loss(
    codecs: tuple[str, str],
    skip_below: float,
    copies: int,
    visits: list[tuple[list[int], str]],
) -> None:
    with TemporaryDirectory() as folder:
        pair = Pair(Path(folder) / "samples", codecs, skip_below, copies)
        now = smashed(7)
        for number, (positions, event) in enumerate(visits):
            now = now + 0.05 * smashed(7, seed=number + 1)
            pair.visit(positions, now[positions], event)
        pair.store.close()
