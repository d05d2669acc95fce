"""The sample store under random use, compared with a plain model, and from many threads."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from protocol.errors import InvalidField, TooLarge
from split_server.storage.sample_store import Owner, RowForm, SampleStore, StoreLimits
from tests.support.samples import (
    PLAIN,
    TWO_BUFFERS,
    A,
    B,
    C,
    assert_whole,
    files,
    lacking,
    put,
    stored_numbers,
    take,
)

OWNERS = st.sampled_from((A, B, C))

FORMS = st.sampled_from((PLAIN, TWO_BUFFERS))

NUMBERS = st.lists(st.integers(0, 15), min_size=1, max_size=10)


class AnyUse(RuleBasedStateMachine):
    """Compares the store with a record of all samples sent and when each was used."""

    @initialize(
        memory=st.integers(1, 120), disk=st.integers(0, 150), participant=st.integers(1, 200)
    )
    def begin(self, memory: int, disk: int, participant: int) -> None:
        self.folder = TemporaryDirectory()
        self.limits = StoreLimits(memory, disk, participant)
        self.path = Path(self.folder.name) / "samples"
        self.store = SampleStore(self.path, self.limits)
        self.sent: dict[tuple[Owner, int], RowForm] = {}  # everything that can be stored
        self.used: dict[tuple[Owner, int], int] = {}
        self.now = 0

    def use(self, owner: Owner, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.now += 1
            self.used[owner, number] = self.now

    @rule(owner=OWNERS, numbers=NUMBERS, form=FORMS)
    def put(self, owner: Owner, numbers: list[int], form: RowForm) -> None:
        if form.nbytes > min(self.limits.memory_bytes, self.limits.participant_bytes):
            with pytest.raises(TooLarge):
                put(self.store, owner, numbers, form)
            return
        there = stored_numbers(self.store, owner)
        put(self.store, owner, numbers, form)
        self.sent |= {(owner, number): form for number in numbers if number not in there}
        self.use(owner, numbers)
        if numbers[-1] not in numbers[:-1] and numbers[-1] not in there:
            assert lacking(self.store, owner, numbers[-1:]) == [], "just sent, and gone"
        if not self.limits.disk_bytes:
            here = stored_numbers(self.store, owner)
            gone = {number for who, number in self.sent if who == owner} - set(here)
            oldest = min(self.used[owner, number] for number in here)
            assert all(self.used[owner, number] < oldest for number in gone)

    @rule(owner=OWNERS, numbers=NUMBERS)
    def take(self, owner: Owner, numbers: list[int]) -> None:
        gone = lacking(self.store, owner, numbers)
        counted = self.store.memory_bytes, self.store.disk_bytes
        forms = [self.sent[owner, n] for place, n in enumerate(numbers) if place not in gone]
        if gone:
            assert take(self.store, owner, numbers) == gone
            self.use(owner, [n for place, n in enumerate(numbers) if place not in gone])
        elif len(set(forms)) > 1:
            self.use(owner, numbers)
            with pytest.raises(InvalidField):
                take(self.store, owner, numbers)
        else:
            self.use(owner, numbers)
            assert_whole(take(self.store, owner, numbers), owner, numbers, forms[0])
        assert (self.store.memory_bytes, self.store.disk_bytes) == counted
        assert lacking(self.store, owner, numbers) == gone

    @rule(run=st.sampled_from(("r1", "r2")), participant=st.sampled_from((None, "p1", "p2")))
    def drop(self, run: str, participant: str | None) -> None:
        self.store.drop(run, participant)
        for owner, number in list(self.sent):
            if owner.run == run and participant in (None, owner.participant):
                del self.sent[owner, number]
                assert lacking(self.store, owner, [number]) == [0]

    @invariant()
    def no_budget_is_passed(self) -> None:
        here = {owner: stored_numbers(self.store, owner) for owner in (A, B, C)}
        sizes = {
            owner: sum(self.sent[owner, number].nbytes for number in numbers)
            for owner, numbers in here.items()
        }
        assert max(sizes.values()) <= self.limits.participant_bytes
        assert 0 <= self.store.memory_bytes <= self.limits.memory_bytes
        assert self.store.disk_bytes == sum(files(self.path)) <= self.limits.disk_bytes
        on_disk = sum(sizes.values()) - self.store.memory_bytes
        assert 0 <= on_disk <= self.store.disk_bytes
        assert bool(on_disk) == bool(self.store.disk_bytes), "a file without samples is left"

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.folder.cleanup()


TestAnyUse = AnyUse.TestCase

TestAnyUse.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_many_threads_at_once(tmp_path: Path) -> None:
    path = tmp_path / "samples"
    store = SampleStore(path, StoreLimits(memory_bytes=300, disk_bytes=600, participant_bytes=500))
    begin = threading.Barrier(6)

    def use(thread: int) -> int:
        rng, seen = random.Random(thread), 0
        begin.wait(20)
        for _ in range(120):
            owner = rng.choice((A, B, C))
            act = rng.random()
            if act < 0.5:
                put(store, owner, [rng.randrange(60) for _ in range(rng.randint(1, 8))])
            elif act < 0.97:
                numbers = [rng.randrange(60) for _ in range(rng.randint(1, 2))]
                found = take(store, owner, numbers)
                if isinstance(found, tuple):
                    assert_whole(found, owner, numbers)
                    seen += 1
            else:
                store.drop(owner.run, owner.participant)
            assert store.memory_bytes >= 0
        return seen

    with ThreadPoolExecutor(6) as threads:
        seen = sum(threads.map(use, range(6)))
    assert seen > 20, "hardly anything was found"
    here = sum(len(stored_numbers(store, owner, range(60))) for owner in (A, B, C))
    assert store.memory_bytes <= 300
    assert store.disk_bytes == sum(files(path)) <= 600
    assert store.memory_bytes <= 10 * here <= store.memory_bytes + store.disk_bytes
    store.drop("r1")
    store.drop("r2")
    assert (store.memory_bytes, store.disk_bytes, files(path)) == (0, 0, [])
    store.close()
