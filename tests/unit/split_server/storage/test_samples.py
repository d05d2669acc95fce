"""The sample store returns what was stored, within its limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from protocol.errors import InvalidField, TooLarge
from split_server.storage.sample_store import RowForm, SampleStore, StoreLimits
from tests.support.samples import (
    PLAIN,
    PLENTY,
    TEN,
    TWO_BUFFERS,
    A,
    B,
    C,
    assert_whole,
    content,
    files,
    lacking,
    name,
    put,
    stored_numbers,
    take,
)

MakeStore = Callable[..., SampleStore]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeStore]:
    made: list[SampleStore] = []

    def one(memory: int = PLENTY, disk: int = 0, participant: int = PLENTY) -> SampleStore:
        folder = tmp_path / f"samples-{len(made)}"
        made.append(SampleStore(folder, StoreLimits(memory, disk, participant)))
        return made[-1]

    yield one
    for store in made:
        store.close()


# Stored bytes


@pytest.mark.parametrize("form", [PLAIN, TWO_BUFFERS, TEN])
@pytest.mark.parametrize("memory", [PLENTY, 60])  # 60: most samples are on disk
def test_a_batch_in_any_order_equals_the_stored_samples(
    make: MakeStore, form: RowForm, memory: int
) -> None:
    store = make(memory=memory, disk=PLENTY)
    put(store, A, range(12), form)
    assert (store.disk_bytes > 0) is (memory == 60)
    for wanted in ([3], [11, 0, 5, 5, 7], list(range(12))):
        assert_whole(take(store, A, wanted), A, wanted, form)


def test_taken_buffers_are_copies(make: MakeStore) -> None:
    store = make()
    put(store, A, [1])
    found = take(store, A, [1])
    assert isinstance(found, tuple)
    found[1][0][:] = bytes(10)
    assert_whole(take(store, A, [1]), A, [1])


def test_the_store_copies_samples_out_of_their_frame(make: MakeStore) -> None:
    store = make()
    frame = bytearray(b"".join(content(A, 1, TEN)))
    store.put(A, TEN, [name(1)], [memoryview(frame)])
    frame[:] = bytes(10)
    assert_whole(take(store, A, [1]), A, [1])


def test_a_sample_on_disk_has_the_same_bytes(make: MakeStore, tmp_path: Path) -> None:
    store = make(memory=40, disk=PLENTY)
    put(store, A, range(4), TEN)
    assert (store.memory_bytes, store.disk_bytes) == (40, 0)
    put(store, A, range(4, 12), TEN)
    assert store.memory_bytes <= 40
    assert sum(files(tmp_path / "samples-0")) == store.disk_bytes >= 80
    assert stored_numbers(store, A) == list(range(12))
    for number in range(12):
        assert_whole(take(store, A, [number]), A, [number])


def test_a_taken_batch_outlives_its_samples(make: MakeStore) -> None:
    store = make(memory=40, disk=PLENTY)
    put(store, A, range(12))
    found = take(store, A, range(12))
    store.drop("r1")
    assert_whole(found, A, range(12))


def test_a_stored_id_is_not_overwritten(make: MakeStore) -> None:
    store = make()
    put(store, A, [1])
    store.put(A, TEN, [name(1), name(2)], [memoryview(bytes(20))])
    assert_whole(take(store, A, [1]), A, [1])
    assert store.memory_bytes == 20


# Missing samples


def stored(store: SampleStore, *numbers: int) -> list[int | None]:
    """The content of each sample, whose ten bytes are alike."""
    return [
        sample and sample.data[0] for sample in store.find(A, [name(number) for number in numbers])
    ]


def put_over(store: SampleStore, contents: dict[int, int]) -> None:
    """Store samples by number, in place of those of the same numbers."""
    names = [name(number) for number in contents]
    buffer = b"".join(bytes([content]) * 10 for content in contents.values())
    store.put(A, TEN, names, [memoryview(buffer)], replace=True)


def test_a_sample_is_replaced_only_if_that_is_asked_for(make: MakeStore) -> None:
    store = make()
    put_over(store, {1: 10, 2: 20})
    assert stored(store, 2, 3, 1) == [20, None, 10]
    put_over(store, {2: 21})
    store.put(A, TEN, [name(1)], [memoryview(bytes(10))])
    assert stored(store, 1, 2) == [10, 21]
    assert store.memory_bytes == 20


def test_a_replaced_sample_counts_as_used(make: MakeStore) -> None:
    store = make(participant=30)
    put_over(store, {1: 1, 2: 2, 3: 3})
    put_over(store, {1: 10})
    stored(store, 2)
    put_over(store, {4: 4})
    assert stored(store, 1, 2, 3, 4) == [10, 2, None, 4]


def test_a_sample_on_disk_can_be_replaced(make: MakeStore) -> None:
    store = make(memory=20, disk=100)
    put_over(store, {1: 1, 2: 2, 3: 3})
    assert (store.memory_bytes, store.disk_bytes) == (20, 10)
    sample = store.find(A, [name(1)])[0]
    assert stored(store, 1, 2, 3) == [1, 2, 3]
    put_over(store, {1: 10})
    assert stored(store, 1, 2, 3) == [10, 2, 3]
    assert store.memory_bytes + store.disk_bytes == 30
    assert sample is not None
    assert bytes(sample.data) == bytes([1] * 10)  # a reader's bytes stay valid


def test_take_returns_the_missing_positions_and_drops_nothing(make: MakeStore) -> None:
    store = make(memory=30, disk=0)
    put(store, A, [1, 2, 3])
    assert take(store, A, [9, 1, 8, 2, 8]) == [0, 2, 4] == lacking(store, A, [9, 1, 8, 2, 8])
    assert take(store, B, [1, 2]) == [0, 1] == lacking(store, B, [1, 2])
    assert store.memory_bytes == 30
    put(store, A, [4])  # 1 and 2 were used
    assert stored_numbers(store, A) == [1, 2, 4]


def test_list_missing_does_not_count_as_use(make: MakeStore) -> None:
    store = make(memory=30)
    put(store, A, [1, 2, 3])
    assert lacking(store, A, [1]) == []
    put(store, A, [4])
    assert stored_numbers(store, A) == [2, 3, 4]


def test_mixed_forms_are_refused(make: MakeStore) -> None:
    store = make()
    put(store, A, [1], PLAIN)
    put(store, A, [2], TWO_BUFFERS)
    with pytest.raises(InvalidField) as caught:
        take(store, A, [1, 2])
    assert caught.value.field == "ids"
    assert_whole(take(store, A, [1]), A, [1], PLAIN)
    assert_whole(take(store, A, [2]), A, [2], TWO_BUFFERS)


@pytest.mark.parametrize(("memory", "participant"), [(9, 100), (100, 9)])
def test_a_sample_over_a_limit_is_refused_and_nothing_is_dropped(
    make: MakeStore, memory: int, participant: int
) -> None:
    store = make(memory, 1000, participant)
    put(store, A, [1], PLAIN)
    with pytest.raises(TooLarge) as caught:
        put(store, A, [2], TEN)
    assert (caught.value.limit, caught.value.value) == (9, 10)
    assert stored_numbers(store, A) == [1]
    assert store.memory_bytes == 8


# Least recently used


def test_the_least_recently_used_sample_is_dropped_first(make: MakeStore) -> None:
    store = make(memory=40)
    put(store, A, [1, 2, 3, 4])
    take(store, A, [1])
    put(store, A, [2])  # sent again: used again
    put(store, A, [5])
    assert stored_numbers(store, A) == [1, 2, 4, 5]
    put(store, A, [6])
    assert stored_numbers(store, A) == [1, 2, 5, 6]


def test_owners_with_more_than_their_share_lose_samples_least_recent_first(make: MakeStore) -> None:
    store = make(memory=60)
    put(store, A, [1, 2, 3])
    put(store, B, [1])
    put(store, C, [1, 2])
    take(store, B, [1])
    put(store, C, [3, 4])  # A and C are above a third
    assert (stored_numbers(store, A), stored_numbers(store, B), stored_numbers(store, C)) == (
        [2, 3],
        [1],
        [2, 3, 4],
    )


def test_a_participant_over_its_limit_loses_its_own_samples_alone(make: MakeStore) -> None:
    store = make(participant=30)
    put(store, B, [1, 2, 3])
    put(store, A, [1, 2])
    put(store, A, [3, 4, 5])
    assert (stored_numbers(store, A), stored_numbers(store, B)) == ([3, 4, 5], [1, 2, 3])
    assert store.memory_bytes == 60


def test_a_participants_limit_includes_its_disk(make: MakeStore) -> None:
    store = make(memory=20, disk=PLENTY, participant=50)
    put(store, A, range(9))
    assert stored_numbers(store, A) == [4, 5, 6, 7, 8]
    assert store.memory_bytes <= 20


def test_the_least_recently_used_segment_is_dropped_first(make: MakeStore) -> None:
    store = make(memory=40, disk=40)
    put(store, A, range(8))
    assert (store.memory_bytes, store.disk_bytes) == (40, 40)
    take(store, A, [0])
    put(store, A, [8])
    assert stored_numbers(store, A) == [0, *range(2, 9)]


@pytest.mark.parametrize("disk", [0, 40])
def test_a_batch_is_complete_once_its_missing_samples_are_sent(make: MakeStore, disk: int) -> None:
    """Its stored samples, least recently used before, must not be dropped for the others."""
    store = make(memory=80, disk=disk, participant=80 + disk)
    put(store, A, range(20))
    here = stored_numbers(store, A)
    batch = [*here[:5], 0, 1]
    assert take(store, A, batch) == [5, 6]
    put(store, A, [0, 1])
    assert_whole(take(store, A, batch), A, batch)


@pytest.mark.parametrize("disk", [0, 15, 1000])
def test_the_newest_sample_is_stored(make: MakeStore, disk: int) -> None:
    """Whatever its size: otherwise a device would send it for ever."""
    store = make(memory=100, disk=disk)
    small, large = RowForm("uint8", (20,), (20,)), RowForm("uint8", (90,), (90,))
    for form, number in ((small, 1), (large, 2), (large, 3), (small, 4), (large, 5)):
        put(store, A, [number], form)
        assert_whole(take(store, A, [number]), A, [number], form)


# Owners


def test_owners_never_see_each_others_samples(make: MakeStore) -> None:
    store = make()
    put(store, A, [1, 2])
    assert [lacking(store, owner, [1, 2]) for owner in (A, B, C)] == [[], [0, 1], [0, 1]]
    for owner in (B, C):
        put(store, owner, [1])
    for owner in (A, B, C):
        assert_whole(take(store, owner, [1]), owner, [1])


def test_dropping_frees_memory_and_files(make: MakeStore, tmp_path: Path) -> None:
    store = make(memory=40, disk=PLENTY)
    for owner in (A, B, C):
        put(store, owner, range(10))
    store.drop("r1", "p2")
    assert [stored_numbers(store, owner, range(10)) for owner in (A, B, C)] == [
        list(range(10)),
        [],
        list(range(10)),
    ]
    store.drop("r1")
    assert stored_numbers(store, A, range(10)) == []
    assert_whole(take(store, C, range(10)), C, range(10))
    assert sum(files(tmp_path / "samples-0")) == store.disk_bytes
    store.drop("r2")
    store.drop("r2")
    assert (store.memory_bytes, store.disk_bytes, files(tmp_path / "samples-0")) == (0, 0, [])
    put(store, A, [1])
    assert_whole(take(store, A, [1]), A, [1])


def test_files_of_an_earlier_process_are_removed(tmp_path: Path) -> None:
    limits = StoreLimits(40, PLENTY, PLENTY)
    killed = SampleStore(tmp_path / "samples", limits)
    put(killed, A, range(10))
    assert files(tmp_path / "samples")
    again = SampleStore(tmp_path / "samples", limits)
    assert (files(tmp_path / "samples"), stored_numbers(again, A)) == ([], [])
    again.close()
    assert not (tmp_path / "samples").exists()


def test_the_number_of_mapped_files_is_limited(tmp_path: Path) -> None:
    store = SampleStore(tmp_path / "samples", StoreLimits(40, PLENTY, PLENTY, files=3))
    put(store, A, range(40))
    assert 0 < len(files(tmp_path / "samples")) <= 3
    assert stored_numbers(store, A)[-1] == 39
    store.close()


def test_other_files_are_not_removed(tmp_path: Path) -> None:
    photo = tmp_path / "samples" / "photo.jpg"
    photo.parent.mkdir()
    photo.write_bytes(b"x")
    (tmp_path / "samples" / "old.samples").write_bytes(b"x")
    SampleStore(tmp_path / "samples", StoreLimits(40, PLENTY, PLENTY)).close()
    assert list(photo.parent.iterdir()) == [photo]


def test_a_full_disk_costs_only_samples(
    make: MakeStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_args: object, **_more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("split_server.storage.segments.mmap.mmap", full)
    store = make(memory=60, disk=PLENTY)
    put(store, A, range(12))
    assert store.memory_bytes <= 60
    assert store.disk_bytes == 0
    assert files(tmp_path / "samples-0") == []
    assert_whole(take(store, A, [11]), A, [11])


def test_a_sample_that_the_disk_has_changed_is_missing_and_can_be_stored_again(
    make: MakeStore, tmp_path: Path
) -> None:
    store = make(memory=40, disk=PLENTY)
    put(store, A, range(12))
    (first, *_) = sorted((tmp_path / "samples-0").iterdir(), key=lambda path: path.stat().st_mtime)
    with first.open("r+b") as file:
        begin = file.read(1)
        file.seek(0)
        file.write(bytes([begin[0] ^ 1]))
    missing = [number for number in range(12) if isinstance(take(store, A, [number]), list)]
    assert len(missing) == 1
    assert lacking(store, A, range(12)) == missing
    put(store, A, missing)
    assert_whole(take(store, A, range(12)), A, range(12))
